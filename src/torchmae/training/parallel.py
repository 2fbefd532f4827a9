"""Several processes, one model: applied from outside, in a fixed order.

1. `checkpoint_activations`, where memory is short; 2. compilation; 3. `parallelise`: DDP or FSDP2. The model itself
knows of none of them, and its parameters keep their names. What only FSDP2 needs is imported where it is used: it takes
as long to load as a third of torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime


def check_parallel(config: PretrainConfig, world_size: int) -> None:
    """ConfigError for settings that several processes cannot follow."""
    if world_size == 1:
        return
    if config.parallel == "fsdp" and config.optim.name == "muon":
        raise ConfigError(
            "optim.name is 'muon' and parallel is 'fsdp', but Muon needs whole matrices",
            "use --parallel ddp, or --optim.name adamw",
        )
    if config.parallel == "fsdp" and config.compress_gradients:
        raise ConfigError("compress_gradients is for parallel ddp, and parallel is 'fsdp'", "leave it out")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, in the order they run; none in a model without."""
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for item in lists for block in cast(nn.ModuleList, item)]


def checkpoint_activations(model: nn.Module) -> None:
    """Keeps only each block's input in a forward pass; the backward pass computes the rest again (Chen et al. 2016)."""
    for block in blocks(model):
        # Not checkpoint_wrapper: a wrapping module would rename every parameter.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def parallelise(model: MaskedAutoencoder, config: PretrainConfig, runtime: Runtime) -> nn.Module:
    """Makes a model one that all ranks train together.

    Args:
        model: the same on every rank. With FSDP2 its parameters become shards, in place.
        config: "ddp" or "fsdp", and what goes with it.
        runtime: the ranks.

    Returns:
        What to call in place of the model: it averages gradients over ranks. With one rank, the model.
    """
    world_size = runtime.ranks.world_size
    if world_size == 1:
        return model
    if config.parallel == "fsdp":
        return _shard(model, runtime)
    wrapped = average_gradients(model, runtime, config.accumulate)
    if config.compress_gradients:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def average_gradients(model: nn.Module, runtime: Runtime, accumulate: int) -> DistributedDataParallel:
    """DDP: what to call in place of a model that is the same on all ranks; a batch comes in `accumulate` parts."""
    for parameter in model.parameters():
        if parameter.ndim > 2:  # a convolution's, applied as a linear layer: DDP wants its gradient's strides usual
            parameter.register_hook(lambda grad: grad.flatten().view(grad.shape))  # type: ignore[no-untyped-call]
    wrapped = DistributedDataParallel(
        model,
        device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,  # accumulation leaves out the exchange in some passes
    )
    wrapped.broadcast_buffers = False  # positions are constants; the argument of this name is gone after torch 2.12
    return wrapped


def _shard(model: MaskedAutoencoder, runtime: Runtime) -> nn.Module:
    """FSDP2: each block's parameters are gathered when it runs. With bf16, blocks are gathered in bf16 and gradients
    summed in fp32; what surrounds them stays fp32, as do targets and loss, and autocast decides as on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(runtime.device.type, (runtime.ranks.world_size,))
    dtype = torch.bfloat16 if runtime.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The loop takes gradients of the loss alone. Of predictions with a gradient, which are views, FSDP2 would warn.
    model.register_forward_hook(lambda _module, _args, output: output._replace(pred=output.pred.detach()))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The outermost module would keep its own weights gathered after a forward pass, for the backward pass to come;
    # after an evaluation none comes.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "encode")  # evaluation enters there
    return model


def exchanging(wrapped: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """The context of a backward pass that exchanges gradients, or of one that only adds to them."""
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if now else wrapped.no_sync()
    synchronise = getattr(wrapped, "set_requires_gradient_sync", None)
    if callable(synchronise):  # FSDP2's
        synchronise(now)
    return nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; collective where it has some."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; all of one that has none."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state_dict with every shard in place; collective where there are some, and then on the processor."""
    return {name: whole(value).cpu() if is_sharded(value) else value for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts whole weights into a model, sharded or not. Their names and shapes are the model's."""
    for name, target in model.state_dict().items():
        with torch.no_grad():
            target.copy_(_like(weights[name], target))


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Puts the state_dict of an optimiser, with whole tensors, into one whose parameters may be shards.

    The settings of its groups stay its own: learning rates, and what suits its device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: _like(value, parameters[index]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    pairs = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    groups = [{**own, "params": was["params"]} for own, was in pairs]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor cut as `target` is; every rank has all of it, so nothing is sent."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    shards = cast(DTensor, target)
    return distribute_tensor(tensor.to(target.device), shards.device_mesh, shards.placements, src_data_rank=None)
