"""How large a step is beside the weights it changes: the quickest check of a learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchmae.training.parallel import whole


def copy_matrices(model: nn.Module) -> list[Tensor]:
    """Copies of a model's trained weight matrices (and larger), to compare with after a step.

    Biases, norms and other vectors are left out: they start at zero or one, and say nothing of the learning rate.
    """
    return [parameter.detach().clone() for parameter in _matrices(model)]


def update_to_weight(before: Sequence[Tensor], model: nn.Module) -> Tensor:
    """The norm of what a step changed over the norm of what was there, over all weight matrices together.

    Around 1e-3 is usual; 1e-2 and more for long is a learning rate too high, 1e-5 one too low.

    Args:
        before: as `copy_matrices` gave them.
        model: after the step.

    Returns:
        A scalar on the model's device, not waited for.
    """
    changes = [now.detach() - then for now, then in zip(_matrices(model), before, strict=True)]
    norm = torch.nn.utils.get_total_norm
    return whole(norm(changes)) / whole(norm(before)).clamp(min=1e-12)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim >= 2]
