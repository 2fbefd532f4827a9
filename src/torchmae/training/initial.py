"""Pre-training from existing weights: `torchmae pretrain --init-from SOURCE`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torchmae import presets
from torchmae.config import ModelConfig
from torchmae.errors import ConfigError
from torchmae.interop.reading import is_foreign, read_weights
from torchmae.interop.weights import DECODER_SHAPE, ENCODER_SHAPE, Weights
from torchmae.paths import user_path
from torchmae.training.saved_model import load_model


def read_initial(source: str | Path, model: ModelConfig | None = None) -> Weights:
    """Reads the weights of a run, an exported model, or weights of others (as `torchmae.load` takes them).

    `model` supplies `input_size` and `num_heads` where weights of others do not store them.

    Raises:
        CheckpointError: `source` holds nothing that can be loaded.
        ConfigError: the model has no patches.
    """
    path = user_path(source)
    if is_foreign(path):
        if model is None:
            return read_weights(path)
        size = (model.input_size,) * 2 if isinstance(model.input_size, int) else model.input_size
        return read_weights(path, input_size=size, num_heads=model.num_heads)
    trained, description = load_model(path)
    if not trained.patch_size:
        raise ConfigError(f"{path} holds a model without patches", "give --init-from weights of a vision transformer")
    return Weights(
        origin=str(path),
        arguments=description.arguments,
        encoder=trained.encoder.state_dict(),
        decoder=trained.decoder.state_dict(),
        no_decoder="",
        mean=description.mean,
        std=description.std,
    )


def adopt_shape(model: ModelConfig, weights: Weights) -> ModelConfig:
    """Model settings with every value explicit and the shape of the weights.

    The encoder has the weights' shape. So has the decoder, if the weights hold one for the same target. Input size and
    target are the weights' unless the settings name them.

    Raises:
        ConfigError: the preset has no patches.
    """
    if "patch_size" not in presets.arguments(model.preset):
        raise ConfigError(
            f"preset {model.preset!r} cannot start from a vision transformer's weights", "leave --init-from out"
        )
    preset: str = model.preset
    if presets.PRESETS[preset].get("encoder") != weights.arguments.get("encoder"):  # use any preset of their encoder
        preset = _nearest_preset(weights.arguments, ("encoder",)) or preset
    base = presets.arguments(preset)
    names = {field.name for field in fields(model)} - {"preset"} - (set(ENCODER_SHAPE) - base.keys())
    given = {name: getattr(model, name) for name in names}
    norm_pix = weights.norm_pix if model.norm_pix is None else model.norm_pix
    taken = {name: weights.arguments.get(name, 0) for name in ENCODER_SHAPE if name in base}
    taken["input_size"] = weights.arguments["input_size"] if model.input_size is None else model.input_size
    same_target = weights.norm_pix is None or norm_pix == weights.norm_pix
    if weights.decoder is not None and same_target:
        taken |= {name: weights.arguments.get(name, False) for name in DECODER_SHAPE}
        if taken["decoder"] == "self":  # its predictions depend on each other: it predicts all masked patches
            taken["predict_ratio"] = 1.0
    full = presets.arguments(preset, **{**given, **taken, "norm_pix": norm_pix})
    full["in_chans"] = model.in_chans  # null: as the data has
    full.pop("encoder", None)  # the preset implies it
    sizes = ("embed_dim", "depth", "num_heads", "patch_size", "depths", "dims")
    return ModelConfig(**{"preset": _nearest_preset(full, sizes) or preset, **full})


def _nearest_preset(arguments: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first preset that equals `arguments` in the given names. The settings hold every size themselves."""
    for name, preset in presets.PRESETS.items():
        if "patch_size" in preset and all(preset.get(key) == arguments.get(key) for key in names):
            return name
    return None
