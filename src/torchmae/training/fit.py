"""The largest batch that a GPU's memory takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError, TrainingError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training.allocation import ran_out_of_memory
from torchmae.training.compilation import plain_at_the_end
from torchmae.training.pretrain import PretrainTask
from torchmae.training.ranks import ALONE
from torchmae.training.runtime import Runtime
from torchmae.training.trainer import train_step

USABLE = 0.9  # of a GPU's memory: fragmentation grows in a long run, and evaluation takes some


def fit_batch(
    config: PretrainConfig, model: MaskedAutoencoder, image_size: tuple[int, ...], limit: int, runtime: Runtime
) -> int:
    """Images in a step over all ranks such that each rank's share, in `config.accumulate` parts, fits on its GPU.

    Args:
        config: of the run.
        model: is left alone: steps are tried on copies.
        image_size: channels, then pixels along each axis.
        limit: the largest batch worth trying.
        runtime: where to compute.

    Raises:
        ConfigError: no GPU.
        TrainingError: not even one image fits.
    """
    if runtime.device.type != "cuda":
        raise ConfigError(
            f"batch_size is 'auto', which measures a GPU's memory, and the device is {runtime.device}",
            "give a number: --batch_size 256",
        )
    ranks = runtime.ranks

    def fits(share: int) -> bool:
        short = not step_fits(config, model, (share, *image_size), runtime)
        return not ranks.largest(float(short))[0]

    return largest_share(fits, limit // ranks.world_size) * ranks.world_size


def largest_share(fits: Callable[[int], bool], limit: int) -> int:
    """The largest power of two, up to `limit`, that fits, where whatever is smaller than one that fits does too.

    Raises:
        TrainingError: 1 does not.
    """
    if not fits(1):
        raise TrainingError("not one image fits in the GPU's memory", "choose a smaller model or --parallel fsdp")
    share = 1
    while 2 * share <= limit and fits(2 * share):
        share *= 2
    return share


def step_fits(config: PretrainConfig, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> bool:
    """Whether a step on images of this shape leaves a tenth of the GPU free."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runtime.device)
    try:
        try_step(config, model, shape, runtime)
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        return torch.cuda.max_memory_reserved(runtime.device) < USABLE * total
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return False


def try_step(config: PretrainConfig, model: MaskedAutoencoder, shape: tuple[int, ...], runtime: Runtime) -> None:
    """A step on images of this shape with a copy of the model, of which nothing is left afterwards.

    With DDP each rank steps alone: it needs as much memory, and one that runs out does not leave others waiting.
    """
    if config.parallel == "ddp":
        runtime = replace(runtime, ranks=ALONE)
    copied = copy.deepcopy(model).train()
    try:
        with plain_at_the_end(copied):  # what it calls meanwhile refers to it, and would keep its memory
            task = PretrainTask(config, copied, runtime, config.batch_size)
            images = torch.zeros(shape, device=runtime.device)
            ratio = min(config.mask.ratio, config.mask.final_ratio or 1)  # whose steps take the most memory
            masker = Masker(copied.encoder, config.mask.strategy, ratio)
            train_step(task, (images, masker(config.seed, 0, np.arange(shape[0]), runtime.device)))
    finally:
        if config.compile:  # each trial has a shape of its own, and only a few are compiled of one function
            torch.compiler.reset()
