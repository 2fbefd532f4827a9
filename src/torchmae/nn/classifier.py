"""A vision transformer that names what an image shows. Its state_dict is a timm VisionTransformer's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from torchmae.nn.encoder import ViTEncoder
from torchmae.nn.layers import LAYER_NORM_EPS, Block


class Classifier(ViTEncoder):
    """The encoder, the mean of its patch tokens, a norm, and one linear layer (paper section A.1).

    The parameter names are those of timm's VisionTransformer with `global_pool="avg"`: the norm stands after the
    pooling (`fc_norm`), and the encoder's own `norm` is gone.

    Args:
        num_classes: values that it gives for each image.
        **encoder: arguments of `ViTEncoder`.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__(**encoder)
        self.norm = nn.Identity()  # type: ignore[assignment]  # in the place of a norm of single tokens
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(self.embed_dim, num_classes)
        # From zero, the first steps teach the head alone and leave what was learned before as it is.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # logits, in place of tokens
        """Logits.

        Args:
            images: (B, C, *size) float; a size other than the one trained on has its positions resampled.

        Returns:
            (B, num_classes).
        """
        return self.head(self.fc_norm(super().forward(images).patches.mean(1)))

    def copy_encoder(self, encoder: ViTEncoder) -> None:
        """Takes a pre-trained encoder's weights, all but its last norm; `fc_norm` and `head` stay as they are."""
        weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("norm.")}
        missing, unexpected = self.load_state_dict(weights, strict=False)
        assert not unexpected
        assert {name.partition(".")[0] for name in missing} == {"fc_norm", "head"}


def encoder_arguments(encoder: ViTEncoder) -> dict[str, Any]:
    """Arguments that construct an encoder of the same shape; without its `drop_path`."""
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    registers = encoder.num_prefix_tokens - encoder.has_class_token
    hidden, dim = block.mlp.fc1.out_features, encoder.embed_dim
    mlp_ratio = hidden / dim
    if int(dim * mlp_ratio) < hidden:  # the quotient came out a hair too low
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "input_size": tuple(g * p for g, p in zip(encoder.grid, encoder.patch_size, strict=True)),
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "embed_dim": dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio,
        "class_token": encoder.has_class_token,
        **({"registers": registers} if registers else {}),
    }
