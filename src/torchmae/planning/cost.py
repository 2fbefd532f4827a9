"""Predicts operations, memory, traffic and time of a pre-training run from its sizes (docs/scaling.md).

A roofline model: the slowest of computation, gradient exchange and reading decides. Operations and weights are exact;
memory counts the tensors that the backward pass needs; the share of the peak (`mfu`) was measured on one H100.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from torchmae import presets
from torchmae.config.plan import PlanOptions, number_of
from torchmae.errors import ConfigError
from torchmae.nn.flops import count_flops
from torchmae.nn.mae import parameter_counts
from torchmae.nn.masking import num_keep
from torchmae.nn.patches import grid_size

GIB = 2**30
NODE_SIZE = 8
USABLE = 0.9  # share of a GPU's memory that is not taken by its context, communication buffers and fragmentation


class Gpu(NamedTuple):
    """A GPU's data sheet."""

    name: str
    tflops: float  # peak of dense bf16 matrix products, 10^12 operations per second
    memory: float  # GiB
    link: float  # GB per second to other GPUs of the machine, one way
    network: float  # GB per second from a machine of 8 to others, one way, in a typical cluster


GPUS = {
    "a100": Gpu("A100 80 GB", 312, 80, 300, 200),
    "h100": Gpu("H100 80 GB", 989, 80, 450, 400),
    "h200": Gpu("H200", 989, 141, 450, 400),
    "b200": Gpu("B200", 2250, 180, 900, 400),
    "l40s": Gpu("L40S", 362, 48, 25, 50),
    "rtx4090": Gpu("RTX 4090", 165, 24, 25, 1.25),
}

MEASURED_MFU = {1.29: 0.110, 58.0: 0.299, 123.6: 0.333}
"""The share of the peak that a compiled training step reached on one H100, by GFLOP per image (ViT-Tiny/4 at 32 px,
ViT-B/16, ViT-L/16; docs/performance.md)."""


class Cost(NamedTuple):
    """The cost of a run; bytes per GPU, seconds per step."""

    parameters: int  # trained values
    flops_per_image: int  # operations of a step for one image, forward and backward
    micro_batch: int  # images that a GPU computes at once
    accumulate: int  # micro-batches per batch and GPU
    state_bytes: float  # weights, gradients and moments
    activation_bytes: float  # kept for the backward pass of one micro-batch
    exchange_bytes: float  # sent per step
    compute_s: float
    exchange_s: float  # overlaps with the backward pass
    data_s: float  # overlaps with everything else
    step_s: float
    images_per_s: float  # over all GPUs
    read_bytes_per_s: float  # stored images, over all machines
    cores_per_gpu: float  # processor cores for reading
    gpu_hours: float
    hours: float
    bound: str  # "compute", "network" or "data"
    fits: bool  # whether one image fits on a GPU
    mfu: float  # assumed share of the GPU's peak


def plan(options: PlanOptions) -> Cost:
    """Predicts a run's cost; ConfigError if the preset or its sizes cannot be planned."""
    values = presets.arguments(options.model, input_size=options.input_size)
    if "num_heads" not in values:
        raise ConfigError(f"model is {options.model!r}", "plan a transformer: vit_small, vit_base, vit_large, ...")
    gpu, world = GPUS[options.gpu], options.gpus
    model = presets.weightless(values)
    parameters = sum(parameter_counts(model))
    flops = count_flops(model, options.mask_ratio)
    share = -(-options.batch_size // world)
    state = state_bytes(parameters, world if options.parallel == "fsdp" else 1)
    per_image = activation_bytes(values, options.mask_ratio, recompute=options.checkpoint_activations)
    largest = int((gpu.memory * GIB * USABLE - state) // per_image)
    micro_batch = max(1, min(share, largest))
    accumulate = -(-share // micro_batch)
    micro_batch = -(-share // accumulate)
    operations = flops.recomputed if options.checkpoint_activations else flops.training
    mfu = assumed_mfu(flops.training) if options.mfu is None else options.mfu
    compute = share * operations / (gpu.tflops * 1e12 * mfu)
    exchange_bytes = traffic_bytes(
        parameters, world, options.parallel, accumulate, compressed=options.compress_gradients
    )
    # A ring crosses to the next machine once, and the rings of 8 GPUs share its network cards.
    exchange = exchange_bytes / 1e9 / (gpu.link if world <= NODE_SIZE else min(gpu.link, gpu.network))
    # The exchange overlaps with the backward pass, two thirds of the work.
    waiting = max(0.0, exchange - compute * 2 / 3)
    data = share / (options.decode_rate * options.cores)
    step = max(compute + waiting, data)
    rate = options.batch_size / step
    hours = number_of(options.images) * options.epochs / rate / 3600
    return Cost(
        parameters=parameters,
        flops_per_image=flops.training,
        micro_batch=micro_batch,
        accumulate=accumulate,
        state_bytes=state,
        activation_bytes=micro_batch * per_image,
        exchange_bytes=exchange_bytes,
        compute_s=compute,
        exchange_s=exchange,
        data_s=data,
        step_s=step,
        images_per_s=rate,
        read_bytes_per_s=rate * options.image_kb * 1000,
        cores_per_gpu=rate / world / options.decode_rate,
        gpu_hours=hours * world,
        hours=hours,
        bound="data" if data > compute + waiting else "network" if waiting > 0 else "compute",
        fits=largest >= 1,
        mfu=mfu,
    )


def assumed_mfu(flops_per_image: float) -> float:
    """The share of the peak: `MEASURED_MFU`, interpolated over the logarithm of the operations."""
    sizes, shares = np.log(list(MEASURED_MFU)), list(MEASURED_MFU.values())
    return float(np.interp(np.log(flops_per_image / 1e9), sizes, shares))


def state_bytes(parameters: int, shards: int = 1) -> float:
    """Bytes per GPU: one of `shards` of the fp32 weights, gradients and AdamW's two moments, and all bf16 weights,
    which autocast keeps for the backward pass."""
    return 16 * parameters / shards + 2 * parameters


def activation_bytes(values: dict[str, Any], mask_ratio: float, *, bf16: bool = True, recompute: bool = False) -> float:
    """Bytes that one image keeps for the backward pass, with fused attention.

    A block of width D and MLP ratio r keeps for each token the inputs of both norms in fp32 (8 D bytes), and, in the
    precision of matrix products, the results of both norms, queries, keys and values, the result of attention, and the
    MLP's hidden values before and after GELU: (6 + 2 r) D numbers. A cross-attention decoder keeps keys and values of
    the context instead. With `recompute`, each block keeps only its input, and one block at a time the rest.
    """
    length = prod(grid_size(values["input_size"], values["patch_size"]))
    keep = num_keep(length, mask_ratio)
    prefix = values["class_token"] + values["registers"]
    size, ratio = (2 if bf16 else 4), values["mlp_ratio"]

    def block(tokens: int, dim: int, context: int | None = None) -> tuple[float, float]:
        """Bytes of a block's input, and of everything that it keeps."""
        numbers = tokens * (4 + 2 * ratio) * dim + 2 * (tokens if context is None else context) * dim
        return 4.0 * tokens * dim, 8.0 * tokens * dim + size * numbers

    masked = length - keep
    if values["decoder"] == "self":
        decoder_block = block(length + prefix, values["decoder_embed_dim"])
    else:
        decoder_block = block(masked, values["decoder_embed_dim"], keep + prefix)
    stacks = ((values["depth"], block(keep + prefix, values["embed_dim"])), (values["decoder_depth"], decoder_block))
    patches = 4 * length * prod(values["patch_size"]) * values["in_chans"]
    ends = 4 * patches  # pixels, patches, target, prediction
    if recompute:
        return ends + sum(depth * inputs for depth, (inputs, _) in stacks) + max(kept for _, (_, kept) in stacks)
    return ends + sum(depth * kept for depth, (_, kept) in stacks)


def traffic_bytes(
    parameters: int, world: int, parallel: str, accumulate: int = 1, *, compressed: bool = False
) -> float:
    """Bytes that each GPU sends per step.

    DDP's all-reduce sends each gradient twice. FSDP2 gathers bf16 weights twice per micro-batch, for the forward and
    the backward pass, and scatters fp32 gradients once.
    """
    if parallel == "ddp":
        return 2 * (world - 1) / world * parameters * (2 if compressed else 4)
    return (world - 1) / world * parameters * (2 * 2 * accumulate + 4)


def describe(options: PlanOptions, cost: Cost) -> str:
    """A plan as text."""
    gpu = GPUS[options.gpu]
    used = (cost.state_bytes + cost.activation_bytes) / GIB
    machines = -(-options.gpus // NODE_SIZE)
    lines = [
        f"{options.model}, {cost.parameters / 1e6:,.0f} M parameters; "
        f"{options.images} images, {options.epochs} epochs, batch {options.batch_size:,}",
        f"{options.gpus} x {gpu.name} on {machines} machine{'s' if machines > 1 else ''}, {options.parallel}, "
        f"at {cost.mfu:.0%} of peak ({'as measured on an H100' if options.mfu is None else 'given'})",
        "",
        f"operations   {cost.flops_per_image / 1e9:,.1f} GFLOP an image, forward and backward",
        f"memory       {used:,.1f} of {gpu.memory:,.0f} GiB: "
        f"{cost.state_bytes / GIB:,.1f} weights, gradients, moments; "
        f"{cost.activation_bytes / GIB:,.1f} activations of {cost.micro_batch:,} images",
        f"accumulate   {cost.accumulate}",
        f"step         {cost.step_s * 1000:,.0f} ms: computing {cost.compute_s * 1000:,.0f}, exchanging "
        f"{cost.exchange_bytes / 1e9:,.2f} GB {cost.exchange_s * 1000:,.0f}, reading {cost.data_s * 1000:,.0f}, "
        "mostly at the same time",
        f"speed        {cost.images_per_s:,.0f} images/s",
        f"data         {cost.read_bytes_per_s / 1e6:,.0f} MB/s; "
        f"{cost.cores_per_gpu:,.1f} of {options.cores:g} cores a GPU to decode",
        f"time         {cost.hours:,.1f} hours, {cost.gpu_hours:,.0f} GPU hours",
        f"bound by     {cost.bound}",
    ]
    if not cost.fits:
        way = "fewer pixels or --checkpoint_activations true" if options.parallel == "fsdp" else "--parallel fsdp"
        lines.append(f"not one image fits: try {way}")
    return "\n".join(lines)
