"""An encoder that names what an image shows. Its state_dict is that of timm's model."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from torchmae.nn.encoder import Encoder, ViTEncoder
from torchmae.nn.layers import LAYER_NORM_EPS


class Classifier(Encoder):
    """The encoder, the mean of its patch tokens, a norm, and one linear layer (paper section A.1).

    A subclass names the last two as timm does, and is a subclass of its encoder too. The norm stands after the pooling;
    the encoder's own last norm is gone.

    Args:
        num_classes: values that it gives for each image.
        **encoder: arguments of the encoder.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__(**encoder)
        self.num_classes = num_classes

    def build_head(self) -> tuple[nn.Module, nn.Module]:
        """The norm, and a linear layer from zero: the first steps teach it alone and leave what was learned before."""
        linear = nn.Linear(self.embed_dim, self.num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS), linear

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """(B, D), the mean of the tokens, to logits (B, num_classes)."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, *size), which the encoder may take in other sizes too."""
        return self.classify(super().forward(images).patches.mean(1))

    def copy_encoder(self, encoder: Encoder) -> None:
        """Takes a pre-trained encoder's weights, all but its last norm; the head stays as it is."""
        own = self.state_dict()
        self.load_state_dict(own | {name: value for name, value in encoder.state_dict().items() if name in own})


class ViTClassifier(Classifier, ViTEncoder):  # type: ignore[misc]  # logits, in place of tokens
    """A vision transformer that classifies: timm's VisionTransformer with `global_pool="avg"`."""

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__(num_classes, **encoder)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.fc_norm, self.head = self.build_head()

    def classify(self, features: Tensor) -> Tensor:
        """(B, D) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.fc_norm(features))
        return logits
