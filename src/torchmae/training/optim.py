"""Parameter groups, optimisers, learning-rate schedule (paper, table 8), and norms of gradients and updates."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae.config import OptimConfig
from torchmae.nn.mae import no_weight_decay
from torchmae.training.muon import BatchedMuon
from torchmae.training.parallel import whole


def peak_lr(config: OptimConfig, batch_size: int) -> float:
    """The learning rate after warm-up: `lr` if given, else base_lr * batch_size / 256 (Goyal et al. 2017)."""
    return config.lr if config.lr is not None else config.base_lr * batch_size / 256


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """The learning rate of step 0 to total - 1 as a share of the peak.

    Linear warm-up over the first `warmup * total` steps, whose last step has the peak; then cosine to `min_lr`, or
    constant.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + cos(pi * progress))


def build_optimizers(model: nn.Module, config: OptimConfig, batch_size: int) -> list[Optimizer]:
    """The optimisers of a model; each parameter group has "peak_lr" beside "lr".

    With "muon", `BatchedMuon` updates the matrices of the transformer blocks, and AdamW everything else.
    """
    lr = peak_lr(config, batch_size)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizers: list[Optimizer] = []
    if config.name == "muon":
        hidden = [p for name, p in named if _is_hidden_matrix(name, p)]
        named = [(name, p) for name, p in named if not _is_hidden_matrix(name, p)]
        optimizers.append(BatchedMuon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
    decayed = [p for name, p in named if not no_weight_decay(name, p)]
    plain = [p for name, p in named if no_weight_decay(name, p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    optimizers.append(kind([group for group in groups if group["params"]], lr=lr, betas=config.betas, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Sets every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def gradient_norm(model: nn.Module) -> Tensor:
    """The joint norm of all gradients: a scalar on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def copy_matrices(model: nn.Module) -> list[Tensor]:
    """Copies of the trained weight matrices, for `update_to_weight`; vectors say little about the size of a step."""
    return [parameter.detach().clone() for parameter in _matrices(model)]


def update_to_weight(before: Sequence[Tensor], model: nn.Module) -> Tensor:
    """The norm of a step's update over the norm of the weights, over all matrices: a scalar on their device.

    `before` is from `copy_matrices`. Around 1e-3 is usual. A lasting 1e-2 means that the learning rate is too high,
    1e-5 that it is too low.
    """
    changes = [now.detach() - then for now, then in zip(_matrices(model), before, strict=True)]
    norm = torch.nn.utils.get_total_norm
    return whole(norm(changes)) / whole(norm(before)).clamp(min=1e-12)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim >= 2]


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "blocks." in name
