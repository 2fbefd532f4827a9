"""Model cards: the README.md of an export, with what is known of the training and how to load the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchmae
from torchmae.config.export import ExportOptions
from torchmae.errors import CheckpointError
from torchmae.interop import official, onnx, timm
from torchmae.interop.exports import Check, Exported
from torchmae.nn.classifier import Classifier
from torchmae.nn.mae import parameter_counts
from torchmae.report.metrics import BASELINES, CLASSIFIERS, METRICS, RECONSTRUCTION, final_figures
from torchmae.report.run import Run, duration, load_run, short_count

_FIGURES = (*RECONSTRUCTION, *CLASSIFIERS, "finetune")
_LIBRARY = {"timm": "timm", "hf-mae": "transformers", "hf-vit": "transformers", "onnx": "onnx"}


def model_card(run: Path, exported: Exported, options: ExportOptions, check: Check, notes: tuple[str, ...]) -> str:
    """The card's Markdown: what `run` says of the training, how to use the files, `notes` on what was left out."""
    try:
        known = load_run(run)
    except CheckpointError:  # weights of others, or an export: nothing is known of the training
        known = None
    what, task = "Masked autoencoder", "image-feature-extraction"
    if isinstance(exported.model, Classifier):
        what, task = "Image classifier", "image-classification"
    data = _data_name(known)
    code = snippet(options.to, options.part, exported)
    sections = [
        f"---\nlibrary_name: {_LIBRARY.get(options.to, 'torchmae')}\npipeline_tag: {task}\n"
        "tags:\n- masked-autoencoder\n- self-supervised-learning\n- torchmae\n---\n",
        f"# {what}, trained on {_plain(data)}\n" if data else f"# {what}\n",
        f"{_summary(exported, options)}\n",
        f"## Use\n\n`FOLDER` is where this file lies. Images are {_scaled(exported)}, less the mean "
        f"({', '.join(f'{value:.4g}' for value in exported.mean)}), divided by "
        f"({', '.join(f'{value:.4g}' for value in exported.std)}) (for each channel).\n\n```python\n{code}```\n",
        f"## Training\n\n{_training(known, exported, options.data_licence)}\n",
    ]
    figures = _figures(known)
    if figures:
        sections.append(f"## Figures\n\n{figures}\n")
    if exported.classes:
        listed = "\n".join(f"{i}. {_plain(name)}" for i, name in enumerate(exported.classes))
        sections.append(f"## Classes\n\n{listed}\n")
    remarks = "".join(f"- {_plain(note)}\n" for note in notes)
    if remarks:
        sections.append(f"## Notes\n\n{remarks}")
    sections.append(
        f"## Check\n\nAfter writing, these files were compared with the model they were made from: {check}. "
        f"Written by torchmae {torchmae.__version__}.\n"
    )
    return "\n".join(sections)


def snippet(to: str, part: str, exported: Exported) -> str:
    """Python that loads the files of a format and applies them to `images`."""
    size = (exported.encoder.in_chans, *exported.input_size) if exported.model.patch_size else ()
    shape = f"(batch, {', '.join(map(str, size))})"
    if to == "timm":
        name, arguments = timm.architecture(exported)
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        what = "logits" if isinstance(exported.model, Classifier) else "features"
        return (
            "import timm\n\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            f"{what} = model(images)  # images: {shape}\n\n"
            "# from the weight file alone:\n"
            f'model = timm.create_model("{name}", checkpoint_path="FOLDER/model.safetensors", {given})\n'
        )
    if to == "hf-mae":
        return (
            "from transformers import ViTMAEForPreTraining\n\n"
            'model = ViTMAEForPreTraining.from_pretrained("FOLDER").eval()\n'
            f"loss = model(images).loss  # images: {shape}\n"
        )
    if to == "hf-vit":
        return (
            "from transformers import ViTModel\n\n"
            'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False).eval()\n'
            f"tokens = model(images).last_hidden_state  # images: {shape}; the first token is the class token\n"
        )
    if to == "official":
        return f'import torch\n\nweights = torch.load("FOLDER/{official.FILE}", weights_only=True)["model"]\n'
    if to == "onnx":
        return _onnx_snippet(part, exported, shape)
    if isinstance(exported.model, Classifier):
        return (
            "from pathlib import Path\n\nfrom torchmae.training.saved_classifier import load_classifier\n\n"
            f'model, description = load_classifier(Path("FOLDER"))\nlogits = model(images)  # images: {shape}\n'
        )
    return (
        'import torchmae\n\nmodel = torchmae.load("FOLDER")\nfeatures = model.encode(model.preprocess("photo.jpg"))\n'
    )


def _onnx_snippet(part: str, exported: Exported, shape: str) -> str:
    session = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/{onnx.FILE}")\n'
    if isinstance(exported.model, Classifier):
        return f'{session}(logits,) = session.run(None, {{"images": images}})  # images: {shape} float32\n'
    if part == "encoder":
        return f'{session}features, tokens = session.run(None, {{"images": images}})  # images: {shape} float32\n'
    count = exported.encoder.num_patches
    return (
        f"{session}# noise: (batch, {count}) float32; the patches with the smallest numbers stay visible\n"
        'filled, hidden = session.run(None, {"images": images, "noise": noise})\n'
    )


def _scaled(exported: Exported) -> str:
    """How stored values are scaled."""
    if exported.scale is None or set(exported.scale) == {"uint8"}:
        return "scaled to [0, 1]"
    return " or ".join(f"{kind} divided by {one:g}" for kind, one in exported.scale.items())


def _summary(exported: Exported, options: ExportOptions) -> str:
    model = exported.model
    if not exported.model.patch_size:
        return "A masked autoencoder without patches, fully connected."
    encoder = exported.encoder
    patch, size = (" x ".join(map(str, sizes)) for sizes in (encoder.patch_size, exported.input_size))
    block = (
        f"{len(encoder.blocks)} blocks of width {encoder.embed_dim}, patches of {patch} on inputs of {size} with "
        f"{encoder.in_chans} channels"
    )
    if isinstance(model, Classifier):
        return f"A {encoder.label} that was fine-tuned to tell {model.num_classes} classes apart: {block}."
    count, rest = parameter_counts(model)
    alone = options.to in ("timm", "hf-vit") or (options.to, options.part) == ("onnx", "encoder")
    decoder = "; its decoder is not in these files" if alone else f", and a decoder of {short_count(rest)}"
    return (
        "A masked autoencoder ([He et al. 2021](https://arxiv.org/abs/2111.06377)): "
        f"a {encoder.label} of {short_count(count)} parameters ({block}){decoder}."
    )


def _training(known: Run | None, exported: Exported, data_licence: str | None) -> str:
    licence = f"Licence of the training data: {_plain(data_licence) if data_licence else 'not given'}."
    if known is None or not known.summary:
        return f"Nothing is recorded of the training.\n\n{licence}"
    summary, config = known.summary, known.config
    rows = {
        "data": f"{_data_name(known)}, {summary.get('num_train', 0):,} images, {summary.get('num_val', 0):,} held out",
        "recipe": config.get("recipe"),
        "weights at the start": _last_part(config.get("init_from")),
        "steps": f"{summary.get('steps', 0):,} of {config.get('batch_size')} images"
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
    """A table of what was measured on held-out images, each figure beside its baselines."""
    measured = final_figures(known.summary, known.val, known.baseline) if known else {}
    rows = []
    for name in _FIGURES:
        metric = METRICS[name]
        words = {name: metric.heading}
        words |= {f"{name}_{key}": f"the same of {BASELINES[key]}" for key in metric.baselines}
        rows += [f"| {words[key]} | {metric.unit.cell(measured[key])} |" for key in words if key in measured]
    return "\n".join(["| on held-out images | |", "|---|---:|", *rows]) if rows else ""


def _data_name(known: Run | None) -> str | None:
    data = known.config.get("data") if known is not None else None
    return _last_part(data.get("source")) if isinstance(data, dict) else None


def _last_part(path: Any) -> str | None:
    """The last part of a path: a card is for others, and the rest of a path may say more than it should."""
    return Path(str(path)).name if path else None


def _plain(text: str) -> str:
    """Text on one line that Markdown leaves as it is."""
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())
