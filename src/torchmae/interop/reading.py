"""Reads weights that others wrote: files and folders, told apart by what is in them. Nothing in them is ever run."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchmae.errors import CheckpointError, ConfigError
from torchmae.interop import names
from torchmae.interop.candidates import find_encoder, split_choice
from torchmae.interop.conversions import convert
from torchmae.interop.files import plain, read_file
from torchmae.interop.weights import Weights
from torchmae.nn.decoder import SelfDecoder
from torchmae.nn.encoder import ViTEncoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}
_TIMM_NAME = re.compile(r"vit_(tiny|small|base|large|huge)_patch\d+_\d+$")
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
# Arguments of timm's VisionTransformer that change nothing here, or that are read off the weights.
_TIMM_ARGUMENTS = frozenset({
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "dynamic_img_size", "dynamic_img_pad"),
    *("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init"),
})  # fmt: skip
# What may stand on top of an encoder and is not part of it.
_HEAD = re.compile(r"(head|fc_norm|attn_pool|pooler|classifier|pre_logits|embeddings\.mask_token)(\.|$)")
_MAX_LISTED = 4


def is_foreign(path: Path) -> bool:
    """Whether a path is a weight file, a part of one (FILE#PART), or a folder with another library's config.json."""
    path, _ = split_choice(path)
    return path.is_file() or ((path / "config.json").is_file() and not (path / "model.json").is_file())


def read_weights(
    path: Path,
    *,
    norm_pix: bool | None = None,
    input_size: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> Weights:
    """Weights from a file or folder that is not torchmae's own.

    Known are: .safetensors and .pth files in timm's layout, under any wrapper and prefix, with or without the MAE
    decoder of the released checkpoints; folders of transformers' ViTMAE and ViT models; folders of timm's plain vision
    transformers.

    Args:
        path: the file or folder; FILE#PART names one of several encoders in a file.
        norm_pix: whether the decoder's target was normalised patches; None: what the source says.
        input_size: pixels along each axis of the images it is for, where it does not say and they are not square; two
            numbers for weights of clips: their first frame is taken.
        num_heads: attention heads, where it does not say.

    Raises:
        CheckpointError: it cannot be read, or holds something that this encoder is not.
        ConfigError: `norm_pix` is not what the source says.
    """
    path, choice = split_choice(path)
    if path.is_file() and path.name == "model.safetensors" and is_foreign(path.parent) and choice is None:
        path = path.parent  # its config.json says more than the file alone
    try:
        state, facts, notes = _read_folder(path) if path.is_dir() else _read_file(path, choice)
        facts = {"origin": str(path), "num_heads_if_unknown": num_heads, **facts}
        state, converted = convert(_floats(state), facts, input_size)
        weights = _assemble(state, facts, [*notes, *converted])
    except ConfigError as error:  # sizes that do not fit together
        raise CheckpointError(f"{path} is no vision transformer that torchmae has: {error.problem}") from error
    except CheckpointError:
        raise
    except Exception as error:  # shapes and facts that fit no model fail in as many ways as there are layers
        raise CheckpointError(f"{path} is no vision transformer that torchmae has: {error!r:.200}") from error
    if norm_pix is None:
        return weights
    if weights.norm_pix not in (None, norm_pix):
        said = "normalised" if weights.norm_pix else "pixels"
        raise ConfigError(f"target is given and {path} says itself that it was {said}", "leave --target out")
    return replace(weights, arguments={**weights.arguments, "norm_pix": norm_pix})


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Parameters under the released checkpoints' names, what config.json says, and notes."""
    config = _read_json(path / "config.json")
    try:
        if "architecture" in config:
            return _tensors_of(path), _timm_facts(path, config), []
        if config.get("model_type") in ("vit_mae", "vit"):
            facts = _huggingface_facts(path, config)
            return names.from_huggingface(_tensors_of(path)), facts, []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error!r}", "copy the folder again") from error
    kind = config.get("model_type", "of an unknown kind")
    raise CheckpointError(
        f"{path} holds a model {kind}", "give a transformers vit or vit_mae folder, or one of timm's vit_*"
    )


def _timm_facts(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
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


def _huggingface_facts(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{path} uses {config['hidden_act']!r} between layers", "torchmae has gelu only")
    size = config.get("image_size", 224)
    facts = {
        "num_heads": config.get("num_attention_heads", 12),
        "input_size": (size, size) if isinstance(size, int) else tuple(size),
        "mean": (0.5,) * config.get("num_channels", 3),
        "std": (0.5,) * config.get("num_channels", 3),
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
        facts |= {to: tuple(values[name]) for name, to in (("image_mean", "mean"), ("image_std", "std"))}
    return facts


def _read_file(path: Path, choice: str | None) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Parameters of the encoder in a single file, what the arguments stored beside it say, and notes."""
    content = read_file(path)
    state, notes = find_encoder(content, choice, str(path))
    stored = content.get("args")
    stored = vars(stored) if isinstance(stored, Namespace) else stored if isinstance(stored, dict) else {}
    stored = {name: plain(value) for name, value in stored.items()}
    facts: dict[str, Any] = {}
    if isinstance(stored.get("norm_pix_loss"), bool):
        facts["norm_pix"] = stored["norm_pix_loss"]
    for name in ("num_heads", "decoder_num_heads", "mean", "std", "mask_ratio"):
        if stored.get(name) is not None:
            value = stored[name].tolist() if isinstance(stored[name], Tensor) else stored[name]
            facts[name] = tuple(value) if isinstance(value, list) else value
    return state, facts, notes


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """All parameters of a folder: one file, or several that an index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = sorted(set(_read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in listed):
            raise CheckpointError(f"{index} names files outside its folder", "do not use it")
        return {name: tensor for file in listed for name, tensor in read_file(folder / file).items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
    raise CheckpointError(f"{folder} has no weights", "there must be a model.safetensors beside its config.json")


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _assemble(state: Mapping[str, Tensor], facts: Mapping[str, Any], notes: list[str]) -> Weights:
    """From parameters in the released checkpoints' layout to encoder and decoder, each whole or refused."""
    origin = facts["origin"]
    encoder, decoder = names.split_official(state)
    if "norm.weight" not in encoder and "fc_norm.weight" in encoder:
        encoder |= {f"norm.{kind}": encoder[f"fc_norm.{kind}"] for kind in ("weight", "bias")}
        notes.append("the last norm stood behind the pooling (fc_norm); here it stands before it")
    unused = sorted(name for name in encoder if _HEAD.match(name))
    encoder = {name: value for name, value in encoder.items() if name not in unused}
    if unused:
        notes.append(f"not used, as it is not part of the encoder: {_listed(unused)}")
    arguments = _encoder_arguments(encoder, facts)
    encoder["pos_embed"] = _whole_positions(encoder["pos_embed"], arguments)
    with torch.device("meta"):
        _insist(encoder, ViTEncoder(**arguments), origin)
    _insist_on_values(encoder, origin)
    usable, decoder_arguments, no_decoder = _take_decoder(decoder, arguments, facts)
    arguments |= decoder_arguments
    if decoder and usable is None:
        notes.append(no_decoder)
    in_chans = arguments["in_chans"]
    mean, std = facts.get("mean", IMAGENET_MEAN), facts.get("std", IMAGENET_STD)
    if len(mean) != in_chans or len(std) != in_chans:
        mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
        notes.append(f"mean and deviation of its {in_chans} channels are not known: {mean[0]:.3g} and {std[0]:.3g}")
    return Weights(
        origin=origin,
        arguments=arguments,
        encoder=encoder,
        decoder=usable,
        no_decoder=no_decoder,
        mean=mean,
        std=std,
        mask_ratio=facts.get("mask_ratio", 0.75),
        notes=tuple(notes),
    )


def _encoder_arguments(encoder: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ViTEncoder`, read off shapes where they show and off `facts` where they do not."""
    origin = facts["origin"]
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in encoder:
            like = sorted(other for other in encoder if re.search(r"pos|rope" if name == "pos_embed" else "mlp", other))
            instead = f" (but {_listed(like)})" if like else ""
            raise CheckpointError(
                f"{origin} holds no vision transformer that torchmae has: it has no {name}{instead}",
                "see docs/weights.md",
            )
    embed_dim, in_chans, *patch = encoder["patch_embed.proj.weight"].shape
    return {
        "input_size": tuple(facts["input_size"]),
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": _depth(encoder),
        "num_heads": _heads(
            embed_dim, facts.get("num_heads"), _HEADS, origin, if_unknown=facts.get("num_heads_if_unknown")
        ),
        "mlp_ratio": _ratio(len(encoder["blocks.0.mlp.fc1.weight"]), embed_dim),
        "class_token": "cls_token" in encoder,
        "registers": encoder["reg_token"].shape[1] if "reg_token" in encoder else 0,
    }


def _take_decoder(
    decoder: dict[str, Tensor], arguments: Mapping[str, Any], facts: Mapping[str, Any]
) -> tuple[dict[str, Tensor] | None, dict[str, Any], str]:
    """The decoder and its arguments of `MaskedAutoencoder`; None and the reason where it cannot be used as a whole."""
    origin = facts["origin"]
    if not decoder:
        return None, {}, f"{origin} holds an encoder only"
    if "pred.weight" not in decoder:
        return None, {}, f"the decoder of {origin} cannot be used: it lacks pred.weight"
    embed_dim = decoder["pred.weight"].shape[1]
    taken: dict[str, Any] = {
        "decoder": "self",
        "decoder_embed_dim": embed_dim,
        "decoder_depth": _depth(decoder),
        "decoder_num_heads": _heads(embed_dim, facts.get("decoder_num_heads"), _DECODER_HEADS, origin),
    }
    problem = _decoder_problem(decoder, arguments, taken)
    if problem is not None:
        return None, {}, f"the decoder of {origin} cannot be used: {problem}"
    if facts.get("norm_pix") is not None:
        taken["norm_pix"] = facts["norm_pix"]
    return {**decoder, "pos_embed": decoder["pos_embed"][:, 1:]}, taken, ""


def _decoder_problem(
    decoder: Mapping[str, Tensor], arguments: Mapping[str, Any], decoder_arguments: Mapping[str, Any]
) -> str | None:
    """Why a decoder cannot be used, or None."""
    positions = decoder.get("pos_embed")
    if positions is None or bool(positions[:, 0].any()):
        return "its positions are missing, or give the class token one, which torchmae's has not"
    grid = tuple(size // patch for size, patch in zip(arguments["input_size"], arguments["patch_size"], strict=True))
    with torch.device("meta"):
        own = SelfDecoder(
            arguments["embed_dim"],
            grid,
            embed_dim=decoder_arguments["decoder_embed_dim"],
            depth=decoder_arguments["decoder_depth"],
            num_heads=decoder_arguments["decoder_num_heads"],
            out_dim=math.prod(arguments["patch_size"]) * arguments["in_chans"],
            mlp_ratio=arguments["mlp_ratio"],
        )
    return _difference({**decoder, "pos_embed": positions[:, 1:]}, own)


def _whole_positions(positions: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Positions with rows of the class token and registers, of zeros where timm's model gives them none."""
    patches = math.prod(
        size // patch for size, patch in zip(arguments["input_size"], arguments["patch_size"], strict=True)
    )
    prefix = arguments["class_token"] + arguments["registers"]
    return nn.functional.pad(positions, (0, 0, prefix, 0)) if positions.shape[1] == patches else positions


def _insist(given: Mapping[str, Tensor], module: nn.Module, origin: str) -> None:
    problem = _difference(given, module)
    if problem:
        raise CheckpointError(f"{origin} is no vision transformer that torchmae has: {problem}", "see docs/weights.md")


def _insist_on_values(given: Mapping[str, Tensor], origin: str) -> None:
    """Refuses matrices of zeros, as a download that stopped leaves them, and values that are no finite floats."""
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{origin} holds {tensor.dtype} in {name}", "give the weights before quantisation")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{origin} holds values that are not finite in {name}", "use another checkpoint")
        if name.endswith(".weight") and tensor.ndim > 1 and not bool(tensor.any()):
            raise CheckpointError(f"{origin} holds nothing but zeros in {name}", "download it again")


def _difference(given: Mapping[str, Tensor], module: nn.Module) -> str | None:
    """What parameters lack, have too much, or have in another shape, or None."""
    wanted = module.state_dict()
    missing, odd = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing:
        return f"it lacks {_listed(missing)}"
    if odd:
        return f"it has {_listed(odd)} besides"
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            return f"{name} is {tuple(tensor.shape)} where {tuple(wanted[name].shape)} is wanted"
    return None


def _depth(weights: Mapping[str, Tensor]) -> int:
    # Not one more than the largest: a name alone would then ask for any number of blocks.
    return len({name.split(".")[1] for name in weights if re.match(r"blocks\.\d+\.", name)})


def _ratio(hidden: int, dim: int) -> float:
    """The ratio that gives `hidden` again when `dim` times it is rounded down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _heads(
    width: int, given: int | None, known: Mapping[int, int], origin: str, *, if_unknown: int | None = None
) -> int:
    heads = known.get(width, if_unknown) if given is None else given
    if heads is None:
        raise CheckpointError(
            f"{origin} does not say how many attention heads a width of {width} is divided among",
            "give a folder with its config.json, or say --model.num_heads to pretrain",
        )
    return heads


def _listed(items: list[str]) -> str:
    more = len(items) - _MAX_LISTED
    return ", ".join(items[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "copy the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object", "copy the folder again")
    return values
