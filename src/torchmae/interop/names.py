"""Parameter names: torchmae's, those of the released MAE checkpoints, and transformers'.

The released checkpoints' layout is the one in the middle. Its encoder has timm's names, as ours has; its decoder's
parameters stand beside them as mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm and
decoder_pred. transformers has two spellings: the classic one (vit.encoder.layer.0.attention.attention.query), which all
its versions load and which is written here, and the one that its newer versions use themselves
(vit.layers.0.attention.q_proj). Both are read.
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
# The released layout's names and transformers' classic ones, each between dots; the first that fits is replaced.
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
    # transformers 5.23 writes its decoder's layers so, meaning to turn "layers" back into "encoder.layer".
    ("decoder_blocks", "decoder_encoder.layer"),
    ("blocks", "layers"),
    ("attn.q", "attention.q_proj"),
    ("attn.k", "attention.k_proj"),
    ("attn.v", "attention.v_proj"),
    ("attn.proj", "attention.o_proj"),
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
    """The released checkpoints' layout, an encoder alone too, under transformers' classic names.

    `prefix` stands before the encoder's names: "vit." in ViTMAEForPreTraining, "" in ViTModel.
    """
    named = {}
    for name, tensor in weights.items():
        of_decoder = name.startswith(("decoder_", "mask_token"))
        parts = [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]
        for part, value in zip(parts, tensor.chunk(3) if len(parts) == 3 else [tensor], strict=True):
            named[("decoder." if of_decoder else prefix) + _renamed(part, _HF)] = value
    return named


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ViT or ViTMAE parameters, in either spelling, under the released checkpoints' names.

    Names that neither model has are kept as they are.
    """
    ours = [(theirs, name) for name, theirs in (*_HF_NEW, *_HF)]
    named = {}
    for name, tensor in weights.items():
        named[_renamed(name.removeprefix("vit.").removeprefix("decoder."), ours)] = tensor
    return join_attention(named, [])


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A parameter's name with whole parts of it replaced, in the order of `pairs`."""
    for old, new in pairs:
        name = f".{name}.".replace(f".{old}.", f".{new}.", 1)[1:-1]
    return name
