"""Starting a pre-training from weights that are there already: `torchmae pretrain --init-from SOURCE`."""

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
    """The weights of a run, an exported model, or others' (as `torchmae.load` takes them).

    Args:
        source: where they are.
        model: settings whose input_size and num_heads say what others' weights do not.

    Raises:
        CheckpointError: nothing there that can be loaded.
        ConfigError: a model without patches.
    """
    path = user_path(source)
    if is_foreign(path):
        return read_weights(path, **_said(model)) if model is not None else read_weights(path)
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


def _said(model: ModelConfig) -> dict[str, Any]:
    size = model.input_size
    return {"input_size": (size, size) if isinstance(size, int) else size, "num_heads": model.num_heads}


def adopt_shape(model: ModelConfig, weights: Weights) -> ModelConfig:
    """Model settings, each of them explicit, with the shape of the weights.

    The encoder's shape is always theirs, and so is the decoder's, if they have one for the same target. The size of
    the input is theirs unless the settings name one; the target likewise.

    Raises:
        ConfigError: a preset without patches.
    """
    if "patch_size" not in presets.arguments(model.preset):
        raise ConfigError(
            f"preset {model.preset!r} cannot start from a vision transformer's weights", "leave --init-from out"
        )
    preset: str = model.preset
    if presets.PRESETS[preset].get("encoder") != weights.arguments.get("encoder"):  # of another kind: any of theirs
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
        if taken["decoder"] == "self":  # whose predictions depend on each other, so that it predicts all
            taken["predict_ratio"] = 1.0
    full = presets.arguments(preset, **{**given, **taken, "norm_pix": norm_pix})
    full["in_chans"] = model.in_chans  # what the data has, unless said
    full.pop("encoder", None)  # the preset says it
    sizes = ("embed_dim", "depth", "num_heads", "patch_size", "depths", "dims")
    return ModelConfig(**{"preset": _nearest_preset(full, sizes) or preset, **full})


def _nearest_preset(arguments: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The name of a preset that is like these arguments in the named ones; every size is in the settings itself."""
    for name, preset in presets.PRESETS.items():
        if "patch_size" in preset and all(preset.get(key) == arguments.get(key) for key in names):
            return name
    return None
