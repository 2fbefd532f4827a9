"""`torchmae visualize`: pictures of what a trained model learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torchmae import settings
from torchmae.errors import ConfigError, one_of, within

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = (
    "Draws what a trained model learned: patch features as colours, attention, neighbours, a map, mask ratios."
)
KINDS = ("pca", "attention", "neighbours", "map", "ratios")
METHODS = ("tsne", "pca", "umap")
MAX_IMAGES = 64
# Images of the data set that are drawn when none are given.
NUM_EXAMPLES = {"pca": 8, "attention": 4, "neighbours": 4, "ratios": 4}


@dataclass(frozen=True)
class DataOptions:
    """The images that neighbours are found among, that a map is made of, and that are drawn when none are given.

    Attributes:
        source: what `torchmae pretrain --data` takes: a folder, a file or a name; null: what the run was trained on.
        root: where torchvision's sets are kept and downloaded to; null: where the run had them.
    """

    source: str | None = None
    root: str | None = None


@dataclass(frozen=True)
class Options:
    """What `torchmae visualize` takes beside the run and the images.

    Attributes:
        kind: pca (patch features as colours), attention (of the class token), neighbours (the training images with
            the nearest features), map (all held-out images on a plane), or ratios (reconstructions as more is hidden).
        data: the data set.
        out: the picture to write, a PNG file.
        method: of the map: tsne, pca, or umap where umap-learn is installed.
        num_images: images of the data set used for neighbours and map, at most.
        device: auto, cpu, cuda, cuda:1, mps.
        seed: of masks, and of umap.
        target: of ratios: what weights of others were trained to predict, where they do not say: pixels or normalised
            (patches).
    """

    kind: str = "pca"
    data: DataOptions = field(default_factory=DataOptions)
    out: Path = Path("picture.png")
    method: str = "tsne"
    num_images: int = 2000
    device: str = "auto"
    seed: int = 0
    target: str | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        one_of("method", self.method, METHODS)
        if self.out.suffix.lower() != ".png":
            raise ConfigError(f"out is {str(self.out)!r}", "the picture is a PNG file: give a name that ends in .png")
        within("num_images", self.num_images, 3, 1e6)
        within("seed", self.seed, 0, 2**32 - 1)


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = settings.Parser(
        prog="torchmae visualize",
        usage="torchmae visualize RUN [IMAGE...] --kind KIND [OPTIONS]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="run folder, exported model, or weights of others (also as --init-from)")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        default=[],
        metavar="IMAGE",
        help="image files; without any, some of the held-out images",
    )
    values, options = settings.read_options(parser, words_first(args), Options)
    paths = values.images or []
    if options.kind == "map" and paths:
        raise ConfigError(f"a map is of a whole data set, not of {paths[0]}", "name the data set: --data PATH_OR_NAME")
    if len(paths) > MAX_IMAGES:
        raise ConfigError(f"{len(paths)} images are too many for one picture", f"give {MAX_IMAGES} or fewer")

    from torchmae.data.loader import one_line_when_a_worker_ends
    from torchmae.report.pictures import save_png

    with one_line_when_a_worker_ends():
        picture = draw(values.run, paths, options)

    save_png(picture, options.out)
    print(f"{options.out}  ({picture.info['Title']})")
    return 0


def words_first(args: Sequence[str]) -> list[str]:
    """Moves options, each with its value, behind the other words; argparse takes images in one place only.

    Every option of the command has a value but --help.
    """
    words, options = [], []
    rest = iter(args)
    for arg in rest:
        if arg == "--" or not arg.startswith("-"):
            words.append(arg)
            continue
        options.append(arg)
        if arg.startswith("--") and "=" not in arg and arg != "--help":
            options += [value for value in (next(rest, None),) if value is not None]
    return [*words, *options]


def draw(run: Path, paths: Sequence[Path], options: Options) -> Image.Image:
    """Makes the picture.

    Args:
        run: the run folder.
        paths: images; none: some of the data set's.
        options: what to draw.
    """
    from torchmae import visualize
    from torchmae.training.pretrained import load
    from torchmae.training.runtime import open_runtime

    runtime = open_runtime(options.device, "fp32", None)
    pretrained = load(run, target=options.target)
    pretrained.model.to(runtime.device)
    if not paths or options.kind in ("neighbours", "map"):
        data = visualize.open_run_data(run, pretrained, runtime, options.data.source, options.data.root)
    if options.kind == "map":
        return visualize.draw_map(pretrained, data, runtime, options.num_images, options.method, options.seed)
    if paths:
        images, captions = pretrained.preprocess(*paths).to(runtime.device), [path.stem for path in paths]
    else:
        images, labels = visualize.sample(visualize.held_out(data), NUM_EXAMPLES[options.kind])
        captions = [visualize.name_of(label, data.classes) for label in labels.tolist()]
    if options.kind == "neighbours":
        return visualize.draw_neighbours(pretrained, images, captions, data, runtime, options.num_images)
    if options.kind == "attention":
        return visualize.draw_attention(pretrained, images)
    if options.kind == "ratios":
        return visualize.draw_ratios(pretrained, images, seed=options.seed)
    return visualize.draw_pca(pretrained, images)
