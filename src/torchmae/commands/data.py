"""`torchmae data`: what a data set holds, and packing it into files that are read fast."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from torchmae import settings
from torchmae.config import PackOptions, ReadOptions
from torchmae.errors import ConfigError, DataError, one_of, within
from torchmae.settings import read_options

if TYPE_CHECKING:
    from torchmae.data.inspecting import Inspection, SplitFacts
    from torchmae.data.sources import Source
    from torchmae.data.transforms import Normalisation

USAGE = """\
usage: torchmae data inspect DATA [OPTIONS]
       torchmae data pack DATA OUT [OPTIONS]

  inspect   count, sizes, channels, formats, broken files, duplicates, classes; a recipe that fits
  pack      write the images into few large files (parquet, WebDataset shards or one array), once, to train fast

  torchmae data inspect my_images --sheet sheet.png
  torchmae data pack my_images packed --format parquet --max_size 320

  torchmae data inspect --help, torchmae data pack --help    the options
"""

_SHOWN = 8  # sizes, classes, broken files and duplicates that are listed
_SHEET = 64  # images on a contact sheet
_PANEL = 128  # pixels of each


@dataclass(frozen=True)
class InspectOptions(ReadOptions):
    """What to look at.

    Attributes:
        json: print everything that was found as one JSON object, and nothing else.
        sheet: where to save a contact sheet, a PNG picture of 64 images; null: nowhere.
        limit: how many images of each split to read, evenly spread; null: all.
        progress: "auto" (a bar on a terminal, else lines), "plain" or "none".
    """

    json: bool = False
    sheet: str | None = None
    limit: int | None = None
    progress: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("limit", self.limit, 1, float("inf"))
        one_of("progress", self.progress, ("auto", "plain", "none"))
        if self.sheet is not None and not self.sheet.lower().endswith(".png"):
            raise ConfigError(f"sheet is {self.sheet!r}", "give a name that ends in .png")


def main(args: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    one_of("the word after `torchmae data`", args[0], ("inspect", "pack"))
    return (inspect if args[0] == "inspect" else pack)(args[1:])


def inspect(args: Sequence[str]) -> int:
    """`torchmae data inspect`."""
    parser = _parser("inspect DATA", "Reads every image of a data set and says what is there, and what is wrong.")
    parser.add_argument("data", type=str, help="anything that `torchmae pretrain --data` takes")
    words = list(args)
    as_json = settings.take_flag(words, "json")
    values, options = read_options(parser, [*_as_here(words), f"--json={json.dumps(as_json)}"], InspectOptions)
    from torchmae.data.formats import Context
    from torchmae.data.inspecting import inspect_splits
    from torchmae.data.layouts import open_splits
    from torchmae.data.sources import data_line
    from torchmae.training.progress import Display

    display = Display(options.progress)
    try:
        splits = open_splits(values.data, Context.of(options, progress=display.preparing))
        found = inspect_splits(splits, options.limit, display.preparing)
    finally:
        display.close()
    command = suggestion(values.data, found, options)
    print(json.dumps(_as_json(found, command)) if options.json else describe(found))
    if not options.json and (line := data_line(found.notes)):
        print(line)
    if command is None:
        raise DataError(f"nothing in {values.data} can be trained on: no image can be read", "see the reasons above")
    if options.sheet is not None:
        contact_sheet(splits["train"], Path(options.sheet), found.normalisation)
    if not options.json:
        print(*([f"contact sheet: {options.sheet}"] if options.sheet else []), f"to train on it: {command}", sep="\n")
    return 0


def pack(args: Sequence[str]) -> int:
    """`torchmae data pack`."""
    parser = _parser(
        "pack DATA OUT",
        "Writes the images of a data set into few large files. Each is read back before it counts; a command that was "
        "stopped goes on where it was when it is given again.",
    )
    parser.add_argument("data", type=str, help="anything that `torchmae pretrain --data` takes")
    parser.add_argument("out", type=str, help="a new folder")
    values, options = read_options(parser, _as_here(args), PackOptions)
    from torchmae.data.formats import Context
    from torchmae.data.layouts import open_splits
    from torchmae.data.packing import pack as run
    from torchmae.training.progress import Display

    display = Display(options.progress)
    try:
        splits = open_splits(values.data, Context.of(options, progress=display.preparing))
        packed = run(splits, Path(values.out), options, display.preparing)
    finally:
        display.close()
    for name, reason in packed.bad[:_SHOWN]:
        print(f"left out: {name}: {reason}")
    more = f", {len(packed.bad):,} unreadable ones left out (all in pack.json)" if packed.bad else ""
    resumed = f", {packed.resumed:,} of them were done already" if packed.resumed else ""
    files = f"{packed.files:,} file{'s' if packed.files != 1 else ''}"
    print(f"{values.out}  ({packed.images:,} images in {files}, {packed.nbytes / 1e6:,.1f} MB{more}{resumed})")
    print(
        f"to train on it: torchmae pretrain --data {quote(values.out)}{_axes_of_array(splits['train'], options.format)}"
    )
    return 0


def _as_here(words: Sequence[str]) -> list[str]:
    """Options with the names that they have here: messages say --data.axes, as it is for all other commands."""
    return [word.replace("--data.", "--", 1) if word.startswith("--data.") else word for word in words]


def _axes_of_array(source: Source, format: str) -> str:
    """The option that one array of such samples needs for its shape to have one reading."""
    from torchmae.data.arrays import sample_axes
    from torchmae.data.formats import Context
    from torchmae.errors import DataError

    if format != "npy":
        return ""
    with suppress(DataError):  # an image that cannot be read tells nothing
        item = source.open(0)
        axes = f" --data.axes={'ZYX'[-len(item.size) :] if len(item.size) != 1 else 'L'}C"
        with suppress(DataError):
            if sample_axes((*item.size, item.channels), Context(), "").channel_axis == len(item.size):
                return ""
        return axes
    return ""


def _parser(usage: str, description: str) -> settings.Parser:
    command = usage.partition(" ")[0]
    return settings.Parser(
        prog=f"torchmae data {command}",
        usage=f"torchmae data {usage} [OPTIONS]",
        description=description,
        allow_abbrev=False,
    )


def describe(found: Inspection) -> str:
    """The findings, for people."""
    lines: list[str] = []
    for split, facts in found.splits.items():
        lines += _describe_split(split, facts)
    groups, extra = len(found.duplicates), sum(len(group) - 1 for group in found.duplicates)
    if groups:
        lines.append(f"duplicates: {extra:,} with the same pixels as another image (in {groups:,} groups)")
        lines += [
            f"  {' = '.join(group[:4])}{' = ...' if len(group) > 4 else ''}" for group in found.duplicates[:_SHOWN]
        ]
        if found.leaked:
            lines.append(f"  {found.leaked:,} groups lie in more than one split: held-out figures will flatter")
    else:
        lines.append("duplicates: none")
    return "\n".join(lines)


def _describe_split(split: str, facts: SplitFacts) -> list[str]:
    read = "" if facts.examined == facts.images else f" ({facts.examined:,} of them read)"
    lines = [f"{split}: {facts.images:,} images{read}"]
    if facts.sizes:
        lines.append(f"  size      {_sizes(facts)}")
        lines.append(f"  channels  {_counts(facts.channels)}")
        lines.append(f"  values    {_counts(facts.dtypes)}, from {facts.low:g} to {facts.high:g}")
        lines.append(f"  format    {_counts(facts.formats)}")
    if facts.classes:
        known = {name: count for name, count in facts.classes.items() if name != "unlabelled"}
        lines.append(f"  classes   {_classes(known)}")
        if known and len(known) <= _SHOWN + 4:
            each = (f"{_one_line(name)} {count:,}" for name, count in facts.classes.items())
            lines.append(f"            {', '.join(each)}")
    cut = f", {facts.cut_short:,} of them cut short (--truncated keep reads such JPEGs)" if facts.cut_short else ""
    if facts.not_finite:
        cut += f", {facts.not_finite:,} with values that are not finite (--nodata nan puts the mean in such places)"
    lines.append(f"  corrupt   {len(facts.corrupt) or 'none'}{cut}")
    lines += [f"            {name}: {reason}" for name, reason in facts.corrupt[:_SHOWN]]
    if len(facts.corrupt) > _SHOWN:
        lines.append(f"            and {len(facts.corrupt) - _SHOWN:,} more (--json lists all)")
    return lines


def _classes(known: dict[str, int]) -> str:
    if not known:
        return "none: no image has a known label"
    few = sorted(known.items(), key=lambda item: item[1])
    (rare, low), (common, high) = few[0], few[-1]
    return f"{len(known):,}, of {low:,} ({_one_line(rare)}) to {high:,} ({_one_line(common)}) images"


def _one_line(name: str) -> str:
    from torchmae.errors import printable

    return printable(name.encode("utf-8", "surrogateescape"))


def _sizes(facts: SplitFacts) -> str:
    from torchmae.data.inspecting import median_size

    if len(facts.sizes) == 1:
        return f"all {'x'.join(map(str, next(iter(facts.sizes))))}"
    median = median_size(facts.sizes)
    same = [size for size in facts.sizes if len(size) == len(median)]
    low, high = (tuple(reduce(axis) for axis in zip(*same, strict=True)) for reduce in (min, max))
    texts = ["x".join(map(str, size)) for size in (low, high, median)]
    return f"{len(facts.sizes):,} different, from {texts[0]} to {texts[1]}, median {texts[2]} (height x width)"


def _counts(counter: Counter[Any]) -> str:
    if len(counter) == 1:
        return str(next(iter(counter)))
    return ", ".join(f"{value} ({count:,})" for value, count in counter.most_common(_SHOWN))


def suggestion(data: str, found: Inspection, options: ReadOptions) -> str | None:
    """The command to begin with, which reads the data as it was read here; None when no image can be read."""
    from torchmae.api import recommend
    from torchmae.data.inspecting import median_size

    sizes = found.splits["train"].sizes
    if not sizes:
        return None
    recipe, shape = recommend(median_size(sizes))
    words = ["torchmae", "pretrain", "--data", data, "--recipe", recipe]
    for item in fields(ReadOptions):
        value = getattr(options, item.name)
        if value != item.default:
            words.append(f"--data.{item.name}={value if isinstance(value, str) else json.dumps(value)}")
    for name, value in shape.items():
        words += [f"--model.{name}", json.dumps(value)]
    return " ".join(quote(word) for word in words)


def contact_sheet(source: Source, path: Path, normalisation: Normalisation | None) -> None:
    """Saves a picture of images evenly spread over a source; those that cannot be read are left blank.

    Args:
        source: the images.
        path: of the picture.
        normalisation: says which values are black and white; None: no image can be read.

    Raises:
        CheckpointError: it cannot be saved.
        ConfigError: no image can be drawn.
    """
    import numpy as np
    import torch
    from PIL import Image

    from torchmae.data.sources import evenly_spaced
    from torchmae.report.panels import sample_panels
    from torchmae.report.pictures import save_png

    indices = evenly_spaced(len(source), _SHEET)
    columns = int(np.ceil(np.sqrt(len(indices))))
    rows = -(-len(indices) // columns)
    step = _PANEL + 4
    sheet = Image.new("RGB", (columns * step - 4, rows * step - 4), "white")
    for place, index in enumerate(indices):
        try:
            image = source.read(int(index))
        except DataError:
            continue
        if normalisation is None or image.shape[-1] != len(normalisation.mean):
            continue
        stored = torch.from_numpy(np.moveaxis(image, -1, 0).copy())[None]
        values = normalisation.shown(normalisation.apply(stored))[0].numpy()
        panel = sample_panels([values], 1 if values.ndim > 2 else _PANEL)[0]
        small = max(panel.size) < _PANEL // 2
        factor = _PANEL // max(panel.size) if small else _PANEL / max(panel.size)
        size = tuple(max(1, round(length * factor)) for length in panel.size)
        panel = panel.resize((size[0], size[1]), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)
        row, column = divmod(place, columns)
        corner = (column * step + (_PANEL - size[0]) // 2, row * step + (_PANEL - size[1]) // 2)
        sheet.paste(panel, corner)
    save_png(sheet, path)


def _as_json(found: Inspection, command: str | None) -> dict[str, Any]:
    return {
        "splits": {split: facts.as_json() for split, facts in found.splits.items()},
        "duplicates": found.duplicates,
        "leaked": found.leaked,
        "notes": list(found.notes),
        "suggestion": command,
    }
