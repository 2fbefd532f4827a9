"""Masked pre-training as a task of the trainer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.config import MaskConfig, RefineConfig
from torchmae.data.loader import Batch
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.compilation import compile_model
from torchmae.training.optim import build_optimizers
from torchmae.training.parallel import checkpoint_activations, wrap_ddp
from torchmae.training.runtime import Runtime
from torchmae.training.task import Fixes, Inputs, LoopSettings, Task

_RESAMPLING = {1: "linear", 2: "bicubic", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(LoopSettings):
    """How a masked autoencoder is trained: fields of `PretrainConfig`, `start_size` with one number for each axis."""

    mask: MaskConfig
    refine: RefineConfig
    start_size: tuple[int, ...] | None
    start_share: float
    parallel: str
    compress_gradients: bool
    checkpoint_activations: bool
    activation_memory_budget: float


class PretrainTask(Task):
    """A masked autoencoder that learns to predict what was masked.

    The model, which `place` has put on the runtime's device, is changed in place: activation checkpointing,
    compilation, DDP. `batch_size`, of all ranks together, scales the learning rate.
    """

    fixes = Fixes(
        "go on with: torchmae pretrain --resume {folder}",
        "go on from it with a smaller step: torchmae pretrain --resume {folder} --optim.lr LR "
        "(or --optim.clip_grad 1, or --precision fp32)",
        "resume with --accumulate {accumulate} (the same steps in less memory), or start again with --batch_size "
        "{batch_size}",
        "resume with --checkpoint_activations true, or choose a smaller model, or start again with --batch_size "
        "{batch_size}",
    )

    def __init__(self, loop: PretrainSettings, model: MaskedAutoencoder, runtime: Runtime, batch_size: int) -> None:
        self.autoencoder = model
        self.runtime = runtime
        self.names = tuple(target.name for target in model.targets)
        self.loop: PretrainSettings = loop
        self.model = self.wrapped(model)
        self._masker = Masker(model.encoder, **asdict(loop.mask))
        sharded = loop.parallel == "fsdp" and runtime.ranks.world_size > 1
        if loop.checkpoint_activations:
            checkpoint_activations(model)
        if loop.compile:
            compile_model(self.model, runtime.device, budget=loop.activation_memory_budget, by_block=sharded)
        self.forward: nn.Module = self.model
        if not sharded:
            self.forward = wrap_ddp(self.model, runtime, loop.accumulate, compress=loop.compress_gradients)
        self.optimizers = build_optimizers(self.model, loop.optim, batch_size)

    def wrapped(self, model: MaskedAutoencoder) -> nn.Module:
        """The module that computes the losses: here the model itself."""
        return model

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images and their masks; the first part of a run may have small images (DailyMAE, arXiv 2404.00509)."""
        images, valid, size = batch.images, batch.valid, self.loop.start_size
        if size is not None and size != tuple(images.shape[2:]) and step < self.loop.start_share * total:
            images = F.interpolate(images, size=size, mode=_RESAMPLING[len(size)], antialias=len(size) == 2)
            if valid is not None:
                valid = F.interpolate(valid.float(), size=size, mode="area") > 0.5
                images = torch.where(valid, images, 0.0)
        masker = self._masker.at(step, total).for_images(images)
        return images, masker(self.loop.seed, batch.epoch, batch.indices, self.runtime.device, valid)

    def stand_in(self, inputs: Inputs) -> Inputs:
        """As `Task.stand_in`."""
        images = inputs[0].new_zeros(1, *inputs[0].shape[1:])
        return images, self._masker.for_images(images)(self.loop.seed, 0, np.zeros(1, dtype=np.int64), images.device)

    def weight(self, inputs: Inputs) -> int:
        """Number of predicted values that count."""
        return self.autoencoder.target.num_values(self.autoencoder.predicted(inputs[1]))

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The weighted sum of the targets' losses, then each target's."""
        with self.runtime.autocast():
            output = self.forward(*inputs)
        return output.loss, *(loss.detach() for loss in output.losses)
