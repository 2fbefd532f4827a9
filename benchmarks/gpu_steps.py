"""Training steps on a GPU: eager and compiled, beside transformers; and what single choices are worth.

    python benchmarks/gpu_steps.py --out FILE.json [--cases vit_large vit_base vit_tiny_32_p4] [--rounds 3] [--try]

All contenders of a case are in one process and take turns; each figure is a median over the rounds, in images a second.
transformers' ViTMAE runs as its users run it: bf16 autocast, SDPA, fused AdamW. The share of the peak is that of the
fastest large bf16 matrix product of the same rounds. After the contenders come variants of the eager and the compiled
step: attention back ends, AdamW's implementations, CUDA graphs. Figures are written after each case.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchmae import presets, settings
from torchmae.bench.contenders import OURS, Contender, build, seconds_of
from torchmae.bench.measure import take_turns
from torchmae.nn.flops import count_flops
from torchmae.training.parallel import blocks
from torchmae.training.runtime import environment, open_runtime

BATCHES = {"vit_large": 256, "vit_base": 512, "vit_tiny_32_p4": 4096}
PEER = "transformers"
CONTENDERS = {"eager": (OURS, []), "compiled": (OURS, ["--compile=true"]), PEER: (PEER, [])}
WITH_VARIANTS = ("vit_large", "vit_tiny_32_p4")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TRY = ["--batch_size=4", "--model.depth=1", "--model.embed_dim=48", "--model.num_heads=3", "--model.decoder_depth=1"]
TRY += ["--model.decoder_embed_dim=32", "--model.decoder_num_heads=2", "--precision=fp32"]


@dataclass
class Entrant:
    """A contender with what its first steps told.

    Attributes:
        contender: its step.
        first_step_s: seconds of the very first step.
        peak_memory: bytes that it took beyond what was there; 0 on a processor.
        steps: of a turn.
    """

    contender: Contender
    first_step_s: float
    peak_memory: int
    steps: int

    def turn(self) -> float:
        """Images a second."""
        return self.contender.turn(self.steps)


def enter(code: str, words: list[str], turn_s: float) -> Entrant:
    """Builds a contender and runs its first steps."""
    cuda = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    contender = build(code, settings.parse(words))
    device = contender.runtime.device
    first = seconds_of(contender.run, 1, device)
    step = seconds_of(contender.run, 2, device)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return Entrant(contender, first, peak, max(1, round(turn_s / step)))


def measure(preset: str, args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The figures of one case."""
    words = [f"--model.preset={preset}", f"--batch_size={BATCHES[preset]}", *(TRY if args.tried else []), *rest]
    if args.tried and not torch.cuda.is_available():  # a processor takes a minute to compile
        words.append("--compile=false")
    entrants = {name: enter(code, [*more, *words], args.turn) for name, (code, more) in CONTENDERS.items()}
    ours = entrants["compiled"].contender
    turns = {name: entrant.turn for name, entrant in entrants.items()}
    turns["peak"] = lambda: ours.matrix_product_rate(512 if args.tried else None)
    rates = take_turns(turns, args.rounds, lambda _: None)
    peak, flops = max(rates.pop("peak")), count_flops(presets.weightless(ours.arguments), 0.75).training
    rows = {
        name: {
            "images_per_s": median(rates[name]),
            "rounds": rates[name],
            "ratio": median(rates[name]) / median(rates[PEER]),
            "share_of_peak": median(rates[name]) * flops / peak,
            "peak_memory": entrant.peak_memory,
            "first_step_s": entrant.first_step_s,
        }
        for name, entrant in entrants.items()
    }
    case = {"batch_size": len(ours.images), "gflop_per_image": flops / 1e9, "peak_tflops": peak / 1e12, "steps": rows}
    show(preset, case)
    if preset in WITH_VARIANTS:
        del entrants[PEER]
        case["variants"] = dict(variants(entrants, args))
    return case


def variants(entrants: dict[str, Entrant], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What single choices are worth, each beside the step without it, in turns."""
    eager, compiled = entrants["eager"], entrants["compiled"]
    device = eager.contender.runtime.device
    if device.type == "cuda" and not args.few:
        for name, backend in BACKENDS.items():
            yield compared(f"attention {name}", eager, eager.turn, args, backend)
        for name, ways in (("foreach", {"foreach": True}), ("for-loop", {"foreach": False})):
            yield compared(f"AdamW {name}", compiled, with_adamw(compiled, {"fused": False, **ways}), args)
        yield compared("forward and backward in a CUDA graph", eager, lambda: graphed(eager), args)
    if device.type == "cuda":
        for name, mode in (("blocks compiled one by one", "default"), ("the same, reduce-overhead", "reduce-overhead")):
            yield compared(name, compiled, with_mode(eager, mode), args)


def compared(
    name: str, base: Entrant, turn: Callable[[], float], args: argparse.Namespace, backend: Any = None
) -> tuple[str, dict[str, Any]]:
    """A variant's speed beside the plain step's; a variant that fails says why."""
    rates: dict[str, list[float]] = {"without": [], "with": []}
    try:
        for _ in range(args.rounds - 1):
            rates["without"].append(base.turn())
            with nullcontext() if backend is None else sdpa_kernel(backend):
                rates["with"].append(turn())
        row: dict[str, Any] = {key: median(values) for key, values in rates.items()}
        row["ratio"] = row["with"] / row["without"]
        print(f"  {name:40} {row['with']:12,.0f} images/s {row['ratio']:6.2f}", flush=True)
    except Exception as error:  # a back end that does not take this width, say
        row = {"failed": " ".join(str(error).split())[:200]}
        print(f"  {name:40} failed: {row['failed']}", flush=True)
    return name, row


def with_adamw(entrant: Entrant, options: dict[str, Any]) -> Callable[[], float]:
    """A turn of steps whose AdamW is another implementation."""
    task = entrant.contender.task
    (fused,) = task.optimizers
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in fused.param_groups]
    other = torch.optim.AdamW(groups, lr=0.0, **options)

    def turn() -> float:
        task.optimizers = [other]
        try:
            return entrant.turn()
        finally:
            task.optimizers = [fused]

    return turn


def with_mode(entrant: Entrant, mode: str) -> Callable[[], float]:
    """A turn of steps whose blocks are compiled, each alone, in a mode of torch.compile."""
    contender = entrant.contender

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        contender.run()

    def turn() -> float:
        for block in blocks(contender.model):
            block.forward = torch.compile(type(block).forward.__get__(block), dynamic=False, mode=mode)
        for _ in range(3):
            step()
        rate = len(contender.images) / seconds_of(step, entrant.steps, contender.runtime.device)
        for block in blocks(contender.model):
            del block.forward
        return rate

    return turn


def graphed(entrant: Entrant) -> float:
    """Images a second of the eager step's forward and backward passes, replayed from one CUDA graph, with AdamW.

    The mask is one and the same: only the time is of interest.
    """
    import numpy as np

    from torchmae.nn.masking import Masker

    contender = entrant.contender
    model, images, runtime = contender.model, contender.images, contender.runtime
    indices = np.arange(len(images))
    mask = Masker(model.encoder)(0, 0, indices, runtime.device)

    def work() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = model(images, mask).loss
        loss.backward()

    with stream_of_its_own():
        for _ in range(2):
            work()
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()  # a graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def step() -> None:
        graph.replay()
        for optimizer in contender.task.optimizers:
            optimizer.step()

    step()
    rate = len(images) / seconds_of(step, entrant.steps, runtime.device)
    for parameter in model.parameters():
        parameter.grad = None
    return rate


@contextmanager
def stream_of_its_own() -> Iterator[None]:
    """Another stream than the default one, as warming up for a CUDA graph takes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def show(preset: str, case: dict[str, Any]) -> None:
    """Prints a case as a table."""
    print(f"\n{preset}, batch {case['batch_size']}, peak {case['peak_tflops']:.0f} TFLOP/s in bf16")
    print(f"  {'':14}{'images/s':>12}{'ratio':>8}{'of peak':>9}{'memory, GiB':>13}{'first step, s':>15}")
    for name, row in case["steps"].items():
        print(
            f"  {name:14}{row['images_per_s']:12,.0f}{row['ratio']:8.2f}{row['share_of_peak']:9.1%}"
            f"{row['peak_memory'] / 2**30:13.2f}{row['first_step_s']:15.1f}",
            flush=True,
        )


def main() -> None:
    """Measures all cases, and writes the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a turn")
    parser.add_argument("--few", action="store_true", help="of the variants, only those of compilation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--try", action="store_true", dest="tried", help="tiny networks, to try the script")
    args, rest = parser.parse_known_args()
    if args.tried:
        args.turn, args.cases = 0.0, args.cases[-1:]
    found: dict[str, Any] = {"cases": {}}
    start = time.perf_counter()
    for preset in args.cases:
        try:
            found["cases"][preset] = measure(preset, args, rest)
        except Exception as error:  # the other cases go on
            found["cases"][preset] = {"failed": " ".join(str(error).split())[:300]}
            print(f"{preset} failed: {found['cases'][preset]['failed']}", flush=True)
        found["environment"] = environment(open_runtime("auto", "auto", None, keep_memory=False))
        found["seconds"] = time.perf_counter() - start
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if any("failed" in case for case in found["cases"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
