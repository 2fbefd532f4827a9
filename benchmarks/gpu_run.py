"""One real run on a GPU, from data to export: pre-train, kill, resume, evaluate, export, reload.

    python benchmarks/gpu_run.py --data CIFAR10 --out FILE.json [--seconds 100] [--keep FOLDER] [--try]

Everything goes through the command line, as a user's run does: CIFAR-10 is packed into arrays, ViT-Tiny/4 is trained in
bf16, compiled, for `--seconds`; it is killed (SIGKILL) half-way and resumed; kNN and linear probe follow, then the
export to timm and a comparison of features. Figures are written after each stage.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TRY = ["--model.depth", "1", "--model.embed_dim", "48", "--model.decoder_depth", "1", "--compile", "false"]
TRY += ["--eval.linear_train", "0", "--eval.images", "32"]
NETWORK = ["--model.preset", "vit_tiny_32_p4", "--model.decoder_depth", "2"]


def command(*words: object) -> list[str]:
    """The words that run `torchmae`."""
    return [sys.executable, "-m", "torchmae", *map(str, words)]


def torchmae(*words: object) -> str:
    """Runs `torchmae`; what it printed. It ends the script where that fails."""
    done = subprocess.run(command(*words), check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torchmae {' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


class Stages:
    """The seconds and figures of stages that follow each other, written after each.

    Args:
        out: the JSON file.
        **facts: what else belongs into it.
    """

    def __init__(self, out: Path, **facts: Any) -> None:
        self._out = out
        self._found: dict[str, Any] = {"seconds": {}, **facts}
        self._since = time.perf_counter()

    def __call__(self, stage: str, **figures: Any) -> None:
        """Ends a stage: prints and writes its seconds and figures."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._found["seconds"][stage] = seconds
        self._found.update(figures)
        self._out.write_text(json.dumps(self._found, indent=2) + "\n")
        shown = (f"{name} {value:.5g}" for name, value in figures.items() if isinstance(value, (int, float)))
        print("; ".join([f"{stage}: {seconds:.1f} s", *shown]), flush=True)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics."""
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if line["kind"] == kind]


def pack(data: str, folder: Path) -> str:
    """CIFAR-10 as arrays, which later commands map in no time; noise of that form where no data is given."""
    if data:
        torchmae("data", "pack", data, folder / "arrays", "--format", "npy", "--progress", "none")
        return str(folder / "arrays")
    import numpy as np

    random, labels = np.random.default_rng(0), np.arange(400) % 10
    images = (random.random((400, 32, 32, 3)) * 80 + 17 * labels.reshape(-1, 1, 1, 1)).astype(np.uint8)
    parts = {"train": slice(0, 300), "test": slice(300, 400)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": labels[part] for name, part in parts.items()}
    np.savez(folder / "noise.npz", **arrays)
    return str(folder / "noise.npz")


def train_killed(run: Path, words: list[object], seconds: float) -> int:
    """Starts a run and kills it when it has trained for half of `seconds`; the last step that it had logged."""
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not (seen := lines(run, "train")) or seen[-1]["seconds"] < seconds / 2):
        time.sleep(0.2)
    if process.poll() is not None:
        raise SystemExit(f"the run ended before it was killed, status {process.returncode}\n{process.communicate()[1]}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return int(lines(run, "train")[-1]["step"])


def main() -> None:
    """Runs all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as torchmae reads it; empty: noise")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--keep", type=Path, help="a folder for the arrays, the run and the export")
    parser.add_argument("--try", action="store_true", dest="tried", help="a tiny network for a few steps")
    args = parser.parse_args()
    seconds = 0 if args.tried else args.seconds
    note = Stages(args.out)
    with tempfile.TemporaryDirectory() as place:
        folder = args.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        run = folder / "run"
        data = pack(args.data, folder)
        note("pack")
        batch = 32 if args.tried else 1024
        train = [
            *("pretrain", "--data", data, *NETWORK, "--compile", "true", "--batch_size", batch, "--out", run),
            *(("--epochs", 5, "--log_every", 1) if args.tried else ("--max-minutes", seconds / 60)),
            *("--data.crop_scale", "[0.4,1.0]", "--optim.base_lr", 1e-3),
            *("--checkpoint_minutes", seconds / 600, "--progress", "none", "--trackers", "none", "--eval.count", 2),
            *(TRY if args.tried else []),
        ]
        killed_at = train_killed(run, train, seconds)
        note("until killed", killed_at=killed_at)
        torchmae("pretrain", "--resume", run, "--progress", "none")
        summary, steps = json.loads((run / "summary.json").read_text()), lines(run, "train")
        after = [line for line in steps if line["step"] > killed_at]
        note(
            "resumed to the end",
            steps=steps[-1]["step"],
            first_loss=steps[0]["loss"],
            last_loss=steps[-1]["loss"],
            images_per_s=median(line["images_per_s"] for line in after),
            data_wait=median(line["data_wait"] for line in after),
            summary=summary,
        )
        for method in ("knn", "linear"):
            few = ("--train-images", 100, "--test-images", 50) if args.tried else ()
            words = ("evaluate", run, "--method", method, "--data", data, "--progress", "none", "--json", *few)
            printed = torchmae(*words)
            note(method, **json.loads(printed.splitlines()[-1])["figures"]["model"])
        printed = torchmae("export", run, "--to", "timm", "--out", folder / "timm")
        note("export", check=next(line for line in printed.splitlines() if line.startswith("check")))
        note("reload", **reload(run))


def reload(run: Path) -> dict[str, Any]:
    """Loads the run's model on the device and on the processor, and compares features."""
    import torch

    import torchmae as package

    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = package.load(run).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        there = model.encode(images)
        here = model.to(device).encode(images.to(device)).cpu()
    return {"feature_distance": ((here - there).norm() / there.norm()).item(), "device": device}


if __name__ == "__main__":
    main()
