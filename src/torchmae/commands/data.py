"""`torchmae data`: inspects a data set, or packs it into a few large files, which are read faster."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from torchmae.api import recommend
from torchmae.commands import print_json
from torchmae.config import ReadOptions
from torchmae.config.data import InspectOptions, PackCommand, PackOptions
from torchmae.data.arrays import sample_axes
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.packing import pack as write_packed
from torchmae.data.reading import Inspection, SplitFacts, inspect_splits, kind_of_data, median_size
from torchmae.data.sources import Source, data_line, evenly_spaced
from torchmae.data.transforms import Normalisation
from torchmae.errors import DataError, printable
from torchmae.report.panels import sample_panels
from torchmae.report.pictures import save_png
from torchmae.training.progress import Display

_SHOWN = 8  # listed sizes, classes, unreadable files and duplicates
_BANDS = 16  # listed channels
_SHEET = 64  # images on a contact sheet
_PANEL = 128  # pixels of an image on it


def inspect(options: InspectOptions) -> int:
    """`torchmae data inspect`; returns the exit status."""
    with closing(Display(options.progress)) as display:
        splits = open_splits(options.data, Context.of(options, progress=display.preparing))
        found = inspect_splits(splits, options.limit, display.preparing)
    command = suggestion(options.data, found, options)
    if options.json:
        record = {
            "splits": {split: facts.as_json() for split, facts in found.splits.items()},
            "duplicates": found.duplicates,
            "leaked": found.leaked,
            "notes": list(found.notes),
            "kind": kind_of_data(found.splits["train"]) if command else None,
            "proposals": {name: {"value": value, "why": why} for name, (value, why) in found.proposals.items()},
            "suggestion": command,
        }
        print_json(options.json, record)
    else:
        proposed = [f"proposed: --data.{name}={value}  ({why})" for name, (value, why) in found.proposals.items()]
        print(describe(found), *filter(None, [data_line(found.notes)]), *proposed, sep="\n")
    if command is None:
        raise DataError(f"nothing in {options.data} can be trained on: no image can be read", "see the reasons above")
    if options.sheet is not None:
        contact_sheet(splits["train"], Path(options.sheet), found.normalisation)
    if not options.json:
        print(*([f"contact sheet: {options.sheet}"] if options.sheet else []), f"to train on it: {command}", sep="\n")
    return 0


def pack(command: PackCommand, options: PackOptions) -> int:
    """`torchmae data pack`; returns the exit status."""
    with closing(Display(options.progress)) as display:
        splits = open_splits(command.data, Context.of(options, progress=display.preparing))
        packed = write_packed(splits, Path(command.out), options, display.preparing)
    for name, reason in packed.bad[:_SHOWN]:
        print(f"left out: {name}: {reason}")
    more = f", {len(packed.bad):,} unreadable images left out (listed in pack.json)" if packed.bad else ""
    resumed = f", {packed.resumed:,} of them packed by an earlier command" if packed.resumed else ""
    files = f"{packed.files:,} file{'s' if packed.files != 1 else ''}"
    print(f"{command.out}  ({packed.images:,} images in {files}, {packed.nbytes / 1e6:,.1f} MB{more}{resumed})")
    axes = _axes_of_array(splits["train"]) if options.format == "npy" else ""
    print(f"to train on it: torchmae pretrain --data {quote(command.out)}{axes}")
    return 0


def _axes_of_array(source: Source) -> str:
    """The option --data.axes for a packed array whose shape is ambiguous; else empty."""
    with suppress(DataError):  # the first image cannot be read
        item = source.open(0)
        dims = len(item.size)
        with suppress(DataError):  # the shape is ambiguous
            if sample_axes((*item.size, item.channels), Context(), "")[0] == dims:
                return ""
        return f" --data.axes={'ZYX'[-dims:] if dims != 1 else 'L'}C"
    return ""


def describe(found: Inspection) -> str:
    """The result of an inspection as text."""
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
            lines.append(
                f"  {found.leaked:,} groups lie in more than one split: held-out metrics will be too optimistic"
            )
    else:
        lines.append("duplicates: none")
    return "\n".join(lines)


def _describe_split(split: str, facts: SplitFacts) -> list[str]:
    read = "" if facts.examined == facts.images else f" ({facts.examined:,} of them read)"
    lines = [f"{split}: {facts.images:,} images{read}"]
    if facts.sizes:
        lines += [
            f"  size      {_sizes(facts)}",
            f"  channels  {_counts(facts.channels)}",
            f"  values    {_counts(facts.dtypes)}, from {facts.low:g} to {facts.high:g}",
            f"  format    {_counts(facts.formats)}",
        ]
    lines += [f"  seem      {kind_of_data(facts)}"] if facts.sizes else []
    lines += [f"  bands     {_one_line(', '.join(names))}" for names, _ in facts.bands.most_common(1)]
    names = next(iter(facts.bands), ())
    shown = [] if set(facts.dtypes) == {"uint8"} and len(facts.percentiles) <= 3 else facts.percentiles[:_BANDS]
    for i, (low, middle, high) in enumerate(shown):
        name = _one_line(names[i]) if i < len(names) else f"channel {i + 1}"
        lines.append(f"  {name:<9} {low:g} to {high:g}, median {middle:g} (1st to 99th percentile)")
    lines += [f"  files say {_one_line(_counts(facts.said))}"] if facts.said else []
    if facts.classes:
        known = {name: count for name, count in facts.classes.items() if name != "unlabelled"}
        lines.append(f"  classes   {_classes(known)}")
        if known and len(known) <= _SHOWN + 4:
            each = (f"{_one_line(name)} {count:,}" for name, count in facts.classes.items())
            lines.append(f"            {', '.join(each)}")
    kinds = f", {facts.cut_short:,} of them cut short (--truncated keep reads such JPEGs)" if facts.cut_short else ""
    if facts.not_finite:
        kinds += f", {facts.not_finite:,} of them with values that are not finite (--nodata auto: no data)"
    lines.append(f"  corrupt   {len(facts.corrupt) or 'none'}{kinds}")
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
    return printable(name.encode("utf-8", "surrogateescape"))


def _sizes(facts: SplitFacts) -> str:
    if len(facts.sizes) == 1:
        return f"all {'x'.join(map(str, next(iter(facts.sizes))))}"
    median = median_size(facts.sizes)
    same = [size for size in facts.sizes if len(size) == len(median)]
    low, high = (tuple(reduce(axis) for axis in zip(*same, strict=True)) for reduce in (min, max))
    texts = ["x".join(map(str, size)) for size in (low, high, median)]
    order = " (height x width)" if len(median) == 2 else ""
    return f"{len(facts.sizes):,} different, from {texts[0]} to {texts[1]}, median {texts[2]}{order}"


def _counts(counter: Counter[Any]) -> str:
    if len(counter) == 1:
        return str(next(iter(counter)))
    return ", ".join(f"{value} ({count:,})" for value, count in counter.most_common(_SHOWN))


def suggestion(data: str, found: Inspection, options: ReadOptions) -> str | None:
    """A command that trains on the data with the same reading options; None if no image can be read."""
    sizes = found.splits["train"].sizes
    if not sizes:
        return None
    recipe, shape = recommend(median_size(sizes), found.splits["train"].example)
    words = ["torchmae", "pretrain", "--data", data, "--recipe", recipe]
    for name, value in options.changed().items():
        words.append(f"--data.{name}={value if isinstance(value, str) else json.dumps(value)}")
    words += [f"--data.{name}={value}" for name, (value, _) in found.proposals.items() if name not in options.changed()]
    for name, value in shape.items():
        words += [f"--model.{name}", json.dumps(value)]
    return " ".join(quote(word) for word in words)


def contact_sheet(source: Source, path: Path, normalisation: Normalisation | None) -> None:
    """Saves a picture of evenly spaced images, scaled to the range of `normalisation`; unreadable ones stay blank.

    Raises:
        CheckpointError: the picture cannot be saved.
    """
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
        panel = ImageOps.scale(panel, max(1, _PANEL // max(panel.size)), Image.Resampling.NEAREST)
        panel.thumbnail((_PANEL, _PANEL))
        row, column = divmod(place, columns)
        sheet.paste(panel, (column * step + (_PANEL - panel.width) // 2, row * step + (_PANEL - panel.height) // 2))
    save_png(sheet, path)
