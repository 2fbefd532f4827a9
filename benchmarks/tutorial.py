"""The tutorial's own program, the same corrected, and a ViT-MAE, trained for equal time on the same images.

    python benchmarks/tutorial.py --data PATH [--minutes 2] [--title "CIFAR-10"]

PATH is anything `torchmae pretrain` takes that holds 32 x 32 colour images, class labels and a test split. Writes
benchmarks/results/tutorial.json and docs/images/tutorial-*.png, and puts the tables into both pages of the tutorial,
between their markers. `--render` only does the last, from the JSON that is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import torchmae
from torchmae.data.layouts import open_splits
from torchmae.data.loader import mixed_subset
from torchmae.data.transforms import Normalisation
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.training.pretrained import Pretrained
from torchmae.training.runtime import open_runtime

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tutorial.json"
PAGES = (ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tutorial.zh-CN.md")
PICTURES = ROOT / "docs" / "images"

# The recipes' own normalisation of the two tutorial models, given to the ViT too: all errors are then in one space.
HALF = (0.5, 0.5, 0.5)
MODELS: dict[str, dict[str, Any]] = {
    "literal": {"recipe": "tutorial"},
    "corrected": {"recipe": "tutorial-corrected"},
    "vit": {"recipe": "cifar10", "model": {"norm_pix": False}, "data": {"mean": HALF, "std": HALF}},
    "vit_norm_pix": {"recipe": "cifar10"},
}
PIXEL_MODELS = ("literal", "corrected", "vit")  # those whose predictions are pixels
HELD_OUT = 2000
SHOWN = 4
PATCH_RATIO = 0.75
LABEL_COLOUR = (118, 122, 128, 255)  # readable on white and on near-black: the background is transparent
HIDDEN_GREY = (116, 124, 138)
Column = tuple[str, Tensor, Tensor | None]  # of a picture: label, images, what is hidden in them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder, file or name")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each model")
    parser.add_argument("--title", default="CIFAR-10", help="what the tables call the data")
    parser.add_argument("--render", action="store_true", help="only put what was measured into the pages")
    args = parser.parse_args()
    if not args.render:
        if args.data is None:
            parser.error("--data is missing")
        results = measure_all(args.data, args.minutes, args.title)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for page in PAGES:
        page.write_text(render(results, page.read_text(encoding="utf-8")), encoding="utf-8")
    for row in comparison(results["models"]) + defects(results["losses"]):
        print(" | ".join(row))


def measure_all(source: str, minutes: float, title: str) -> dict[str, Any]:
    """Trains all models and measures them; the pictures are drawn on the way."""
    results: dict[str, Any] = {"title": title, "minutes": minutes, "date": date.today().isoformat(), "models": {}}
    trained: dict[str, Pretrained] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in MODELS.items():
            run = train(source, minutes, options, Path(folder) / name)
            keys = ("seconds", "epochs", "steps", "knn", "knn_untrained", "knn_pixels", "num_train", "num_val")
            results["models"][name] = {key: run.figures[key] for key in keys}
            environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
            trained[name] = torchmae.load(run.path)
    results["environment"] = {key: environment[key] for key in ("torchmae", "torch", "processor", "threads")}
    test = open_splits(source)["test"]
    arrays = [test.read(int(index)) for index in mixed_subset(len(test), HELD_OUT)]
    images = trained["vit"].preprocess(*arrays)  # all three have the same normalisation
    patches = trained["vit"].mask(len(images), strategy="random", ratio=PATCH_RATIO)
    hidden = trained["vit"].model.removed_pixels(patches)
    for name in PIXEL_MODELS:
        model = trained[name]
        common = patches if name == "vit" else hidden.expand_as(images).flatten(1)
        results["models"][name]["patches"] = figures(model, images, common)
        results["models"][name]["own"] = figures(model, images, patches if name == "vit" else model.mask(len(images)))
    results["models"]["vit_norm_pix"]["own"] = {"hidden": results["models"]["vit"]["own"]["hidden"]}
    results["held_out"] = len(images)
    results["losses"] = losses(trained, images)
    draw_all(trained, images, patches, hidden)
    return results


def train(source: str, minutes: float, options: dict[str, Any], out: Path) -> Any:
    """One run of a recipe, on all training images, for so many minutes of training."""
    options = {**options, "data": {"source": source, "val": "test", **options.get("data", {})}}
    once = {"count": 1, "knn_count": 1}
    return torchmae.pretrain(**options, max_minutes=minutes, eval=once, out=out, progress="plain")


def figures(model: Pretrained, images: Tensor, mask: Any) -> dict[str, float]:
    """Errors on what the mask hides, beside the predictors that need no learning, and how much it hides."""
    runtime = open_runtime("cpu", "fp32", None)
    share = model.mask.removed_pixels(model.patch_size, model.encoder.input_size).double().mean().item()
    return {"hidden": share, **HoldOut(model.model, [(images, mask)], runtime).run()}


@torch.no_grad()
def losses(trained: dict[str, Pretrained], images: Tensor) -> dict[str, dict[str, float]]:
    """Squared errors of the tutorial's models under their own masks, and of two programs that learn nothing.

    "copy" hands its input on, ReLU(X * M); "floor" is the best output that is never negative, ReLU(X).
    """
    target = images.flatten(1)
    masks = {name: trained[name].mask(len(images)) for name in ("literal", "corrected")}
    masks["copy"] = masks["floor"] = masks["literal"]
    outputs = {name: trained[name].model(images, masks[name]).pred for name in ("literal", "corrected")}
    outputs["copy"] = target.masked_fill(masks["copy"], 0).relu()
    outputs["floor"] = target.relu()
    result = {}
    for name, output in outputs.items():
        mask, error = masks[name], (output - target).double().square()
        hidden = error[mask].mean().item()
        result[name] = {
            "share": mask.double().mean().item(),
            "all": error.mean().item(),
            "visible": error[~mask].mean().item(),
            "hidden": hidden,
            "explained_variance": 1 - hidden / target[mask].double().var(unbiased=False).item(),
            "below_zero": (output < 0).double().mean().item(),
            "silent": (output == 0).all(0).double().mean().item(),
        }
    result["data"] = {"below_zero": (target < 0).double().mean().item()}
    return result


@torch.no_grad()
def draw_all(trained: dict[str, Pretrained], images: Tensor, patches: Any, hidden: Tensor) -> None:
    """Two pictures: all models under one mask; and what the tutorial's program puts out under its own."""
    few, removed = images[:SHOWN], hidden[:SHOWN]
    elements = removed.expand_as(few).flatten(1)
    some = type(patches)(*(ids[:SHOWN] for ids in patches))
    columns: list[Column] = [("masked", few, removed), ("interpolated", interpolate(few, removed), None)]
    columns += [(name, trained[name].reconstruct(few, elements).images, None) for name in ("literal", "corrected")]
    columns.append(("ViT-MAE", trained["vit"].reconstruct(few, some).images, None))
    draw([*columns, ("original", few, None)], PICTURES / "tutorial-patches.png")
    columns = []
    for name in ("literal", "corrected"):
        mask = trained[name].mask(SHOWN)
        columns.append((f"{name}: input", few.flatten(1).masked_fill(mask, 0).view_as(few), None))
        columns.append(("output", trained[name].model(few, mask).pred.view_as(few), None))
    columns += [("best ReLU", few.relu(), None), ("original", few, None)]
    draw(columns, PICTURES / "tutorial-outputs.png")


def draw(columns: Sequence[Column], path: Path) -> None:
    """Images in labelled columns, each pixel enlarged to a square; what is hidden is grey."""
    scale, gap, top = 5, 10, 30
    font = ImageFont.load_default(18)
    count, _, height, width = columns[0][1].shape
    step = width * scale + gap
    size = (len(columns) * step - gap, top + count * (height * scale + gap) - gap)
    picture = Image.new("RGBA", size, (255, 255, 255, 0))
    pen = ImageDraw.Draw(picture)
    for number, (label, images, removed) in enumerate(columns):
        pen.text((number * step + width * scale / 2, 4), label, fill=LABEL_COLOUR, font=font, anchor="ma")
        pixels = (Normalisation(HALF, HALF).shown(images).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).clone()
        if removed is not None:
            pixels[removed[:, 0]] = torch.tensor(HIDDEN_GREY, dtype=torch.uint8)
        for row, image in enumerate(pixels):
            enlarged = Image.fromarray(image.numpy()).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            picture.paste(enlarged, (number * step, top + row * (height * scale + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def cells(columns: Sequence[dict[str, Any]], form: str, *keys: str) -> list[str]:
    """One row of a table: the same figure of every column, "–" where a column has none."""
    row = []
    for column in columns:
        value: Any = column
        for key in keys:
            value = value.get(key, {})
        row.append("–" if value == {} else form.format(value))
    return row


def comparison(models: dict[str, Any]) -> list[list[str]]:
    """All models, side by side: the rows of "tutorial-table"."""
    columns = [models[name] for name in MODELS]
    return [
        [f"`{options['recipe']}`" for options in MODELS.values()],
        cells(columns, "{:.0f} s", "seconds"),
        cells(columns, "{:.1f}", "epochs"),
        cells(columns, "{:.0%}", "own", "hidden"),
        cells(columns, "{:.3f}", "own", "explained_variance"),
        cells(columns, "{:.3f}", "own", "explained_variance_interpolation"),
        cells(columns, "**{:.3f}**", "patches", "explained_variance"),
        cells(columns, "{:.3f}", "patches", "explained_variance_interpolation"),
        cells(columns, "{:.1f}%", "knn"),
        cells(columns, "{:.1f}%", "knn_untrained"),
        cells(columns, "{:.1f}%", "knn_pixels"),
    ]


def defects(programs: dict[str, Any]) -> list[list[str]]:
    """Where the errors of the tutorial's programs are: the rows of "tutorial-defects"."""
    columns = [programs[name] for name in ("literal", "copy", "floor", "corrected", "data")]
    return [
        cells(columns, "{:.1%}", "share"),
        cells(columns, "{:.1%}", "below_zero"),
        *(cells(columns, "{:.4f}", key) for key in ("all", "visible", "hidden")),
        cells(columns, "{:.3f}", "explained_variance"),
        cells(columns, "{:.1%}", "silent"),
    ]


def fill(page: str, name: str, rows: Sequence[Sequence[str]], caption: str) -> str:
    """Puts rows into the table between the markers `name`; heads and labels are the page's, in its own language."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = page.split(start)
    block, after = rest.split(end)
    head, rule, *body = [line for line in block.splitlines() if line.startswith("|")]
    labels = [line.split("|")[1].strip() for line in body]
    lines = [f"| {' | '.join([label, *row])} |" for label, row in zip(labels, rows, strict=True)]
    return "\n".join([f"{before}{start}", head, rule, *lines, "", f"*{caption}*", f"{end}{after}"])


def render(results: dict[str, Any], page: str) -> str:
    """A page with its tables filled."""
    env = results["environment"]
    where = f"{env['processor']}; {env['threads']} threads; torch {env['torch']}, torchmae {env['torchmae']}"
    counts = f"{results['models']['literal']['num_train']:,} + {results['held_out']:,} images"
    caption = f"{results['title']}, {counts}; {where}; {results['date']}"
    page = fill(page, "tutorial-defects", defects(results["losses"]), caption)
    return fill(page, "tutorial-table", comparison(results["models"]), caption)


if __name__ == "__main__":
    main()
