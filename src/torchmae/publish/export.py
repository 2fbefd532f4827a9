"""Writes a model in another library's format, reads it back with that library, and compares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from torchmae.config.export import ExportOptions
from torchmae.errors import CheckpointError, ConfigError, TorchmaeError, reason_of
from torchmae.interop import huggingface, official, onnx, timm
from torchmae.interop.exports import TOLERANCE, Check, Exported
from torchmae.nn.classifier import Classifier
from torchmae.paths import user_path
from torchmae.publish.card import model_card
from torchmae.training.pretrained import load
from torchmae.training.saved_classifier import ClassifierDescription, is_classifier, load_classifier, save_classifier
from torchmae.training.saved_model import Description, load_model, write_description, write_weights

_FILES = (".onnx", ".pth", ".pt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: the folder.
        files: in it.
        check: how what was written compares with the model.
        notes: what was left out or adapted, a sentence each.
    """

    path: Path
    files: tuple[str, ...]
    check: Check
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A model to export, and its description as torchmae's own folders have it."""

    exported: Exported
    description: Description | ClassifierDescription
    notes: tuple[str, ...]


def export(run: str | Path, out: str | Path, options: ExportOptions) -> Export:
    """Writes a model into a new folder, in another library's format, with a model card (README.md).

    The folder is there whole, its content compared with the model, or not at all.

    Args:
        run: a run folder, a fine-tuned classifier's folder, or whatever `torchmae.load` takes.
        out: the folder to make.
        options: the format.

    Raises:
        ConfigError: a model that the format cannot hold, a folder that exists, or a library that is missing.
        CheckpointError: a model that cannot be read, a folder that cannot be written, or a check that did not pass;
            nothing is left then.
    """
    path = user_path(out)
    check_out(path)
    opened = open_model(run, options.target)
    with whole_or_nothing(path) as writing:
        write(writing, options, opened)
        check = read_back(writing, options, opened.exported)
        if not check.passed:
            raise CheckpointError(
                f"the export was deleted, since it is not the model: {check}, more than {TOLERANCE}",
                "please report this with the output of torchmae --version",
            )
        card = model_card(user_path(run), opened.exported, options, check, opened.notes)
        (writing / "README.md").write_text(card, encoding="utf-8")
    return Export(path, tuple(sorted(item.name for item in path.iterdir())), check, opened.notes)


def check_out(path: Path) -> None:
    """ConfigError unless `path` can become a new folder."""
    if path.suffix in _FILES:
        raise ConfigError(f"out is {str(path)!r}", "an export is a folder of files: give a name without suffix")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} exists already", "remove it, or choose another --out")


def open_model(run: str | Path, target: str | None) -> Opened:
    """Opens a run, a classifier, or weights of others."""
    path = user_path(run)
    if is_classifier(path):
        classifier, about = load_classifier(path)
        return Opened(Exported(classifier, about.mean, about.std, classes=about.classes), about, ())
    pretrained = load(path, target=target)
    description = pretrained.description
    ratio = float(description.mask.get("ratio", 0.75))
    return Opened(
        Exported(pretrained.model, description.mean, description.std, ratio, scale=description.scale),
        description,
        pretrained.notes,
    )


def write(folder: Path, options: ExportOptions, opened: Opened) -> None:
    """Writes the files of a format."""
    exported, to = opened.exported, options.to
    if to == "timm":
        timm.write(folder, exported)
    elif to == "hf-mae":
        huggingface.write_mae(folder, exported)
    elif to == "hf-vit":
        huggingface.write_vit(folder, exported)
    elif to == "official":
        official.write(folder, exported)
    elif to == "onnx":
        onnx.write(folder, exported, options.part)
    elif isinstance(exported.model, Classifier):
        assert isinstance(opened.description, ClassifierDescription)
        save_classifier(folder, exported.model, opened.description)
    else:
        assert isinstance(opened.description, Description)
        if exported.model.decoder.absent:
            reason, _ = exported.model.decoder.absent
            raise ConfigError(f"{to} is a whole model: {reason}", "export the encoder with --to timm")
        write_description(folder / "model.json", opened.description)
        write_weights(folder / "model.safetensors", exported.model.state_dict())


def read_back(folder: Path, options: ExportOptions, exported: Exported) -> Check:
    """As `compare_written`; CheckpointError for files that the library they are for does not load."""
    try:
        return compare_written(folder, options, exported)
    except TorchmaeError:
        raise
    except Exception as error:  # whatever another library raises
        raise CheckpointError(
            f"the export was deleted, since {options.to} cannot be read back: {reason_of(error)}",
            "please report this with the output of torchmae --version",
        ) from error


def compare_written(folder: Path, options: ExportOptions, exported: Exported) -> Check:
    """Reads what was written and compares it with the model."""
    to = options.to
    if to == "timm":
        return timm.check(folder, exported)
    if to == "hf-mae":
        return huggingface.check_mae(folder, exported)
    if to == "hf-vit":
        return huggingface.check_vit(folder, exported)
    if to == "official":
        return official.check(folder, exported)
    if to == "onnx":
        return onnx.check(folder, exported, options.part)
    again = load_classifier(folder)[0] if isinstance(exported.model, Classifier) else load_model(folder)[0]
    ours, theirs = exported.model.state_dict(), again.state_dict()
    differences = [(ours[name].double() - theirs[name].double()).abs().max().item() for name in ours]
    largest = max(tensor.abs().max().item() for tensor in ours.values())
    return Check("read back", "weights", max(differences), largest)


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name `path` at the end; it is removed when something goes wrong.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    writing = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        yield writing
        for item in writing.iterdir():
            _flush(item)
        _flush(writing)
        if path.exists():
            path.rmdir()  # empty, or this fails
        writing.rename(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {reason_of(error)}", "free space or mend the folder") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
