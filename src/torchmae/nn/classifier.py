"""Image classifiers: an encoder with a linear head. Their state_dict is timm's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from torchmae.nn.encoder import Encoder, ViTEncoder
from torchmae.nn.layers import LAYER_NORM_EPS


class Classifier(Encoder):
    """The encoder without its last norm, the mean of its patch tokens, a norm and a linear layer (paper section A.1).

    A subclass also inherits from its encoder, which takes the arguments `encoder`, and names norm and layer as timm
    does.
    """

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__(**encoder)
        self.num_classes = num_classes

    def build_head(self) -> tuple[nn.Module, nn.Module]:
        """A norm and a linear layer of zeros, so that the first steps change the head alone."""
        linear = nn.Linear(self.embed_dim, self.num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS), linear

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Mean patch tokens (B, D) to logits (B, num_classes)."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, *size), of any size that the encoder takes, to logits (B, num_classes)."""
        return self.classify(super().forward(images).patches.mean(1))

    def copy_encoder(self, encoder: Encoder) -> None:
        """Copies a pre-trained encoder's weights, all but its last norm."""
        own = self.state_dict()
        self.load_state_dict(own | {name: value for name, value in encoder.state_dict().items() if name in own})


class ViTClassifier(Classifier, ViTEncoder):  # type: ignore[misc]  # logits, in place of tokens
    """A vision transformer that classifies: timm's VisionTransformer with `global_pool="avg"`."""

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__(num_classes, **encoder)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.fc_norm, self.head = self.build_head()

    def classify(self, features: Tensor) -> Tensor:
        """As `Classifier.classify`."""
        return self.head(self.fc_norm(features))
