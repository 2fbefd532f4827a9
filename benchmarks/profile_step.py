"""Where does a training step's time go, by kind of work? Eager and compiled, on a processor.

    python benchmarks/profile_step.py [--recipe cifar10] [--steps 10] [--trace FOLDER]

Kinds are those of PyTorch's profiler: self time of operators and of compiled kernels, by their names. `--trace` keeps
the timelines for https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torchmae import settings
from torchmae.nn import presets
from torchmae.training.optim import build_optimizers
from torchmae.training.runtime import open_runtime

# The first pattern that a name matches is its kind.
KINDS = {
    "optimiser": r"Optimizer|_fused_adam|baddbmm|linalg|lerp|foreach",
    "matrix products": r"^aten::(mm|bmm|addmm|linear|matmul)$",
    "GELU": r"gelu",
    "softmax": r"softmax",
    "layer norm": r"layer_norm",
    "casts and copies": r"copy|_to_copy|clone|contiguous|cat$|cpp_fused__to_copy_\d+$",
    "sums, adds and products": r"aten::(add|mul|sum|div|sub|fill|zero)",
}


def kind_of(name: str) -> str:
    """The kind of work an operator does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "the rest")


def profiled(recipe: str, steps: int, compiled: bool, trace: Path | None) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and of each kind of work in it."""
    if compiled:
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True
    config = settings.parse([], recipe)
    runtime = open_runtime("cpu", "auto", None)
    torch.manual_seed(0)
    overrides = {name: value for name, value in vars(config.model).items() if name != "preset"}
    model: nn.Module = presets.build(config.model.preset, **overrides)
    optimizers = build_optimizers(model, config.optim, config.batch_size)
    images = torch.randn(config.batch_size, 3, 32, 32)
    noise = torch.rand(config.batch_size, model.noise_count("random"))
    if compiled:
        model.compile(dynamic=False)

    def step() -> None:
        with runtime.autocast():
            loss = model(images, model.draw_mask("random", noise, config.mask.ratio)).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(4):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace / f"{'compiled' if compiled else 'eager'}.json.gz"))
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / steps
    return sum(kinds.values()), kinds


def main() -> None:
    """Prints a table of milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, recipe {args.recipe}: milliseconds of a step (profiled)")
    rows = [profiled(args.recipe, args.steps, compiled, args.trace) for compiled in (False, True)]
    print(f"{'':26}{'eager':>8}{'compiled':>10}")
    for kind in [*KINDS, "the rest"]:
        print(f"{kind:26}{rows[0][1][kind]:8.1f}{rows[1][1][kind]:10.1f}")
    print(f"{'all':26}{rows[0][0]:8.1f}{rows[1][0]:10.1f}")


if __name__ == "__main__":
    main()
