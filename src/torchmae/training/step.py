"""One training step: masks, the forward and backward passes, the optimisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae.config import PretrainConfig
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.compilation import compile_model
from torchmae.training.optim import gradient_norm
from torchmae.training.parallel import checkpoint_activations, exchanging, parallelise, whole
from torchmae.training.runtime import Runtime


def prepare(model: MaskedAutoencoder, config: PretrainConfig, runtime: Runtime) -> nn.Module:
    """What the loop calls in place of the model: saving activations, compiled, spread over ranks, in this order."""
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        by_block = config.parallel == "fsdp" and runtime.ranks.world_size > 1
        compile_model(model, runtime.device, budget=config.activation_memory_budget, by_block=by_block)
    return parallelise(model, config, runtime)


class Step(NamedTuple):
    """What a step gives: numbers on the device, the same on all ranks, not waited for.

    Attributes:
        loss: scalar, the batch's loss.
        norm: scalar, of the gradients before clipping.
        losses: (T,), the loss of each of the model's targets.
    """

    loss: Tensor
    norm: Tensor
    losses: Tensor


def train_step(
    model: MaskedAutoencoder,
    optimizers: Sequence[Optimizer],
    images: Tensor,
    mask: Any,
    config: PretrainConfig,
    runtime: Runtime,
    *,
    wrapped: nn.Module | None = None,
    parts: int | None = None,
) -> Step:
    """One optimiser step on one batch: this rank's images of it, computed in parts.

    The loss of each part on each rank counts by its share of the values predicted on all, so the step is the whole
    batch's, whatever ranks and parts. Where the loss or a gradient is not finite, nothing is changed.

    Args:
        model: the model.
        optimizers: of its parameters.
        images: (B, C, *size); none, where a batch has fewer images than there are ranks.
        mask: for each of them.
        config: accumulation and clipping.
        runtime: where to compute.
        wrapped: what to call in its place, as `prepare` gives it; None: the model.
        parts: how many, the same on all ranks; None: config.accumulate.
    """
    forward = model if wrapped is None else wrapped
    world_size = runtime.ranks.world_size
    counts = bool(len(images))
    if not counts:  # a stand-in takes part in the exchange of gradients, and weighs nothing
        images = images.new_zeros(1, *images.shape[1:])
        masker = Masker(model.encoder, config.mask.strategy, config.mask.ratio).for_images(images)
        mask = masker(config.seed, 0, np.zeros(1, dtype=np.int64), images.device)
    values = model.target.num_values(mask) * counts
    all_values: int | Tensor = max(values, 1)
    if world_size > 1:
        tensor = torch.full((), values, dtype=torch.float64, device=images.device)
        all_values = runtime.ranks.sum(tensor).clamp(min=1)
    images_parts = images.tensor_split(min(parts or config.accumulate, len(images)))
    mask_parts = mask.tensor_split(len(images_parts))
    total = torch.zeros(1 + len(model.targets), device=images.device)
    for i, (part, part_mask) in enumerate(zip(images_parts, mask_parts, strict=True)):
        with exchanging(forward, i == len(images_parts) - 1):
            with runtime.autocast():
                output = forward(part, part_mask)
            share: float | Tensor = world_size  # of the step's loss; the exchange takes the mean over ranks
            if len(images_parts) > 1 or world_size > 1:
                share = share * (model.target.num_values(part_mask) * counts / all_values)
            (output.loss * share).backward()
            total += torch.stack([output.loss.detach(), *output.losses]) * (share / world_size)
    runtime.ranks.sum(total)
    norm = whole(gradient_norm(model))
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip_grad, norm)
    step_if_finite(optimizers, total[0], norm)
    return Step(total[0], norm, total[1:])


def step_if_finite(optimizers: Sequence[Optimizer], loss: Tensor, norm: Tensor) -> None:
    """Takes the step and clears the gradients; leaves weights and moments alone where the loss or norm is not finite.

    A GPU is not waited for where the optimisers can decide there themselves, as they do for `torch.amp.GradScaler`.
    """
    skip = ~(loss.isfinite() & norm.isfinite())
    on_device = skip.device.type == "cuda" and all(
        getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers
    )
    take = on_device or not skip.item()
    for optimizer in optimizers:
        if on_device:
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        if take:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
