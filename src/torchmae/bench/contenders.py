"""What is timed: the training step of torchmae, and that of others' code on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchmae import presets
from torchmae.bench.peers import PEERS, PeerSizes
from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError
from torchmae.nn.masking import Masker, num_keep
from torchmae.training.pretrain import PretrainTask
from torchmae.training.runtime import Runtime, open_runtime
from torchmae.training.trainer import train_step

OURS = "torchmae"


@dataclass(frozen=True)
class Contender:
    """A network with its optimisers and what a training step does with them.

    Attributes:
        model: on the device, training.
        optimizers: of its parameters.
        step: one training step with a model and optimisers (these, or stand-ins for them); the loss, a scalar on the
            device that was not waited for.
        runtime: where it computes, and in which precision.
        arguments: torchmae's, of the network.
        images: (B, C, *size), the batch.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: Callable[[Any, Any], Tensor]
    runtime: Runtime
    arguments: dict[str, Any]
    images: Tensor

    def run(self) -> Tensor:
        """One training step."""
        return self.step(self.model, self.optimizers)


def model_arguments(config: PretrainConfig) -> dict[str, Any]:
    """The full arguments of a run's network."""
    values = asdict(config.model)
    return presets.arguments(values.pop("preset"), **values)


def build(code: str, config: PretrainConfig) -> Contender:
    """A contender.

    Args:
        code: whose step: "torchmae", or a key of `PEERS`.
        config: the sizes of network and batch, and for torchmae every setting.

    Raises:
        ConfigError: sizes that do not fit together or that the peer does not have, or a peer that is not installed.
    """
    runtime = open_runtime(config.device, config.precision, config.threads, keep_memory=code == OURS)
    arguments = model_arguments(config)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, arguments["in_chans"], *arguments["input_size"])
    images = torch.randn(shape, generator=generator).to(runtime.device)
    torch.manual_seed(config.seed)
    if code == OURS:
        return _ours(config, arguments, runtime, images)
    sizes = peer_sizes(config, arguments, code)
    # As their users run them.
    runtime = replace(runtime, precision="bf16" if runtime.device.type == "cuda" else "fp32")
    model = PEERS[code](sizes).to(runtime.device).train()
    return _peer(config, arguments, runtime, images, model)


def peer_sizes(config: PretrainConfig, arguments: dict[str, Any], code: str) -> PeerSizes:
    """The sizes of a run's network, for other people's code.

    Raises:
        ConfigError: what that code cannot do.
    """
    unlike = {
        "model.preset": "num_heads" not in arguments,
        "model.decoder": arguments.get("decoder", "self") != "self",
        "model.registers": bool(arguments.get("registers")),
        "model.class_token": not arguments.get("class_token", True),
        "model.drop_path": arguments.get("drop_path", 0) != 0,
        "model.input_size": len(set(arguments["input_size"])) != 1 or len(arguments["input_size"]) != 2,
        "model.patch_size": len(set(arguments.get("patch_size", (1,)))) != 1,
        "mask.strategy": config.mask.strategy != "random",
    }
    for name in (name for name, different in unlike.items() if different):
        raise ConfigError(f"{code} has no equal of this {name}", f"leave out --against {code}, or change {name}")
    names = PeerSizes.__dataclass_fields__.keys() & arguments.keys()
    values = {name: arguments[name] for name in names}
    size, patch = arguments["input_size"][0], arguments["patch_size"][0]
    length = (size // patch) ** 2
    # They keep int(L (1 - r)) patches; a ratio half a patch lower makes that our number for any r.
    ratio = 1 - (num_keep(length, config.mask.ratio) + 0.5) / length
    return PeerSizes(**(values | {"input_size": size, "patch_size": patch, "mask_ratio": ratio}))


def _ours(config: PretrainConfig, arguments: dict[str, Any], runtime: Runtime, images: Tensor) -> Contender:
    model = presets.construct(arguments).to(runtime.device).train()
    task = PretrainTask(config, model, runtime, config.batch_size)
    indices = np.arange(len(images))
    epochs = count()
    masker = Masker(model.encoder, config.mask.strategy, config.mask.ratio)

    def step(model: Any, optimizers: Any) -> Tensor:
        mask = masker(config.seed, next(epochs), indices, runtime.device)  # another epoch, other masks
        task.forward, task.optimizers = model, optimizers
        return train_step(task, (images, mask)).loss

    return Contender(model, task.optimizers, step, runtime, arguments, images)


def _peer(
    config: PretrainConfig, arguments: dict[str, Any], runtime: Runtime, images: Tensor, model: nn.Module
) -> Contender:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        trained, lr=optim.base_lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )

    def step(model: Any, optimizers: Any) -> Tensor:
        with runtime.autocast():
            loss = model(images)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return Contender(model, [optimizer], step, runtime, arguments, images)
