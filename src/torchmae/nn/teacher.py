"""The teacher target: features of a frozen network for the whole image, as in EVA (Fang et al. 2023)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.errors import ConfigError
from torchmae.nn.masking import Mask
from torchmae.nn.patches import gather
from torchmae.nn.targets import Target

if TYPE_CHECKING:
    from torchmae.nn.mae import MaskedAutoencoder


class TeacherTarget(Target):
    """Features of each patch by a frozen network, normalised over their width.

    The teacher's weights are not part of the model: no state_dict holds them, and copies of the model share them.

    Args:
        teacher: a network, which is copied; the copy moves to the images' device when it is first used. None: call
            `attach` before training.
        dim: width of its features.
        encode: maps the teacher and images (B, C, *size) to features (B, L, dim) of the patches of the model's grid, in
            row-major order. For a torchmae model `lambda model, images: model.encode(images, "tokens")`; for a timm
            model without prefix tokens `lambda model, images: model.forward_features(images)`.
        weight: of the loss.
    """

    label = "a teacher's features"

    def __init__(
        self,
        teacher: nn.Module | None,
        dim: int,
        encode: Callable[[Any, Tensor], Tensor] = lambda teacher, images: teacher(images),
        weight: float = 1.0,
    ) -> None:
        super().__init__("teacher", dim, weight)
        self.teacher = None if teacher is None else copy.deepcopy(teacher).eval().requires_grad_(False)
        self.encode = encode

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherTarget:
        return self

    @torch.no_grad()
    def hidden_values(self, images: Tensor, mask: Mask) -> Tensor:
        """(B, M, dim) float32; ConfigError: no teacher, or features of another shape."""
        if self.teacher is None:
            raise ConfigError("the teacher was not loaded", "train with model.teacher, or call nn.teacher.attach")
        features = self.encode(self.teacher.to(images.device), images)
        if len(features) != len(images) or features.shape[2:] != (self.dim,):
            raise ConfigError(
                f"the teacher's features have shape {tuple(features.shape)}",
                f"they must have shape ({len(images)}, patches, {self.dim})",
            )
        return F.layer_norm(gather(features.float(), mask.ids_masked), (self.dim,))


def attach(model: MaskedAutoencoder, teacher: nn.Module) -> None:
    """Sets the teacher of a model's `TeacherTarget`, and freezes it."""
    for target in model.targets:
        if isinstance(target, TeacherTarget):
            target.teacher = teacher.eval().requires_grad_(False)
