"""The timm format: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from torchmae.errors import require
from torchmae.nn.classifier import Classifier
from torchmae.publish.exports import Check, Exported, compare, save_tensors, worst

_WEIGHTS = "model.safetensors"


def architecture(exported: Exported) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the same model in timm; ConfigError: timm has none."""
    model = exported.model
    name, arguments = exported.encoder.timm_model()
    return name, {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()},
        "num_classes": model.num_classes if isinstance(model, Classifier) else 0,
        "global_pool": "avg",
    }


def write(folder: Path, exported: Exported) -> None:
    """Writes model.safetensors and config.json."""
    name, arguments = architecture(exported)
    num_classes = arguments.pop("num_classes")
    config = {
        "architecture": name,
        "num_classes": num_classes,
        "num_features": exported.encoder.embed_dim,
        "global_pool": "avg",
        **({"label_names": list(exported.classes)} if exported.classes else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [exported.encoder.in_chans, *exported.encoder.input_size],
            "fixed_input_size": "img_size" in arguments,
            "pool_size": None,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": list(exported.description.mean),
            "std": list(exported.description.std),
            "num_classes": num_classes,
            "first_conv": exported.encoder.embedding,
            "classifier": exported.encoder.head_name,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tensors(folder / _WEIGHTS, exported.encoder.state_dict())


@torch.no_grad()
def check(folder: Path, exported: Exported) -> Check:
    """Loads the folder in timm by its path and by its weight file, and compares the outputs."""
    timm = require("timm", "timm")
    images, by = exported.probe(), f"timm {timm.__version__}"
    if isinstance(exported.model, Classifier):
        what, wanted = "logits", exported.model(images)
    else:
        what, wanted = "features", exported.encoder(images).patches.mean(1)
    name, arguments = architecture(exported)
    models = (
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(name, checkpoint_path=str(folder / _WEIGHTS), **arguments),
    )
    return worst([compare(by, what, model.eval()(images), wanted) for model in models])


def usage(exported: Exported) -> str:
    """Python code that loads the folder, or the weight file alone."""
    name, arguments = architecture(exported)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    what = "logits" if isinstance(exported.model, Classifier) else "features"
    return (
        "import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        f"{what} = model(images)  # images: {exported.shape}\n\n"
        "# from the weight file alone:\n"
        f'model = timm.create_model("{name}", checkpoint_path="FOLDER/{_WEIGHTS}", {given})\n'
    )
