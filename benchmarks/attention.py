"""Which attention is faster on a processor, forward and backward: PyTorch's fused kernel or plain matrix products.

    python benchmarks/attention.py [--threads 2] [--rounds 9]

The two are timed in turn in one process; each figure is a median. `nn.layers.attend` follows the answer.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

# batch, heads, queries, keys, width of a head: encoders and decoders of the presets at mask ratio 0.75
CASES = [
    (256, 3, 17, 17, 64),
    (128, 4, 48, 17, 32),
    (64, 3, 65, 65, 64),
    (8, 12, 50, 50, 64),
    (8, 16, 197, 197, 32),
    (64, 3, 257, 257, 64),
]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    start = time.perf_counter()
    out = attend(*inputs)
    out.backward(torch.ones_like(out))
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.platform()}")
    print(f"{'dtype':10} {'batch, heads, queries, keys, width':36} {'fused ms':>9} {'plain ms':>9} {'ratio':>6}")
    for dtype in (torch.bfloat16, torch.float32):
        for case in CASES:
            batch, heads, queries, keys, width = case
            q, k, v = (
                torch.randn(batch, count, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
                for count in (queries, keys, keys)
            )
            rounds = [
                (milliseconds(F.scaled_dot_product_attention, (q, k, v)), milliseconds(plain, (q, k, v)))
                for _ in range(args.rounds)
            ]
            fused, simple = (median(column) for column in zip(*rounds, strict=True))
            name = str(dtype).removeprefix("torch.")
            print(f"{name:10} {case!s:36} {fused:9.2f} {simple:9.2f} {fused / simple:6.2f}", flush=True)


if __name__ == "__main__":
    main()
