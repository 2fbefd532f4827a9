"""What was trained, on what and for how long: a run in words and round numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from torchmae.report.run import Run
from torchmae.report.verdict import finite

# What the data and the points of its grid are called, by the number of spatial dimensions.
_KINDS = {1: ("signals", "samples"), 2: ("images", "pixels"), 3: ("volumes", "voxels")}
_DEVICES = {"cpu": "the CPU", "mps": "an Apple GPU"}


def title(run: Run) -> str:
    """A short name of the run: the network and the last part of the data's name."""
    return " on ".join(part for part in (_preset(run), Path(_data(run)).name) if part)


def describe(run: Run) -> str:
    """What was trained, in one sentence."""
    shape, patch = input_size(run), patch_size(run)
    items, points = _KINDS.get(len(shape), _KINDS[2])
    preset = f" ({_preset(run)})" if _preset(run) else ""
    num_train = finite(run.summary, "num_train")
    count = f"{num_train:,.0f} {items}" if num_train else f"the {items}"
    size = f" ({_product(shape)} {points})" if shape else ""
    hidden = f"{_product(patch)}-{points.removesuffix('s')} patches" if patch else hidden_unit(run)
    share = _hidden_share(run)
    hiding = "" if share is None else f", with {100 * share:.0f}% of their {hidden} hidden"
    return f"A masked autoencoder{preset} was pre-trained on {count} from {_data(run)}{size}{hiding}{_extent(run)}."


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The run in figures: (name, figure, remark); what is unknown is left out."""
    num_val = latest(run, "num_val")
    decoder = latest(run, "params_decoder")
    seen = latest(run, "images_seen")
    speed = latest(run, "images_per_s")
    rows = (
        ("Training set", latest(run, "num_train"), "{:,.0f}".format, f"{num_val:,.0f} held out" if num_val else ""),
        (
            "Encoder parameters",
            latest(run, "params_encoder"),
            short_count,
            f"decoder {short_count(decoder)}" if decoder else "",
        ),
        ("Steps", _steps(run), "{:,.0f}".format, f"{short_count(seen)} images seen" if seen else ""),
        ("Training time", latest(run, "seconds"), duration, f"{speed:,.0f} images per second" if speed else ""),
    )
    return [(name, show(value), remark) for name, value, show, remark in rows if value is not None]


def state(run: Run) -> str:
    """A sentence for a run that has not finished; empty for one that has."""
    if is_finished(run):
        return ""
    steps = _steps(run)
    reached = f"at step {steps:,.0f}" if steps else "before its first figures"
    if run.summary.get("state") == "interrupted":
        return f"This run was interrupted {reached}. What follows is what it had by then."
    return f"This run has not finished: it stands {reached}, or was stopped there. What follows is what it has so far."


def is_finished(run: Run) -> bool:
    """Whether the run came to its planned end."""
    return run.summary.get("state") == "finished"


def hidden_unit(run: Run) -> str:
    """What is hidden: patches, or single values by a model without patches."""
    return "values" if run.summary.get("patch_size") == [] else "patches"


def input_size(run: Run) -> tuple[int, ...]:
    """Size of the model's input along each spatial axis; empty where unknown."""
    return _size(run, "input_size")


def patch_size(run: Run) -> tuple[int, ...]:
    """Size of a patch along each spatial axis; empty where unknown, or where single values are hidden."""
    return _size(run, "patch_size") if hidden_unit(run) == "patches" else ()


def setting(run: Run, section: str, name: str) -> Any:
    """A value of the configuration; None where it is missing or null."""
    values = run.config.get(section)
    return values.get(name) if isinstance(values, dict) else None


def yaml_text(value: object) -> str:
    """A value of the configuration as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def latest(run: Run, key: str) -> float | None:
    """A figure of the summary, or while there is none, of the last line of progress."""
    value = finite(run.summary, key)
    return finite(run.train[-1], key) if value is None and run.train else value


def duration(seconds: float) -> str:
    """A time for people: 4.1 s, 47 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short_count(count: float) -> str:
    """A count in three digits: 950, 12.3k, 5.41M, 1.2G."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{letter}"
    return f"{count:.0f}"


def _steps(run: Run) -> float | None:
    return latest(run, "steps") or latest(run, "step")


def _extent(run: Run) -> str:
    """How long, on what: ", for 100 epochs in 47 s on the CPU"."""
    epochs = latest(run, "epochs") or latest(run, "epoch")
    seconds = latest(run, "seconds")
    if epochs is None or seconds is None:
        return ""
    device = run.environment.get("device")
    where = f" on {_DEVICES.get(str(device), device)}" if device else ""
    rounded = f"{epochs:.3g}"
    return f", for {rounded} {'epoch' if rounded == '1' else 'epochs'} in {duration(seconds)}{where}"


def _preset(run: Run) -> str:
    return str(run.summary.get("preset") or setting(run, "model", "preset") or "")


def _data(run: Run) -> str:
    return str(run.summary.get("data") or setting(run, "data", "source") or "unknown data")


def _hidden_share(run: Run) -> float | None:
    ratio = run.summary.get("mask_ratio", setting(run, "mask", "ratio"))
    if not isinstance(ratio, (int, float)):
        return None
    return 1 - ratio if str(setting(run, "mask", "strategy")).endswith("_inverted") else ratio


def _size(run: Run, name: str) -> tuple[int, ...]:
    value = run.summary.get(name) or setting(run, "model", name)
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _product(sizes: Sequence[int]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(str(size) for size in sizes)
