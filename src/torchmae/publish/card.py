"""Model cards: the README.md of an export, with the facts about the training and how to load the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchmae
from torchmae.errors import CheckpointError
from torchmae.nn.classifier import Classifier
from torchmae.nn.mae import parameter_counts
from torchmae.publish.exports import Check, Exported, Format
from torchmae.report.metrics import BASELINES, METRICS
from torchmae.report.run import Run, duration, load_run, short_count
from torchmae.training.saved_model import Description
from torchmae.words import in_words


def model_card(run: Path, exported: Exported, written: Format, check: Check, data_licence: str | None) -> str:
    """The card in Markdown: the model, how to use the files, how it was trained, its figures and the check."""
    try:
        known = load_run(run)
    except CheckpointError:  # weights of another library, or an export
        known = None
    what, task = "Masked autoencoder", "image-feature-extraction"
    if isinstance(exported.model, Classifier):
        what, task = "Image classifier", "image-classification"
    data = _data_name(known)
    description, kind = exported.description, exported.samples
    sections = [
        f"---\nlibrary_name: {written.library}\npipeline_tag: {task}\n"
        "tags:\n- masked-autoencoder\n- self-supervised-learning\n- torchmae\n---\n",
        f"# {what}, trained on {_plain(data)}\n" if data else f"# {what}\n",
        in_words(f"{_summary(exported, written)}\n", kind),
        "## Use\n\n`FOLDER` is the folder of this file. "
        + in_words(f"Images are {_scaled(exported)}; then the mean ", kind)
        + f"({', '.join(f'{value:.4g}' for value in description.mean)}) is subtracted and the result is divided by "
        f"({', '.join(f'{value:.4g}' for value in description.std)}), for each channel{_bands(exported)}.\n\n"
        f"```python\n{written.usage(exported)}```\n",
        f"## Training\n\n{_training(known, exported, data_licence)}\n",
    ]
    figures = _figures(known)
    if figures:
        sections.append(in_words(f"## Figures\n\n{figures}\n", kind))
    if exported.classes:
        listed = "\n".join(f"{i}. {_plain(name)}" for i, name in enumerate(exported.classes))
        sections.append(f"## Classes\n\n{listed}\n")
    remarks = "".join(f"- {_plain(note)}\n" for note in exported.notes)
    if remarks:
        sections.append(f"## Notes\n\n{remarks}")
    sections.append(
        f"## Check\n\nAfter writing, these files were compared with the model they were made from: {check}. "
        f"Written by torchmae {torchmae.__version__}.\n"
    )
    return "\n".join(sections)


def _scaled(exported: Exported) -> str:
    """How stored values are scaled before the mean is subtracted."""
    normalised = exported.description.normalisation
    if normalised.normalise == "sample":
        return "normalised one by one, each channel to mean 0 and deviation 1"
    scaled = "scaled to [0, 1]"
    if normalised.scale is not None and set(normalised.scale.values()) == {1.0}:
        scaled = "taken as they are, in the unit of the training data"
    elif normalised.scale is not None and set(normalised.scale) != {"uint8"}:
        scaled = " or ".join(f"{kind} divided by {one:g}" for kind, one in normalised.scale.items())
    if normalised.limits is None:
        return scaled
    low, high = (", ".join(f"{value:.4g}" for value in ends) for ends in normalised.limits)
    return f"{scaled}; values below ({low}) and above ({high}) are clipped"


def _bands(exported: Exported) -> str:
    """The names of the channels, where known."""
    bands = exported.description.bands if isinstance(exported.description, Description) else None
    return f" ({_plain(', '.join(bands))})" if bands else ""


def _summary(exported: Exported, written: Format) -> str:
    model = exported.model
    encoder = exported.encoder
    if not encoder.patch_size:
        return "A masked autoencoder without patches, fully connected."
    patch, size = (" x ".join(map(str, sizes)) for sizes in (encoder.patch_size, encoder.input_size))
    block = (
        f"{len(encoder.blocks)} blocks of width {encoder.embed_dim}, patches of {patch} on inputs of {size} with "
        f"{encoder.in_chans} channels"
    )
    if isinstance(model, Classifier):
        return f"A {encoder.label} that was fine-tuned to tell {model.num_classes} classes apart: {block}."
    count, rest = parameter_counts(model)
    whole = written.holds.decoder or exported.part != "encoder"
    decoder = f", and a decoder of {short_count(rest)}" if whole else "; its decoder is not in these files"
    return (
        "A masked autoencoder ([He et al. 2021](https://arxiv.org/abs/2111.06377)): "
        f"a {encoder.label} of {short_count(count)} parameters ({block}){decoder}."
    )


def _training(known: Run | None, exported: Exported, data_licence: str | None) -> str:
    licence = f"Licence of the training data: {_plain(data_licence) if data_licence else 'not given'}."
    if known is None or not known.summary:
        return f"Nothing is known about the training.\n\n{licence}"
    summary, config = known.summary, known.config
    rows = {
        "data": f"{_data_name(known)}, {summary.get('num_train', 0):,} {exported.samples}s, "
        f"{summary.get('num_val', 0):,} held out",
        "recipe": config.get("recipe"),
        "weights at the start": _last_part(config.get("init_from")),
        "steps": f"{summary.get('steps', 0):,} of {config.get('batch_size')} {exported.samples}s"
        f" ({summary.get('epochs', 0.0):.4g} epochs, {duration(summary.get('seconds', 0.0))})",
        "target": summary.get("target"),
        "hidden": f"{100 * exported.mask_ratio:.0f}% of the patches, {summary.get('mask_strategy')}",
        "optimiser": (config.get("optim") or {}).get("name"),
        "seed": config.get("seed"),
        **{name: known.environment.get(name) for name in ("torchmae", "torch", "precision", "device")},
    }
    table = "\n".join(f"| {name} | {_plain(str(value))} |" for name, value in rows.items() if value is not None)
    return f"| | |\n|---|---|\n{table}\n\n{licence}"


def _figures(known: Run | None) -> str:
    """A table of the figures on held-out images, each with its baselines."""
    measured = known.figures if known else {}
    rows = []
    for name, metric in METRICS.items():
        if not metric.goal:
            continue
        words = {name: metric.heading}
        words |= {f"{name}_{key}": f"the same of {BASELINES[key]}" for key in metric.baselines}
        rows += [
            f"| {words[key]} | {metric.unit.cell(measured[key])} |" for key in words if metric.goal and key in measured
        ]
    return "\n".join(["| on held-out images | |", "|---|---:|", *rows]) if rows else ""


def _data_name(known: Run | None) -> str | None:
    data = known.config.get("data") if known is not None else None
    return _last_part(data.get("source")) if isinstance(data, dict) else None


def _last_part(path: Any) -> str | None:
    """The last part of a path; the rest may be private."""
    return Path(str(path)).name if path else None


def _plain(text: str) -> str:
    """Text as one line, without characters that have a meaning in Markdown."""
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())
