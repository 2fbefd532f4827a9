"""Presets, and the one place where a network is built from names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torchmae import tutorial
from torchmae.config.pretrain import OWN
from torchmae.errors import ConfigError, one_of, within
from torchmae.nn import DECODERS, ENCODERS, HogTarget, MaskedAutoencoder, PixelTarget, Target, TeacherTarget
from torchmae.nn.layers import without_weights

_PAPER_DECODER = {"decoder": "self", "decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}


def _patches(input_size: int, patch_size: int, **others: Any) -> dict[str, Any]:
    return {
        "input_size": (input_size, input_size),
        "patch_size": (patch_size, patch_size),
        "in_chans": 3,
        "mlp_ratio": 4.0,
        "drop_path": 0.0,
        "norm_pix": True,
        "predict_ratio": 1.0,
        "feature_weights": False,
        "hog_weight": 0.0,
        "teacher": None,
        "teacher_weight": 1.0,
        **_PAPER_DECODER,
        **others,
    }


def _vit(input_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return _patches(input_size, patch_size, **sizes, **{"class_token": True, "registers": 0, **others})


def _convnext(
    input_size: int, patch_size: int, depths: tuple[int, ...], dims: tuple[int, ...], **decoder: Any
) -> dict[str, Any]:
    sizes = {"depths": depths, "dims": dims}
    return _patches(input_size, patch_size, encoder="convnext", **sizes, decoder_depth=1, **decoder)


_SMALL_DECODER = {"decoder_embed_dim": 192, "decoder_depth": 4, "decoder_num_heads": 3}

PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": _vit(224, 16, 192, 12, 3),
    "vit_small": _vit(224, 16, 384, 12, 6),
    "vit_base": _vit(224, 16, 768, 12, 12),
    "vit_large": _vit(224, 16, 1024, 24, 16),
    "vit_huge": _vit(224, 14, 1280, 32, 16),
    "vit_tiny_32_p4": _vit(32, 4, 192, 12, 3, **_SMALL_DECODER),
    "vit_tiny_32_p2": _vit(32, 2, 192, 12, 3, **_SMALL_DECODER),
    "vit_digits": _vit(
        8, 2, 64, 4, 4, in_chans=1, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4, norm_pix=False
    ),
    "convnext_atto": _convnext(224, 32, (2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_32": _convnext(32, 8, (1, 1, 3, 1), (24, 48, 96, 192), decoder_embed_dim=192, decoder_num_heads=3),
    **tutorial.PRESETS,
}


def arguments(preset: str, **overrides: Any) -> dict[str, Any]:
    """The full arguments of a preset of `PRESETS`, with the overrides that are not None.

    `input_size` and `patch_size` are one number for all axes, or a sequence. ConfigError: an unknown preset, an
    argument that its model does not have, or a number that is too small.
    """
    if preset == OWN:
        raise ConfigError("model.preset is 'own', a model handed over in Python", "hand it over again: model=MODEL")
    one_of("model.preset", preset, PRESETS)
    values = dict(PRESETS[preset])
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in given:
        if name not in values:
            raise ConfigError(f"model.{name} does not apply to preset {preset!r}", "leave it out")
    values.update(given)
    # One number stands for all axes. If only one of the two sizes is a sequence, it gives the number of axes.
    sizes = {name: values[name] for name in ("input_size", "patch_size") if name in values}
    explicit = [len(given[name]) for name in sizes if isinstance(given.get(name), Sequence)]
    axes = explicit[0] if explicit else len(PRESETS[preset]["input_size"])
    for name, size in sizes.items():
        if isinstance(size, int):
            values[name] = (size,) * axes
        elif name not in given and len(size) != axes:
            values[name] = (size[0],) * axes
        else:
            values[name] = tuple(size)
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            least = 0 if name == "registers" else 1
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                raise ConfigError(f"model.{name} is {value}", f"it must be {least} or more")
    return values


def compose(
    *,
    in_chans: int,
    encoder: str = "vit",
    mlp_ratio: float = 4.0,
    decoder: str = "self",
    decoder_embed_dim: int,
    decoder_depth: int,
    decoder_num_heads: int,
    norm_pix: bool = True,
    predict_ratio: float = 1.0,
    feature_weights: bool = False,
    hog_weight: float = 0.0,
    teacher: str | None = None,
    teacher_weight: float = 1.0,
    teacher_dim: int = 0,
    **of_encoder: Any,
) -> MaskedAutoencoder:
    """A model with patches. `config.ModelConfig` describes the arguments; the others are the encoder's.

    With a `teacher`, whose features have width `teacher_dim`, call `nn.teacher.attach` before training. ConfigError:
    sizes or options that do not fit together.
    """
    one_of("encoder", encoder, ENCODERS)
    one_of("decoder", decoder, DECODERS)
    within("hog_weight", hog_weight, 0, float("inf"), open_high=True)
    within("teacher_weight", teacher_weight, 0, float("inf"), open_low=True, open_high=True)
    for name, used in (("predict_ratio below 1", predict_ratio < 1), ("feature_weights", feature_weights)):
        if used and not DECODERS[decoder].predicts_alone:
            raise ConfigError(f"{name} does not apply to the {decoder!r} decoder", "use decoder 'cross'")
    if feature_weights and not ENCODERS[encoder].gives_blocks:
        raise ConfigError(f"feature_weights does not apply to the {encoder!r} encoder", "leave it out")
    built = ENCODERS[encoder](in_chans=in_chans, mlp_ratio=mlp_ratio, **of_encoder)
    targets: list[Target] = [PixelTarget(built.patch_size, in_chans, norm_pix=norm_pix)]
    if hog_weight:
        targets.append(HogTarget(built.patch_size, in_chans, hog_weight))
    if teacher is not None:
        targets.append(TeacherTarget(None, teacher_dim, weight=teacher_weight))
    decoding = DECODERS[decoder](
        built.embed_dim,
        built.grid,
        embed_dim=decoder_embed_dim,
        depth=decoder_depth,
        num_heads=decoder_num_heads,
        out_dim=targets[0].dim,
        mlp_ratio=mlp_ratio,
        **({"feature_weights": len(built.blocks) + 1} if feature_weights else {}),
    )
    return MaskedAutoencoder(built, decoding, targets, predict_ratio=predict_ratio)


def own_arguments(model: MaskedAutoencoder) -> dict[str, Any]:
    """What is recorded of a model handed over in Python: its shape, from which it cannot be rebuilt."""
    encoder = model.encoder
    return {
        "encoder": OWN,
        "input_size": tuple(encoder.input_size),
        "patch_size": tuple(encoder.patch_size),
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
    }


def construct(values: dict[str, Any]) -> MaskedAutoencoder:
    """The network of full arguments (see `arguments`), with fresh weights from torch's global generator.

    ConfigError: sizes or options that do not fit together. TypeError: arguments that no model takes.
    """
    fits = values.keys() <= signature(tutorial.compose).parameters.keys()
    return (tutorial.compose if fits else compose)(**values)


def weightless(values: dict[str, Any]) -> MaskedAutoencoder:
    """As `construct`, on the device "meta": shapes without memory for weights."""
    with without_weights():
        return construct(values)


def build(preset: str, **overrides: Any) -> MaskedAutoencoder:
    """A model by name, with fresh weights: `build("vit_base")`, `build("vit_small", in_chans=5, input_size=(96, 160))`.

    ConfigError: an unknown preset or argument, or sizes that do not fit together.
    """
    return construct(arguments(preset, **overrides))
