"""From the settings of a run to what it trains: the network, with objects of the caller's own, and how it is trained.

The one place where `PretrainConfig` becomes objects: nothing below takes one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from torchmae import presets
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.config.pretrain import OWN
from torchmae.data.sources import Source
from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder, require_patches
from torchmae.nn.masking import Masker, Strategy
from torchmae.nn.patches import grid_size
from torchmae.training.parallel import blocks
from torchmae.training.pretrain_task import PretrainSettings


@dataclass(frozen=True)
class Own:
    """Objects of the caller's own, in place of what settings name.

    A run folder says "own" in their place and causes no code to be imported: whoever resumes the run hands the objects
    over again.
    """

    model: MaskedAutoencoder | None = None  # a copy is trained, from the weights that the model has
    strategy: Strategy | None = None
    splits: Mapping[str, Source] | None = None  # "train", and "val" where there is one

    def named_in(self, config: PretrainConfig) -> PretrainConfig:
        """The settings with "own" for each object; ConfigError: "own" without an object, `init_from` with a model."""
        if self.model is not None:
            if config.init_from is not None:
                raise ConfigError("init_from is given beside a model of one's own", "load the weights into the model")
            encoder = self.model.encoder
            named = ModelConfig(preset=OWN, input_size=tuple(encoder.input_size), in_chans=encoder.in_chans)
            config = replace(config, model=named)
        if self.strategy is not None:
            config = replace(config, mask=replace(config.mask, strategy=OWN))
        if self.splits is not None:
            config = replace(config, data=replace(config.data, source=OWN))
        objects = {
            "model.preset": (config.model.preset, self.model, "model=MODEL"),
            "mask.strategy": (config.mask.strategy, self.strategy, 'mask={"strategy": FUNCTION}'),
            "data.source": (config.data.source, self.splits, "source=SOURCE"),
        }
        for name, (value, given, how) in objects.items():
            if value == OWN and given is None:
                raise ConfigError(f"{name} is {OWN!r}, an object handed over in Python", f"hand it over: {how}")
        return config

    def arguments(self, config: PretrainConfig) -> dict[str, Any]:
        """What model.json says of the model."""
        if self.model is not None:
            return presets.own_arguments(self.model)
        return presets.arguments(config.model.preset, **overrides(config))

    def try_out(self, config: PretrainConfig) -> None:
        """One forward pass with objects of the caller's own, whose errors should come before there is a run folder."""
        if self.model is None and self.strategy is None:
            return
        model = self.construct(self.arguments(config)).train()
        encoder = model.encoder
        masks = Masker(encoder, config.mask.strategy, config.mask.ratio)(config.seed, 0, np.arange(2))
        with torch.no_grad():
            model(torch.zeros(2, encoder.in_chans, *encoder.input_size), masks)

    def construct(self, arguments: dict[str, Any]) -> MaskedAutoencoder:
        """The model that a run begins with."""
        model = presets.construct(arguments) if self.model is None else copy.deepcopy(self.model)
        if self.strategy is not None:
            model.encoder.strategies = {**model.encoder.strategies, OWN: self.strategy}
        return model


NOTHING = Own()


def overrides(config: PretrainConfig) -> dict[str, Any]:
    """The model settings that replace the preset's values."""
    return {name: value for name, value in asdict(config.model).items() if name != "preset"}


def check_model(config: PretrainConfig, model: MaskedAutoencoder) -> None:
    """ConfigError where a model, whose weights may lie nowhere, does not fit the settings of its training."""
    try:
        Masker(model.encoder, **asdict(config.mask))
    except ConfigError as error:
        raise ConfigError(f"{error.problem} and the preset {config.model.preset!r}", error.fix) from error
    check_progression(config, model)
    if config.refine.share:
        require_patches(model, "whose features refine.share could compare")
        if config.data.repeats > 1:
            raise ConfigError(
                f"data.repeats is {config.data.repeats} and refine.share {config.refine.share:g}, which would tell the "
                "copies of an image apart",
                "use --refine.views in place of --data.repeats",
            )
    without = f"which is for transformer blocks, and the preset {config.model.preset!r} has none"
    if config.optim.name == "muon" and not blocks(model):
        raise ConfigError(f"optim.name is 'muon', {without}", "use --optim.name adamw")
    if config.checkpoint_activations and not blocks(model):
        raise ConfigError(f"checkpoint_activations is true, {without}", "leave it out")


def check_parallel(config: PretrainConfig, world_size: int) -> None:
    """ConfigError for settings that several processes cannot follow."""
    if world_size == 1 or config.parallel != "fsdp":
        return
    if config.refine.share:
        raise ConfigError("refine.share is for parallel ddp, and parallel is 'fsdp'", "use --parallel ddp")
    if config.optim.name == "muon":
        raise ConfigError(
            "optim.name is 'muon' and parallel is 'fsdp', but Muon needs whole matrices",
            "use --parallel ddp, or --optim.name adamw",
        )
    if config.compress_gradients:
        raise ConfigError("compress_gradients is for parallel ddp, and parallel is 'fsdp'", "leave it out")


def check_views(config: PretrainConfig, batch_size: int, world_size: int) -> None:
    """Raises ConfigError if a micro-batch is too small: the loss compares views of different images in it.

    `batch_size` is that of all ranks.
    """
    share = batch_size // world_size
    largest = min(share // 2, math.ceil(config.refine.masked_share * share))  # two images, and one to predict, in each
    if config.refine.share and config.accumulate > largest:
        raise ConfigError(
            f"refine.share compares the images of one part of a batch, and {batch_size} images a step on {world_size} "
            f"ranks with accumulate {config.accumulate} leave too few in a part",
            f"use --accumulate {largest}" if largest else "use a larger --batch_size, and --max_tokens if it is given",
        )


def check_progression(config: PretrainConfig, model: MaskedAutoencoder) -> None:
    """ConfigError for images or masks whose size is to change in a way that model or compilation cannot follow."""
    given = {"start_size": config.start_size, "mask.final_ratio": config.mask.final_ratio}
    changes = [name for name, value in given.items() if value is not None]
    if not changes:
        return
    require_patches(model, f"whose number {changes[0]} could change")
    if config.compile and config.mask.final_ratio is not None:
        raise ConfigError(
            f"mask.final_ratio is {config.mask.final_ratio:g}: shapes change all along, and compile is for few",
            "use --compile false",
        )
    if (size := start_size(config, model)) is not None:
        full = model.encoder.input_size
        if any(small > large for small, large in zip(size, full, strict=True)):
            raise ConfigError(f"start_size is {size}, larger than the input {full}", "make it smaller")
        try:
            grid_size(size, model.patch_size)
        except ConfigError as error:
            raise ConfigError(f"start_size is {size}: {error.problem}", error.fix) from error


def start_size(config: PretrainConfig, model: MaskedAutoencoder) -> tuple[int, ...] | None:
    """`config.start_size` as one number per axis; ConfigError for another number of axes."""
    if config.start_size is None:
        return None
    axes = len(model.patch_size)
    size = (config.start_size,) * axes if isinstance(config.start_size, int) else tuple(config.start_size)
    if len(size) != axes:
        raise ConfigError(
            f"start_size is {size} but images have {axes} axes", "give one number for each, or one for all"
        )
    return size


def pretrain_settings(config: PretrainConfig, model: MaskedAutoencoder) -> PretrainSettings:
    """How `model` is trained."""
    values = {item.name: getattr(config, item.name) for item in fields(PretrainSettings) if item.name != "per_epoch"}
    return PretrainSettings(**{**values, "start_size": start_size(config, model)})
