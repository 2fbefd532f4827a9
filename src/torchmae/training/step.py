"""One training step: masks, the forward and backward passes, the optimisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae.config import MaskConfig, PretrainConfig
from torchmae.data.loader import Batch
from torchmae.data.transforms import to_device
from torchmae.nn.autoencoder import Autoencoder
from torchmae.nn.masking import Mask
from torchmae.random import Purpose, uniform
from torchmae.training.compilation import compile_model
from torchmae.training.optim import gradient_norm
from torchmae.training.parallel import checkpoint_activations, exchanging, parallelise, whole
from torchmae.training.runtime import Runtime


def prepare(model: Autoencoder, config: PretrainConfig, runtime: Runtime) -> nn.Module:
    """What the loop calls in place of the model: saving activations, compiled, spread over ranks, in this order."""
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if config.compile:
        by_block = config.parallel == "fsdp" and runtime.ranks.world_size > 1
        compile_model(model, runtime.device, budget=config.activation_memory_budget, by_block=by_block)
    return parallelise(model, config, runtime)


def train_step(
    model: Autoencoder,
    optimizers: Sequence[Optimizer],
    images: Tensor,
    mask: Any,
    config: PretrainConfig,
    runtime: Runtime,
    *,
    wrapped: nn.Module | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
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

    Returns:
        The batch's loss and the norm of its gradients before clipping: scalars on the device, the same on all ranks,
        not waited for.
    """
    forward = model if wrapped is None else wrapped
    world_size = runtime.ranks.world_size
    counts = bool(len(images))
    if not counts:  # a stand-in takes part in the exchange of gradients, and weighs nothing
        images = images.new_zeros(1, *images.shape[1:])
        mask = stand_in_mask(model, config.mask, images)
    targets = model.num_targets(mask) * counts
    all_targets: int | Tensor = max(targets, 1)
    if world_size > 1:
        tensor = torch.full((), targets, dtype=torch.float64, device=images.device)
        all_targets = runtime.ranks.sum(tensor).clamp(min=1)
    images_parts = images.tensor_split(min(parts or config.accumulate, len(images)))
    mask_parts = split_mask(mask, len(images_parts))
    total = torch.zeros((), device=images.device)
    for i, (part, part_mask) in enumerate(zip(images_parts, mask_parts, strict=True)):
        with exchanging(forward, i == len(images_parts) - 1):
            with runtime.autocast():
                loss = forward(part, part_mask).loss
            if len(images_parts) > 1 or world_size > 1:
                loss = loss * (model.num_targets(part_mask) * counts / all_targets)
            (loss * world_size).backward()  # of which the exchange takes the mean over ranks
            total += loss.detach()
    runtime.ranks.sum(total)
    norm = whole(gradient_norm(model))
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip_grad, norm)
    step_if_finite(optimizers, total, norm)
    return total, norm


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


def stand_in_mask(model: Autoencoder, config: MaskConfig, images: Tensor) -> Any:
    """Some mask of one image of the same size."""
    size = images.shape[2:]
    noise = torch.zeros(1, model.noise_count(config.strategy, size), device=images.device)
    return model.draw_mask(config.strategy, noise, config.ratio, size)


def draw_mask(
    model: Autoencoder,
    config: MaskConfig,
    seed: int,
    batch: Batch,
    device: torch.device,
    ratio: float | None = None,
    size: Sequence[int] | None = None,
) -> Any:
    """The masks of a batch: a function of the seed, the epoch and each sample's index.

    `ratio` and `size` replace the configuration's and the model's.
    """
    count = model.noise_count(config.strategy, size)
    noise = torch.from_numpy(uniform(seed, batch.epoch, batch.indices, Purpose.MASK, count))
    return model.draw_mask(config.strategy, to_device(noise, device), ratio or config.ratio, size)


def split_mask(mask: Mask | Tensor, parts: int) -> Sequence[Mask | Tensor]:
    """Cuts the mask of a batch into parts, as `Tensor.tensor_split` cuts the batch."""
    if isinstance(mask, Tensor):
        return mask.tensor_split(parts)
    pairs = zip(mask.ids_keep.tensor_split(parts), mask.ids_masked.tensor_split(parts), strict=True)
    return [Mask(*pair) for pair in pairs]
