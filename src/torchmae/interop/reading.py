"""Reads weights of other libraries from files and folders, without running code in them.

The steps: detect the kind (`IMPORTS` for a folder, else the encoder in a single file), rename to the released
checkpoints' layout, convert other layouts, then take encoder and decoder, each whole or not at all.
"""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchmae import presets
from torchmae.errors import CheckpointError, ConfigError
from torchmae.interop import names
from torchmae.interop.candidates import find_encoder, split_choice
from torchmae.interop.conversions import convert
from torchmae.interop.files import plain, read_file
from torchmae.interop.weights import Weights, difference, full_arguments, listed, no_vit

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}
_TIMM_NAME = re.compile(r"vit_(tiny|small|base|large|huge)_patch\d+_\d+$")
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
# Arguments of timm's VisionTransformer that change nothing here or follow from the weights.
_TIMM_ARGUMENTS = frozenset({
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "dynamic_img_size", "dynamic_img_pad"),
    *("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init"),
})  # fmt: skip
# Parameters on top of an encoder that are not part of it.
_HEAD = re.compile(r"(head|fc_norm|attn_pool|pooler|classifier|pre_logits|embeddings\.mask_token)(\.|$)")
State = Mapping[str, Tensor]
Facts = dict[str, Any]


def is_foreign(path: Path) -> bool:
    """Whether a path is a weight file, a part of one (FILE#PART), or a model folder of another library."""
    path, _ = split_choice(path)
    return path.is_file() or ((path / "config.json").is_file() and not (path / "model.json").is_file())


def read_weights(
    path: Path,
    *,
    norm_pix: bool | None = None,
    input_size: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> Weights:
    """Weights from a file or folder of another library.

    It reads .safetensors and .pth files in timm's layout, under any wrapper and prefix, with or without the MAE decoder
    of the released checkpoints; folders of transformers' ViTMAE, ViT and Pixio, and of timm's plain vision
    transformers.

    Args:
        path: the file or folder; FILE#PART names one of several encoders in a file.
        norm_pix: whether the decoder's target was normalised patches; None: as the source says.
        input_size: pixels along each axis, where the source does not say and images are not square; for weights of
            clips, two numbers take the first frame.
        num_heads: attention heads, where the source does not say.

    Raises:
        CheckpointError: it cannot be read, or holds another kind of network.
        ConfigError: the source contradicts `norm_pix`.
    """
    path, choice = split_choice(path)
    if path.is_file() and path.name == "model.safetensors" and is_foreign(path.parent) and choice is None:
        path = path.parent  # for its config.json
    try:
        state, facts, notes = _read_folder(path) if path.is_dir() else _read_file(path, choice)
        facts = {"origin": str(path), "num_heads_if_unknown": num_heads, **facts}
        state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        weights = _assemble(convert(state, facts, input_size, notes), facts, notes)
    except CheckpointError:
        raise
    except Exception as error:  # wrong shapes and facts can raise anything
        raise no_vit(str(path), error.problem if isinstance(error, ConfigError) else f"{error!r:.200}") from error
    if norm_pix is None:
        return weights
    if weights.norm_pix not in (None, norm_pix):
        said = "normalised" if weights.norm_pix else "pixels"
        raise ConfigError(f"target is given, but {path} says that it was {said}", "leave --target out")
    return replace(weights, arguments={**weights.arguments, "norm_pix": norm_pix})


def _read_folder(path: Path) -> tuple[State, Facts, list[str]]:
    """Parameters in the released layout, the facts of config.json, and notes."""
    config = _read_json(path / "config.json")
    for kind in IMPORTS.values():
        if kind.wrote(config):
            try:
                return kind.rename(_tensors_of(path)), kind.facts(path, config), []
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                problem = f"{path / 'config.json'} is damaged: {error!r}"
                raise CheckpointError(problem, "copy the folder again") from error
    kind_of_model = config.get("model_type", "of an unknown kind")
    raise CheckpointError(
        f"{path} holds a model {kind_of_model}",
        "give a folder of transformers with a vit, vit_mae or pixio, or one of timm's vit_*",
    )


def _timm_facts(path: Path, config: Mapping[str, Any]) -> Facts:
    name, given = config["architecture"].partition(".")[0], dict(config.get("model_args") or {})
    match = _TIMM_NAME.match(name)
    odd = sorted(set(given) - _TIMM_ARGUMENTS)
    if match is None or odd:
        raise CheckpointError(
            f"{path} holds a timm model {name!r}" + (f" with {', '.join(odd)}" if odd else ""),
            "only plain vision transformers, vit_SIZE_patchN_M, can be read by config.json; give the weight file alone",
        )
    cfg = config.get("pretrained_cfg") or {}
    size = given.get("img_size") or tuple(cfg["input_size"][1:])
    return {
        "num_heads": given.get("num_heads", _TIMM_HEADS[match[1]]),
        "input_size": (size, size) if isinstance(size, int) else tuple(size),
        "mean": tuple(cfg.get("mean") or IMAGENET_MEAN),
        "std": tuple(cfg.get("std") or IMAGENET_STD),
    }


def _transformers_facts(path: Path, config: Mapping[str, Any]) -> Facts:
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{path} uses {config['hidden_act']!r} between layers", "torchmae has gelu only")
    size, half = config.get("image_size", 224), (0.5,) * config.get("num_channels", 3)
    facts = {
        "num_heads": config.get("num_attention_heads", 12),
        "input_size": (size, size) if isinstance(size, int) else tuple(size),
        "mean": half,
        "std": half,
    }
    if config["model_type"] == "vit_mae":
        facts |= {
            "decoder_num_heads": config.get("decoder_num_attention_heads", 16),
            "norm_pix": bool(config.get("norm_pix_loss", False)),
            "mask_ratio": float(config.get("mask_ratio", 0.75)),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        }
    processor = path / "preprocessor_config.json"
    if processor.is_file():
        values = _read_json(processor)
        facts |= {"mean": tuple(values["image_mean"]), "std": tuple(values["image_std"])}
    return facts


class Import(NamedTuple):
    """How to read the folders of a library."""

    wrote: Callable[[Mapping[str, Any]], bool]  # whether a config.json is this library's
    facts: Callable[[Path, Mapping[str, Any]], Facts]  # what the config.json says
    rename: Callable[[State], State]  # to the released checkpoints' layout


IMPORTS = {
    "timm": Import(lambda config: "architecture" in config, _timm_facts, dict),
    "transformers": Import(
        lambda config: config.get("model_type") in ("vit", "vit_mae"), _transformers_facts, names.from_huggingface
    ),
    "pixio": Import(lambda config: config.get("model_type") == "pixio", _transformers_facts, names.from_pixio),
}


def _read_file(path: Path, choice: str | None) -> tuple[State, Facts, list[str]]:
    """Parameters of the encoder in a single file, the facts in the arguments stored with it, and notes."""
    content = read_file(path)
    state, notes = find_encoder(content, choice, str(path))
    stored = content.get("args")
    stored = vars(stored) if isinstance(stored, Namespace) else stored if isinstance(stored, dict) else {}
    stored = {name: plain(value) for name, value in stored.items()}
    facts: Facts = {}
    if isinstance(stored.get("norm_pix_loss"), bool):
        facts["norm_pix"] = stored["norm_pix_loss"]
    for name in ("num_heads", "decoder_num_heads", "mean", "std", "mask_ratio"):
        if stored.get(name) is not None:
            value = stored[name].tolist() if isinstance(stored[name], Tensor) else stored[name]
            facts[name] = tuple(value) if isinstance(value, list) else value
    return state, facts, notes


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """All parameters of a folder, from one file or from the files that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise CheckpointError(f"{index} names files outside its folder", "do not use it")
        return {name: tensor for file in files for name, tensor in read_file(folder / file).items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
    raise CheckpointError(f"{folder} has no weights", "there must be a model.safetensors beside its config.json")


def _assemble(state: State, facts: Facts, notes: list[str]) -> Weights:
    """Splits parameters in the released layout into encoder and decoder, and checks each."""
    origin = facts["origin"]
    encoder, decoder = names.split_official(state)
    if "norm.weight" not in encoder and "fc_norm.weight" in encoder:
        encoder |= {f"norm.{kind}": encoder[f"fc_norm.{kind}"] for kind in ("weight", "bias")}
        notes.append("the last norm came after the pooling (fc_norm); here it comes before")
    unused = sorted(name for name in encoder if _HEAD.match(name))
    encoder = {name: value for name, value in encoder.items() if name not in unused}
    if unused:
        notes.append(f"not used, as it is not part of the encoder: {listed(unused)}")
    arguments = _encoder_arguments(encoder, facts)
    in_chans = arguments["in_chans"]
    mean, std = facts.get("mean", IMAGENET_MEAN), facts.get("std", IMAGENET_STD)
    if len(mean) != in_chans or len(std) != in_chans:
        mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
        notes.append(f"mean and deviation of its {in_chans} channels are not known: {mean[0]:.3g} and {std[0]:.3g}")
    ratio = facts.get("mask_ratio", 0.75)
    weights = Weights(origin, arguments, encoder, None, f"{origin} holds an encoder only", mean, std, ratio)
    if encoder["pos_embed"].shape[1] == math.prod(weights.grid):  # in timm, prefix tokens may have no position
        prefix = arguments["class_token"] + arguments["registers"]
        encoder["pos_embed"] = nn.functional.pad(encoder["pos_embed"], (0, 0, prefix, 0))
    problem = difference(encoder, presets.weightless(full_arguments(weights)).encoder)
    if problem:
        raise no_vit(origin, problem)
    _check_values(encoder, origin)
    if decoder:
        weights = _with_decoder(weights, decoder, facts)
        notes += [weights.no_decoder] * (weights.decoder is None)
    return replace(weights, notes=tuple(notes))


def _encoder_arguments(encoder: State, facts: Facts) -> dict[str, Any]:
    """Arguments of `ViTEncoder`, from the shapes of the parameters, else from `facts`."""
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in encoder:
            like = sorted(other for other in encoder if re.search(r"pos|rope" if name == "pos_embed" else "mlp", other))
            instead = f" (but {listed(like)})" if like else ""
            raise no_vit(facts["origin"], f"it has no {name}{instead}")
    embed_dim, in_chans, *patch = encoder["patch_embed.proj.weight"].shape
    hidden = len(encoder["blocks.0.mlp.fc1.weight"])
    ratio = hidden / embed_dim
    heads = facts.get("num_heads"), _HEADS.get(embed_dim), facts.get("num_heads_if_unknown")
    return {
        "input_size": tuple(facts["input_size"]),
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": _depth(encoder),
        "num_heads": _first(heads, embed_dim, facts["origin"]),
        # `embed_dim` times the ratio, rounded down, must give `hidden` again.
        "mlp_ratio": ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf),
        "class_token": "cls_token" in encoder,
        "registers": encoder["reg_token"].shape[1] if "reg_token" in encoder else 0,
    }


def _with_decoder(weights: Weights, decoder: State, facts: Facts) -> Weights:
    """The weights with their decoder, or with the reason why it cannot be used."""
    cannot = f"the decoder of {weights.origin} cannot be used"
    if "pred.weight" not in decoder:
        return replace(weights, no_decoder=f"{cannot}: it lacks pred.weight")
    width = decoder["pred.weight"].shape[1]
    heads = facts.get("decoder_num_heads"), _DECODER_HEADS.get(width)
    arguments = {
        **weights.arguments,
        "decoder": "self",
        "decoder_embed_dim": width,
        "decoder_depth": _depth(decoder),
        "decoder_num_heads": _first(heads, width, weights.origin),
        **({} if facts.get("norm_pix") is None else {"norm_pix": facts["norm_pix"]}),
    }
    positions = decoder.get("pos_embed")
    if positions is None or bool(positions[:, 0].any()):
        what = "its positions are missing, or the class token has one, unlike in torchmae"
        return replace(weights, no_decoder=f"{cannot}: {what}")
    decoder = {**decoder, "pos_embed": positions[:, 1:]}
    whole = replace(weights, arguments=arguments, decoder=decoder, no_decoder="")
    problem = difference(decoder, presets.weightless(full_arguments(whole)).decoder)
    return replace(weights, no_decoder=f"{cannot}: {problem}") if problem else whole


def _check_values(given: State, origin: str) -> None:
    """Refuses values that are no finite floats, and matrices of zeros, which partial downloads contain."""
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{origin} holds {tensor.dtype} in {name}", "give the weights before quantisation")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{origin} holds values that are not finite in {name}", "use another checkpoint")
        if name.endswith(".weight") and tensor.ndim > 1 and not bool(tensor.any()):
            raise CheckpointError(f"{origin} holds nothing but zeros in {name}", "download it again")


def _depth(weights: State) -> int:
    # The count, not the largest index: a single name could otherwise ask for any number of blocks.
    return len({name.split(".")[1] for name in weights if re.match(r"blocks\.\d+\.", name)})


def _first(heads: Sequence[int | None], width: int, origin: str) -> int:
    """The first known number of heads; CheckpointError: none is known."""
    known = [number for number in heads if number is not None]
    if not known:
        raise CheckpointError(
            f"{origin} does not say how many attention heads a width of {width} is divided among",
            "give a folder with its config.json, or say --model.num_heads to pretrain",
        )
    return known[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "copy the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object", "copy the folder again")
    return values
