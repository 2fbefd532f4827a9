"""Where does a training step's time go, by kind of work? On a processor, in turn: transformers, eager, compiled.

    python benchmarks/profile_step.py [--recipe cifar10] [--steps 10] [--flame FOLDER] [--trace FOLDER] [OPTIONS]

Kinds are those of PyTorch's profiler: self time of operators and of compiled kernels, by their names. `--flame` draws
the same as flame graphs; `--trace` keeps the timelines for https://ui.perfetto.dev. Further options go to the settings.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does

import flame
import torch
from torch.profiler import ProfilerActivity, profile

from torchmae import settings
from torchmae.bench.contenders import OURS, build
from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError

# The first pattern that a name matches is its kind.
KINDS = {
    "optimiser": r"Optimizer|_fused_adam|baddbmm|linalg|lerp|foreach",
    "matrix products": r"^aten::(mm|bmm|addmm|linear|matmul|_scaled_dot.*)$|mkldnn_linear|_weight_int",
    "GELU": r"gelu",
    "softmax": r"softmax",
    "layer norm": r"layer_norm",
    "casts and copies": r"copy|_to_copy|clone|contiguous|cat$|cpp_fused__to_copy_\d+$",
    "sums, adds and products": r"aten::(add|mul|sum|div|sub|fill|zero)",
}
WAYS = ("transformers", "eager", "compiled")


def kind_of(name: str) -> str:
    """The kind of work an operator does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "the rest")


def profiled(way: str, config: PretrainConfig, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each kind of work in a step."""
    compiled = way == "compiled"
    if compiled:
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True
    contender = build(way if way == "transformers" else OURS, replace(config, compile=compiled))
    contender.first_steps()
    named = args.flame and not compiled  # hooks would break the compiled graph
    with (
        flame.modules_named(contender.model) if named else nullcontext(),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        for _ in range(args.steps):
            contender.run()
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(args.trace / f"{way}.json.gz"))
    if args.flame:
        args.flame.mkdir(parents=True, exist_ok=True)
        name = way if way == "transformers" else f"{OURS}, {way}"
        title = f"{name}, {contender.runtime.precision}, batch {config.batch_size}"
        drawn = flame.draw(flame.frames(profiler.events()), title, args.steps)
        (args.flame / f"flame-{config.model.preset}-{way}.svg").write_text(drawn)
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / args.steps
    return kinds


def main() -> None:
    """Prints a table of milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--flame", type=Path)
    parser.add_argument("--trace", type=Path)
    args, rest = parser.parse_known_args()
    config = settings.parse(["--device=cpu", *rest], args.recipe)
    columns: dict[str, dict[str, float]] = {}
    for way in WAYS:
        try:
            columns[way] = profiled(way, config, args)
        except ConfigError as error:  # transformers has no cross-attending decoder, say
            print(f"{way} is left out: {error}")
    size = "x".join(map(str, config.model.input_size or ())) or "its own size"
    print(f"torch {torch.__version__}, {config.model.preset} at {size}, batch {config.batch_size}")
    print("milliseconds of a step, profiled" + "".join(f"{way:>14}" for way in columns))
    for kind in [*KINDS, "the rest"]:
        print(f"{kind:32}" + "".join(f"{column[kind]:14.1f}" for column in columns.values()))
    print(f"{'all':32}" + "".join(f"{sum(column.values()):14.1f}" for column in columns.values()))


if __name__ == "__main__":
    main()
