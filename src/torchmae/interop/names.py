"""Parameter names of torchmae, of the released MAE checkpoints and of transformers.

Conversions go through the released checkpoints' layout: timm's names for the encoder, as in torchmae, and names such as
decoder_blocks for the decoder. transformers has two spellings. The classic one
(vit.encoder.layer.0.attention.attention.query) is loaded by all its versions and written here; the new one
(vit.layers.0.attention.q_proj) is also read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from torchmae.interop.conversions import join_attention

_DECODER = {
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "embed": "decoder_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "pred": "decoder_pred",
}
# Parts of names between dots: in the released layout, and in transformers' classic spelling.
_HF = (
    ("decoder_blocks", "decoder_layers"),
    ("blocks", "encoder.layer"),
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("norm", "layernorm"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.q", "attention.attention.query"),
    ("attn.k", "attention.attention.key"),
    ("attn.v", "attention.attention.value"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
_HF_NEW = (
    # transformers 5.23 writes the decoder's layers so: it replaces "layers" by "encoder.layer" everywhere.
    ("decoder_blocks", "decoder_encoder.layer"),
    ("blocks", "layers"),
    ("attn.q", "attention.q_proj"),
    ("attn.k", "attention.k_proj"),
    ("attn.v", "attention.v_proj"),
    ("attn.proj", "attention.o_proj"),
)


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a masked autoencoder with the paper's decoder, under the released checkpoints' names."""
    named = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "encoder":
            named[rest] = tensor
        elif part != "decoder":  # a head for training only, which the layout does not have
            continue
        elif rest == "pos_embed":  # the layout has a row of zeros for the class token
            named["decoder_pos_embed"] = F.pad(tensor, (0, 0, 1, 0))
        else:
            head, dot, tail = rest.partition(".")
            named[f"{_DECODER[head]}{dot}{tail}"] = tensor
    return named


def split_official(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's and the decoder's parameters in the released layout, under torchmae's names.

    The decoder's positions keep the class token's row. Unknown names that begin with "decoder" go to the decoder.
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
    """Parameters in the released layout, under transformers' classic names.

    `prefix` is put before the encoder's names: "vit." for ViTMAEForPreTraining, "" for ViTModel.
    """
    named = {}
    for name, tensor in weights.items():
        of_decoder = name.startswith(("decoder_", "mask_token"))
        parts = [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]
        for part, value in zip(parts, tensor.chunk(3) if len(parts) == 3 else [tensor], strict=True):
            named[("decoder." if of_decoder else prefix) + _renamed(part, _HF)] = value
    return named


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ViT or ViTMAE parameters, in either spelling, in the released layout; other names stay."""
    ours = [(theirs, name) for name, theirs in (*_HF_NEW, *_HF)]
    named = {}
    for name, tensor in weights.items():
        named[_renamed(name.removeprefix("vit.").removeprefix("decoder."), ours)] = tensor
    return join_attention(named, [])


def from_pixio(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the parameters of transformers' Pixio to the released layout.

    Of the class tokens, the first becomes `cls_token` and the others `reg_token`, each with its own position added.
    """
    named = from_huggingface({name.removeprefix("pixio."): tensor for name, tensor in weights.items()})
    tokens, positions = named["cls_token"], named["pos_embed"]
    placed, count = tokens + positions[:, : tokens.shape[1]], tokens.shape[1]
    registers = {"reg_token": placed[:, 1:]} if count > 1 else {}
    return {**named, "cls_token": placed[:, :1], **registers, "pos_embed": positions[:, count:]}


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A parameter's name in which each pair, in order, replaces whole parts between dots."""
    for old, new in pairs:
        name = f".{name}.".replace(f".{old}.", f".{new}.", 1)[1:-1]
    return name
