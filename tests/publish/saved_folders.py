"""Folders of a run and of a fine-tuned classifier, both small and untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import DECODER, ENCODER, MEAN, STD, classifier, shaken

from torchmae import presets
from torchmae.config import PretrainConfig
from torchmae.settings import to_yaml
from torchmae.training.saved_classifier import ClassifierDescription, save_classifier
from torchmae.training.saved_model import Description, write_description, write_weights


def run_folder(folder: Path, **overrides: Any) -> Path:
    folder.mkdir()
    arguments = {**presets.PRESETS["vit_tiny"], **ENCODER, **DECODER, **overrides}
    model = shaken(presets.construct(arguments))
    mask = {"strategy": "random", "ratio": 0.6}
    channels = arguments["in_chans"]
    description = Description(arguments, MEAN[:channels], STD[:channels], mask, None, "0.1.0")
    write_description(folder / "model.json", description)
    write_weights(folder / "model.safetensors", model.state_dict())
    (folder / "config.yaml").write_text(to_yaml(PretrainConfig()), encoding="utf-8")
    summary = {"state": "finished", "loss": 0.4321, "steps": 7, "num_train": 1234, "knn": None, "target": "pixels"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def classifier_folder(folder: Path) -> Path:
    folder.mkdir()
    model = classifier(3)
    description = ClassifierDescription({"num_classes": 3, **ENCODER}, MEAN, STD, ("cat", "dog", "a|b"), "0.1.0")
    save_classifier(folder, model, description)
    return folder
