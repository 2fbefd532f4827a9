"""Parameter names: torchmae's, those of the released MAE checkpoints, and transformers'.

The released checkpoints' layout is the one in the middle. Its encoder has timm's names, as ours has; its decoder's
parameters stand beside them as mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm and
decoder_pred. transformers has two spellings: the classic one (vit.encoder.layer.0.attention.attention.query), which all
its versions load and which is written here, and the one that its newer versions use themselves
(vit.layers.0.attention.q_proj). Both are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_DECODER = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed": "decoder_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "pred": "decoder_pred",
}
_HF_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_NEW_TO_CLASSIC = (
    (re.compile(r"^(vit\.)?layers\."), r"\1encoder.layer."),
    # transformers 5.23 writes its decoder's layers so, meaning to turn "layers" back into "encoder.layer".
    (re.compile(r"^decoder\.decoder_encoder\.layer\."), "decoder.decoder_layers."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)
_BLOCK = re.compile(r"^(?P<part>blocks|decoder_blocks)\.(?P<number>\d+)\.(?P<name>.+)\.(?P<kind>weight|bias)$")
_HF_LAYER = re.compile(
    r"^(?P<part>encoder\.layer|decoder\.decoder_layers)\.(?P<number>\d+)\.(?P<name>.+)\.(?P<kind>weight|bias)$"
)


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A masked autoencoder's state_dict (paper's decoder) under the released checkpoints' names."""
    named = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "encoder":
            named[rest] = tensor
        elif part != "decoder":  # a head of training alone, which the layout has no place for
            continue
        elif rest == "pos_embed":  # theirs has a row of zeros for the class token
            named["decoder_pos_embed"] = F.pad(tensor, (0, 0, 1, 0))
        else:
            head, dot, tail = rest.partition(".")
            named[f"{_DECODER[head]}{dot}{tail}"] = tensor
    return named


def split_official(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's and the decoder's parameters of the released checkpoints' layout, under torchmae's names.

    The decoder's positions keep the class token's row. Other names that begin with "decoder" are the decoder's, too.
    """
    ours = {theirs: name for name, theirs in _DECODER.items()}
    encoder, decoder = {}, {}
    for name, tensor in weights.items():
        head, dot, tail = name.partition(".")
        if head in ours or head.startswith("decoder"):
            decoder[f"{ours.get(head, head)}{dot}{tail}"] = tensor
        else:
            encoder[name] = tensor
    return encoder, decoder


def to_huggingface(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The released checkpoints' layout under transformers' classic names.

    Args:
        weights: under the released checkpoints' names; an encoder alone, too.
        prefix: before the encoder's names: "vit." in ViTMAEForPreTraining, "" in ViTModel.
    """
    named = {}
    for name, tensor in weights.items():
        block = _BLOCK.match(name)
        if block is None:
            head, kind = _split_kind(name)
            in_decoder = head == "mask_token" or head.startswith("decoder_")
            named[f"decoder.{name}" if in_decoder else f"{prefix}{_HF_ENCODER[head]}{kind}"] = tensor
            continue
        of_encoder = block["part"] == "blocks"
        layer = f"{prefix}encoder.layer" if of_encoder else "decoder.decoder_layers"
        layer = f"{layer}.{block['number']}"
        if block["name"] == "attn.qkv":
            for part, value in zip(_HF_QKV, tensor.chunk(3), strict=True):
                named[f"{layer}.{part}.{block['kind']}"] = value
        else:
            named[f"{layer}.{_HF_BLOCK[block['name']]}.{block['kind']}"] = tensor
    return named


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ViT or ViTMAE parameters, in either spelling, under the released checkpoints' names.

    Names that neither model has are kept as they are.
    """
    encoder = {theirs: name for name, theirs in _HF_ENCODER.items()}
    inside = {theirs: name for name, theirs in _HF_BLOCK.items()}
    named: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for given, tensor in weights.items():
        name = _classic(given).removeprefix("vit.")
        layer = _HF_LAYER.match(name)
        head, kind = _split_kind(name)
        if layer is None:
            decoder = head.startswith("decoder.")
            named[name.removeprefix("decoder.") if decoder else f"{encoder.get(head, head)}{kind}"] = tensor
            continue
        part = "blocks" if layer["part"] == "encoder.layer" else "decoder_blocks"
        block = f"{part}.{layer['number']}"
        if layer["name"] in _HF_QKV:
            qkv.setdefault(f"{block}.attn.qkv.{layer['kind']}", {})[layer["name"]] = tensor
        else:
            named[f"{block}.{inside.get(layer['name'], layer['name'])}.{layer['kind']}"] = tensor
    for name, parts in qkv.items():
        if set(parts) == set(_HF_QKV):
            named[name] = torch.cat([parts[part] for part in _HF_QKV])
    return named


def _classic(name: str) -> str:
    for pattern, replacement in _NEW_TO_CLASSIC:
        name = pattern.sub(replacement, name)
    return name


def _split_kind(name: str) -> tuple[str, str]:
    """("norm", ".weight") of "norm.weight"; ("cls_token", "") of "cls_token"."""
    head, _, kind = name.rpartition(".")
    return (head, f".{kind}") if kind in ("weight", "bias") else (name, "")
