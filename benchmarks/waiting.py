"""How should processor threads wait for each other? The speed of a small model, alone and beside a busy program.
from torchmae.nn.masking import Masker

    python benchmarks/waiting.py

Each row is a fresh process, since OpenMP reads its variables once. `torchmae` sets GOMP_SPINCOUNT=10000 unless told
otherwise (src/torchmae/cli.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

POLICIES: dict[str, dict[str, str]] = {
    "sleep at once (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1,000 times, then sleep": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000 times, then sleep": {"GOMP_SPINCOUNT": "10000"},
    "spin 100,000 times, then sleep": {"GOMP_SPINCOUNT": "100000"},
    "the library's default": {},
}


def measure(steps: int) -> float:
    """Images per second of forward and backward passes, median over steps: the cifar10 recipe's model, batch 128."""
    import torch

    from torchmae import presets
    from torchmae.nn.masking import Masker

    cross = {"decoder": "cross", "decoder_depth": 1, "decoder_embed_dim": 128, "decoder_num_heads": 4}
    model = presets.build("vit_tiny_32_p4", depth=6, **cross)
    images, noise = torch.randn(128, 3, 32, 32), torch.rand(128, 64)
    times = []
    for step in range(steps + 3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, Masker(model.encoder, "random", 0.75).from_noise(noise)).loss
        loss.backward()
        model.zero_grad()
        if step >= 3:
            times.append(time.perf_counter() - start)
    return len(images) / median(times)


def child(policy: dict[str, str], steps: int) -> float:
    """`measure` in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--child", "--steps", str(steps)]
    return float(subprocess.run(command, env=clean | policy, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(measure(arguments.steps))
        return
    print(f"{'images/s':42}{'alone':>8}{'beside a busy program':>24}")
    for name, policy in POLICIES.items():
        alone = child(policy, arguments.steps)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            beside = child(policy, arguments.steps)
            busy.kill()
        print(f"{name:42}{alone:8.0f}{beside:24.0f}", flush=True)


if __name__ == "__main__":
    main()
