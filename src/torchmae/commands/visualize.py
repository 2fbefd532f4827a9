"""`torchmae visualize`: pictures of what a trained model learned."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from torchmae import visualize
from torchmae.config.visualize import VisualizeOptions
from torchmae.data.loader import one_line_when_a_worker_ends
from torchmae.report.pictures import save_png
from torchmae.training.pretrained import load
from torchmae.training.runtime import open_runtime

# Number of images from the data set if none are given, and from a folder.
NUM_EXAMPLES = {"pca": 8, "attention": 4, "neighbours": 4, "ratios": 4}


def run(options: VisualizeOptions) -> int:
    """Runs the command; returns the exit status."""
    with one_line_when_a_worker_ends():
        picture = draw(options)
    save_png(picture, options.out)
    print(f"{options.out}  ({picture.info['Title']})")
    return 0


def draw(options: VisualizeOptions) -> Image.Image:
    """Draws the picture."""
    run, paths = Path(options.run), options.images
    runtime = open_runtime(options.device, "fp32", None)
    pretrained = load(run, target=options.target)
    pretrained.model.to(runtime.device)
    if not paths or options.kind in ("neighbours", "map"):
        data = visualize.open_run_data(run, pretrained, runtime, options.data.source, options.data.root)
    if options.kind == "map":
        return visualize.draw_map(pretrained, data, runtime, options.num_images, options.method, options.seed)
    look = visualize.look_of(pretrained.description, options.show)
    if paths:
        images = pretrained.prepare(*paths, limit=NUM_EXAMPLES[options.kind]).to(runtime.device)
        images = images._replace(names=tuple(Path(name).stem for name in images.names))
    else:
        images = visualize.sample(visualize.held_out(data), NUM_EXAMPLES[options.kind], data.classes)
    if options.kind == "neighbours":
        return visualize.draw_neighbours(pretrained, images, look, data, runtime, options.num_images)
    if options.kind == "attention":
        return visualize.draw_attention(pretrained, images, look)
    if options.kind == "ratios":
        return visualize.draw_ratios(pretrained, images, look, seed=options.seed)
    return visualize.draw_pca(pretrained, images, look)
