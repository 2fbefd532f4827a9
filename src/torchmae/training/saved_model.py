"""A model on disk: model.json says what it is, model.safetensors holds its weights. No pickled classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from torchmae import presets
from torchmae.config import ReadOptions
from torchmae.config.pretrain import OWN
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, ConfigError, reason_of
from torchmae.files import replace_file
from torchmae.interop.files import check_content
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.checkpoint import load_checkpoint

FORMAT = 1


@dataclass(frozen=True)
class Description:
    """Everything needed to rebuild a model and to feed it.

    Attributes:
        arguments: of `presets.construct`; of a model handed over in Python `presets.own_arguments`.
        mean: per-channel mean that images, scaled to [0, 1], are reduced by.
        std: per-channel deviation that they are divided by.
        mask: the mask strategy and ratio trained with.
        classes: class names of the training data, if it had any; the model knows nothing of them.
        torchmae: version that wrote it.
        format: of this file.
        low: value of each channel that is shown black; None: 0.
        high: value of each channel that is shown white; None: 1.
        scale: for each type of values that the training images were stored in, the value that stood for 1.
        window: size of the windows, at their own resolution, that training images were cut into; None: crops of images.
        reading: options of `ReadOptions` that training data was read with, other than the defaults.
    """

    arguments: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask: dict[str, Any]
    classes: tuple[str, ...] | None
    torchmae: str
    format: int = FORMAT
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    scale: dict[str, float] | None = None
    reading: dict[str, Any] | None = None
    window: tuple[int, ...] | None = None

    @property
    def normalisation(self) -> Normalisation:
        """How stored values become the model's input."""
        return Normalisation(self.mean, self.std, self.low, self.high, self.scale)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Pixels along each axis."""
        return tuple(self.arguments["input_size"])


def write_description(path: Path, description: Description) -> None:
    """Writes model.json."""
    replace_file(path, (json.dumps(asdict(description), indent=2) + "\n").encode("utf-8"))


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes model.safetensors."""
    replace_file(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}))


def load_model(folder: Path, own: MaskedAutoencoder | None = None) -> tuple[MaskedAutoencoder, Description]:
    """The model of a run folder or of any folder with model.json and model.safetensors.

    A run that has not ended gives its newest checkpoint. A run of a model of the caller's own has its weights put into
    a copy of `own`.

    Raises:
        CheckpointError: nothing there that is whole, or a fine-tuned classifier.
        ConfigError: `own` is needed and not given, or the other way round.
    """
    description = read_description(folder / "model.json")
    if (description.arguments.get("encoder") == OWN) != (own is not None):
        if own is None:
            raise ConfigError(f"{folder} holds a model handed over in Python", "hand it over again: model=MODEL")
        raise ConfigError(f"model is given and {folder} says what its model is", "leave model out")
    weights_path = folder / "model.safetensors"
    try:
        if weights_path.exists():
            check_content(weights_path)
            weights = load_file(weights_path)
        else:
            checkpoint = load_checkpoint(folder / "checkpoints")
            if checkpoint is None:
                raise CheckpointError(f"{folder} has no weights yet", "let the run save a checkpoint first")
            weights = checkpoint.model
        if own is not None:
            model = copy.deepcopy(own)
        else:
            check_size(description.arguments, weights, presets.construct)
            model = presets.construct(description.arguments)
        model.load_state_dict(weights)
    except CheckpointError:
        raise
    except Exception as error:  # sizes that were changed by hand fail in as many ways as modules have
        raise CheckpointError(
            f"cannot load the model in {folder}: {reason_of(error)}", "copy the folder again"
        ) from error
    return model.eval(), description


def check_size(
    arguments: dict[str, Any], weights: dict[str, Tensor], build: Callable[[dict[str, Any]], nn.Module]
) -> None:
    """ValueError where a model is larger than its weights: building it could take any memory and time."""
    depth = max(arguments.get("depth", 0), arguments.get("decoder_depth", 0), sum(arguments.get("depths", ())))
    if depth <= len(weights):
        with torch.device("meta"):
            wanted = sum(tensor.numel() for tensor in build(arguments).state_dict().values())
        given = sum(tensor.numel() for tensor in weights.values())
        if wanted <= given:
            return
        raise ValueError(f"model.json describes {wanted:,} parameters and the weights hold {given:,}")
    raise ValueError(f"model.json describes {depth:,} blocks and the weights hold {len(weights):,} tensors")


def read_description(path: Path) -> Description:
    """What model.json says; CheckpointError: it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("kind") == "classifier":  # as saved_classifier, which stands above this module, marks its own
            raise CheckpointError(
                f"{path.parent} holds a fine-tuned classifier",
                "give the run it was made from; torchmae.training.saved_classifier.load_classifier reads classifiers",
            )
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {values.get('format')!r}; this torchmae reads {FORMAT}", "update torchmae"
            )
        for name in ("input_size", "patch_size", "depths", "dims"):
            if values["arguments"].get(name) is not None:
                values["arguments"][name] = tuple(values["arguments"][name])
        for name in ("mean", "std", "classes", "low", "high", "window"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        ReadOptions(**(values.get("reading") or {}))
        return Description(**values)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} holds no model: cannot read {path.name}", "give a run folder of `torchmae pretrain`"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "copy the folder again") from error
