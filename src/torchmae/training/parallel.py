"""Parallel training, applied to a model from outside in a fixed order.

1. `place`: onto the device, with FSDP2 in shards; 2. `checkpoint_activations`, to save memory; 3. compilation;
4. `wrap_ddp`. Parameters keep their names. FSDP2's modules are imported where they are used: they take a third of
torch's own time to load.
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

from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.runtime import Runtime


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model in the order they run; an empty list for a model without blocks."""
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for item in lists for block in cast(nn.ModuleList, item)]


def checkpoint_activations(model: nn.Module) -> None:
    """Makes each block keep its input only; the backward pass computes the rest again (Chen et al. 2016)."""
    for block in blocks(model):
        # Not checkpoint_wrapper: a wrapping module would rename every parameter.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def place(model: MaskedAutoencoder, parallel: str, runtime: Runtime) -> None:
    """Moves a model, the same on every rank, to the runtime's device: whole, or with "fsdp" a shard on each rank.

    With FSDP2, blocks are moved and sharded one by one: a device never holds more than one whole block. A block's
    parameters are gathered when it runs. `model.load_state_dict` still takes whole weights.
    """
    if parallel != "fsdp" or runtime.ranks.world_size == 1:
        model.to(runtime.device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(runtime.device.type, (runtime.ranks.world_size,))
    # Blocks are gathered in bf16 on CUDA, where autocast takes layer norms of any type; gradients are summed in fp32.
    # All other modules, targets and losses stay fp32 and are cast by autocast as on one rank.
    half = runtime.precision == "bf16" and runtime.device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False)
    # Only the loss needs a gradient. Predictions are views, and FSDP2 warns about views with a gradient.
    model.register_forward_hook(lambda _module, _args, output: output._replace(pred=output.pred.detach()))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default the outermost module keeps its own weights gathered until the backward pass; evaluation has none.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "encode")  # evaluation enters there
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_shard_weights)  # type: ignore[no-untyped-call]


def wrap_ddp(model: nn.Module, runtime: Runtime, accumulate: int, *, compress: bool = False) -> nn.Module:
    """Wraps a model, the same on all ranks, in DistributedDataParallel if there are several ranks.

    `accumulate` is the number of micro-batches per step; `compress` exchanges gradients in bf16.
    """
    if runtime.ranks.world_size == 1:
        return model
    for parameter in model.parameters():
        if parameter.ndim > 2:  # a convolution applied as a linear layer: DDP wants gradients with contiguous strides
            parameter.register_hook(lambda grad: grad.flatten().view(grad.shape))  # type: ignore[no-untyped-call]
    wrapped = DistributedDataParallel(
        model,
        device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accumulate == 1,  # with accumulation, some passes do not exchange gradients
    )
    wrapped.broadcast_buffers = False  # positions are constants; torch 2.13 has no argument of this name
    if compress:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def exchanging(wrapped: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """The context of a backward pass that exchanges gradients (`now`) or only accumulates them."""
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if now else wrapped.no_sync()
    synchronise = getattr(wrapped, "set_requires_gradient_sync", None)
    if callable(synchronise):  # FSDP2's
        synchronise(now)
    return nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: this rank holds a shard."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; collective if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state_dict; collective. For a sharded model: whole, on the processor of rank 0; empty elsewhere."""
    if not any(map(is_sharded, model.parameters())):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Loads a state_dict of whole tensors into an optimiser whose parameters may be shards.

    The optimiser keeps its own settings of parameter groups: learning rates, and those that depend on the device.
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


def _shard_weights(module: nn.Module, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of load_state_dict: shards whole weights as the module's own parameters are sharded."""
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in weights:
            weights[prefix + name] = _like(weights[prefix + name], parameter)


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor sharded as `target` is; every rank has all of it, so nothing is sent."""
    if not is_sharded(target) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    shards = cast(DTensor, target)
    return distribute_tensor(tensor.to(target.device), shards.device_mesh, shards.placements, src_data_rank=None)
