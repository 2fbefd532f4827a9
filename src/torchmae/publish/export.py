"""EXPORTS, the export formats. An export is written, read back with the library it is for, and compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from torchmae.config.export import ExportOptions
from torchmae.errors import CheckpointError, ConfigError, TorchmaeError, reason_of
from torchmae.files import flush, locked
from torchmae.nn import ENCODERS
from torchmae.paths import user_path
from torchmae.publish import huggingface, official, onnx, own, timm
from torchmae.publish.card import model_card
from torchmae.publish.exports import TOLERANCE, Check, Exported, Format, Holds
from torchmae.training.pretrained import load
from torchmae.training.saved_classifier import is_classifier, load_classifier

_MAE = Holds(("vit",), as_published=True, decoder="published", classifiers=False)
_VIT = Holds(("vit",), as_published=True, classifiers=False)
_GRAPH = Holds(tuple(ENCODERS), images=False, parts=("encoder", "reconstruction"))

EXPORTS = {
    "timm": Format(timm.write, timm.check, timm.usage, "timm", Holds(("vit", "convnext"))),
    "hf-mae": Format(huggingface.write_mae, huggingface.check_mae, huggingface.mae_usage, "transformers", _MAE),
    "hf-vit": Format(huggingface.write_vit, huggingface.check_vit, huggingface.vit_usage, "transformers", _VIT),
    "official": Format(official.write, official.check, official.usage, "torchmae", _MAE),
    "onnx": Format(onnx.write, onnx.check, onnx.usage, "onnx", _GRAPH),
    "safetensors": Format(own.write, own.check, own.usage, "torchmae", Holds(None, images=False, decoder="any")),
}
"""The export formats, by their names for --to; each has a file in this package."""

_FILES = (".onnx", ".pth", ".pt", ".bin", ".safetensors")


class Export(NamedTuple):
    """A finished export: its folder, its files, the comparison with the model, and notes about what was left out."""

    path: Path
    files: tuple[str, ...]
    check: Check
    notes: tuple[str, ...]


def export(run: str | Path, out: str | Path, options: ExportOptions) -> Export:
    """Writes a model into the new folder `out`, in the format `options.to`, with a model card (README.md).

    `run` is a run folder, a fine-tuned classifier's folder, or anything that `torchmae.load` takes. The folder appears
    only when its content was compared with the model.

    Raises:
        ConfigError: a model that the format cannot hold, a folder that exists, or a missing library.
        CheckpointError: a model that cannot be read, a folder that cannot be written, or a check that did not pass.
    """
    path, target = user_path(out), EXPORTS[options.to]
    check_out(path)
    if options.part not in target.holds.parts:
        raise ConfigError(f"part is {options.part!r}, but {options.to} holds whole models", "leave --part out")
    exported = open_model(run, options)
    if problem := target.holds.refusal(exported):
        holding = {name: other.holds for name, other in EXPORTS.items() if options.part in other.holds.parts}
        others = [name for name, holds in holding.items() if not holds.refusal(exported)]
        fix = f"use --to {', '.join(others)}" if others else "leave --part out"
        raise ConfigError(f"{options.to} cannot hold this model: it has {problem}", fix)
    with whole_or_nothing(path) as writing:
        target.write(writing, exported)
        check = read_back(writing, options.to, exported)
        if not check.passed:
            raise CheckpointError(
                f"the export was deleted, since it is not the model: {check}, more than {TOLERANCE}",
                "please report this with the output of torchmae --version",
            )
        card = model_card(user_path(run), exported, target, check, options.data_licence)
        (writing / "README.md").write_text(card, encoding="utf-8")
    return Export(path, tuple(sorted(item.name for item in path.iterdir())), check, exported.notes)


def check_out(path: Path) -> None:
    """Raises ConfigError unless `path` can become a new folder."""
    if path.suffix in _FILES:
        raise ConfigError(f"out is {str(path)!r}", "an export is a folder of files: give a name without suffix")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} exists already", "remove it, or choose another --out")


def open_model(run: str | Path, options: ExportOptions) -> Exported:
    """Opens a run, a classifier, or weights of another library."""
    path = user_path(run)
    if is_classifier(path):
        classifier, known = load_classifier(path)
        return Exported(classifier, known, options.part, _scale_notes(known.scale), classes=known.classes)
    opened = load(path, target=options.target)
    about, ratio = opened.description, float(opened.description.mask.get("ratio", 0.75))
    return Exported(opened.model, about, options.part, (*opened.notes, *_scale_notes(about.scale)), ratio)


def _scale_notes(scale: Mapping[str, float] | None) -> tuple[str, ...]:
    """A note if the types of the training images were divided by different values."""
    if scale is None or len(set(scale.values())) < 2:
        return ()
    top = max(scale, key=scale.__getitem__)
    others = " and ".join(f"{kind} by {scale[top] / one:g}" for kind, one in scale.items() if one < scale[top])
    return (f"one scale serves all types: multiply {others} to get values as of {top}",)


def read_back(folder: Path, to: str, exported: Exported) -> Check:
    """Compares the written files with the model; CheckpointError: their library cannot load them."""
    try:
        return EXPORTS[to].check(folder, exported)
    except TorchmaeError:
        raise
    except Exception as error:  # whatever another library raises
        raise CheckpointError(
            f"the export was deleted, since {to} cannot be read back: {reason_of(error)}",
            "please report this with the output of torchmae --version",
        ) from error


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` at the end, or removed after an error.

    ConfigError: another process writes there. CheckpointError: the disk is full or cannot be written.
    """
    writing = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{writing.name}.lock")):
            check_out(path)  # another command may have written it by now
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir()
            try:
                yield writing
                for item in (*writing.iterdir(), writing):
                    flush(item)
                if path.exists():
                    path.rmdir()  # empty
                writing.rename(path)
                flush(path.parent)
            finally:
                shutil.rmtree(writing, ignore_errors=True)
    except BlockingIOError as error:
        raise ConfigError(f"another command is writing {path}", "wait for it, or choose another --out") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {reason_of(error)}", "free space or mend the folder") from error
