"""A model on disk: model.json describes it, model.safetensors holds its weights. No pickled classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from torchmae import presets
from torchmae.config import ReadOptions
from torchmae.config.pretrain import OWN
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, ConfigError, reason_of
from torchmae.files import replace_file
from torchmae.interop.files import check_content
from torchmae.nn.layers import without_weights
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.refine import autoencoder_of
from torchmae.words import kind_of

FORMAT = 1


@dataclass(frozen=True)
class Description:
    """The content of model.json: how to rebuild a model, and to read and normalise its images."""

    arguments: dict[str, Any]  # of `presets.construct`; for a model handed over in Python `presets.own_arguments`
    mean: tuple[float, ...]  # of each channel, subtracted from scaled values
    std: tuple[float, ...]  # of each channel, that images are divided by
    mask: dict[str, Any]  # strategy and ratio of training
    classes: tuple[str, ...] | None  # names in the training data; the model does not use them
    torchmae: str  # version that wrote it
    format: int = FORMAT
    low: tuple[float, ...] | None = None  # value of each channel that is shown black; None: 0
    high: tuple[float, ...] | None = None  # value of each channel that is shown white; None: 1
    scale: dict[str, float] | None = None  # for each stored type of the training images, the value that becomes 1
    reading: dict[str, Any] | None = None  # `ReadOptions` of the training data that differ from the defaults
    window: tuple[int, ...] | None = None  # size of the windows that training images were cut into; None: crops
    moving: bool = False  # whether the first of three axes is time
    bands: tuple[str, ...] | None = None  # names of the channels, where the training data has some
    normalise: str | None = None  # as in `Normalisation`

    @property
    def kind(self) -> str:
        """What a sample is, as in `words.kind_of`."""
        return kind_of(len(self.input_size), moving=self.moving)

    @property
    def normalisation(self) -> Normalisation:
        """The conversion of stored values to the model's input."""
        return Normalisation(self.mean, self.std, self.low, self.high, self.scale, self.normalise)

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
    """Reads the model of a run folder, or of any folder with model.json and model.safetensors, in eval mode.

    A run that has not ended gives its newest checkpoint. If the run trained a model handed over in Python, a copy of
    `own` gets its weights.

    Raises:
        CheckpointError: the folder holds no whole model, or a fine-tuned classifier.
        ConfigError: `own` is missing, or it is given for a run that does not need it.
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
            weights = autoencoder_of(checkpoint.model)
        if own is not None:
            model = copy.deepcopy(own)
        else:
            check_size(description.arguments, weights, presets.construct)
            model = presets.construct(description.arguments)
        model.load_state_dict(weights)
    except CheckpointError:
        raise
    except Exception as error:  # sizes that were edited by hand fail in many ways
        raise CheckpointError(
            f"cannot load the model in {folder}: {reason_of(error)}", "copy the folder again"
        ) from error
    return model.eval(), description


def check_size(
    arguments: dict[str, Any], weights: dict[str, Tensor], build: Callable[[dict[str, Any]], nn.Module]
) -> None:
    """ValueError if a model is larger than its weights: to build it could take unlimited memory and time."""
    depth = max(arguments.get("depth", 0), arguments.get("decoder_depth", 0), sum(arguments.get("depths", ())))
    if depth <= len(weights):
        with without_weights():
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
        if values.get("kind") == "classifier":  # saved_classifier.KIND
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
        for name in ("mean", "std", "classes", "low", "high", "window", "bands"):
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
