"""A fine-tuned classifier on disk: model.json describes it, model.safetensors holds weights under timm's names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, reason_of
from torchmae.files import replace_file
from torchmae.interop.files import check_content
from torchmae.nn import CLASSIFIERS
from torchmae.nn.classifier import Classifier
from torchmae.training.saved_model import check_size, write_weights

FORMAT = 1
KIND = "classifier"


@dataclass(frozen=True)
class ClassifierDescription:
    """The content of model.json: how to rebuild a classifier and normalise its images."""

    arguments: dict[str, Any]  # of `build_classifier`
    mean: tuple[float, ...]  # of each channel, subtracted from scaled values
    std: tuple[float, ...]  # of each channel, that images are divided by
    classes: tuple[str, ...] | None  # the name of each logit
    torchmae: str  # version that wrote it
    kind: str = KIND
    format: int = FORMAT
    low: tuple[float, ...] | None = None  # this and the next three as in `Normalisation`
    high: tuple[float, ...] | None = None
    scale: dict[str, float] | None = None
    normalise: str | None = None

    @property
    def normalisation(self) -> Normalisation:
        """How stored values become the classifier's input."""
        return Normalisation(self.mean, self.std, self.low, self.high, self.scale, self.normalise)


def build_classifier(arguments: dict[str, Any]) -> Classifier:
    """Builds a classifier with random weights; "encoder" names its kind. ConfigError if sizes do not fit together."""
    kind = arguments.get("encoder", "vit")
    return CLASSIFIERS[kind](**{name: value for name, value in arguments.items() if name != "encoder"})


def save_classifier(folder: Path, model: Classifier, description: ClassifierDescription) -> None:
    """Writes model.json and model.safetensors; CheckpointError if the disk is full or cannot be written."""
    replace_file(folder / "model.json", (json.dumps(asdict(description), indent=2) + "\n").encode("utf-8"))
    write_weights(folder / "model.safetensors", model.state_dict())


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a fine-tuned classifier, by its model.json."""
    try:
        values = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("kind") == KIND


def load_classifier(folder: Path) -> tuple[Classifier, ClassifierDescription]:
    """Reads the classifier that fine-tuning wrote, in eval mode; CheckpointError if it is missing or damaged."""
    try:
        values = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if values.get("kind") != KIND or values.get("format") != FORMAT:
            raise CheckpointError(f"{folder} holds no classifier", "give the folder that fine-tuning wrote")
        for name in ("mean", "std", "classes", "low", "high"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        description = ClassifierDescription(**values)
        check_content(folder / "model.safetensors")
        weights = load_file(folder / "model.safetensors")
        check_size(description.arguments, weights, build_classifier)
        model = build_classifier(description.arguments)
        model.load_state_dict(weights)
    except CheckpointError:
        raise
    except Exception as error:  # sizes that were edited by hand fail in many ways
        raise CheckpointError(
            f"cannot load the classifier in {folder}: {reason_of(error)}", "copy the folder again"
        ) from error
    return model.eval(), description
