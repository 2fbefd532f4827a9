"""The same run on 1, 2 and 4 ranks, by DDP and FSDP2, also through kills and changes of their number.

    python benchmarks/ranks.py [--steps 200] [--kinds ddp fsdp] [--work FOLDER] [--json FILE]

torchrun starts `torchmae pretrain` on digits, in fp32 on the processor (gloo). For each kind of parallelism:

- 1, 2 and 4 ranks, uninterrupted;
- "changed": 2 ranks of which one gets SIGTERM at a third of the steps, then 4 ranks, all killed by SIGKILL at two
  thirds, then 1;
- "elastic": 2 ranks under `torchrun --max-restarts 1`, of which one is killed by SIGKILL half-way.

Printed: the largest relative difference of a step's loss from the run on 1 rank. The aim is under 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

BATCH = 96
STEPS_PER_EPOCH = 15  # 1437 images
MARK = "TORCHMAE_BENCHMARK_RANKS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = [row for kind in args.kinds for row in compare(kind, -(-args.steps // STEPS_PER_EPOCH), work)]
    print(f"{'parallel':10}{'run':14}{'steps':>7}{'largest relative difference':>30}")
    for row in rows:
        print(f"{row['parallel']:10}{row['run']:14}{row['steps']:7}{row['difference']:30.2e}")
    if args.json:
        args.json.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1) + "\n")


def compare(kind: str, epochs: int, work: Path) -> list[dict[str, str | int | float]]:
    """Every run of one kind, against the one on 1 rank."""
    total = epochs * STEPS_PER_EPOCH
    runs = {}
    for ranks in (1, 2, 4):
        runs[f"{ranks} ranks"] = losses(finish(Group(ranks, new(work / f"{kind}-{ranks}", kind, epochs))))
    out = work / f"{kind}-changed"
    group = Group(2, new(out, kind, epochs))
    group.wait_for(out, total // 3)
    group.send(1, signal.SIGTERM)
    group.process.wait()
    group = Group(4, ["--resume", str(out), f"--parallel={kind}"])
    group.wait_for(out, 2 * total // 3)
    for rank in range(4):
        group.send(rank, signal.SIGKILL)
    group.process.wait()
    runs["changed"] = losses(finish(Group(1, ["--resume", str(out)])))
    out = work / f"{kind}-elastic"
    group = Group(2, new(out, kind, epochs), restarts=1)
    group.wait_for(out, total // 2)
    group.send(1, signal.SIGKILL)
    runs["elastic"] = losses(finish(group))
    reference = runs["1 ranks"]
    assert sorted(reference) == list(range(1, total + 1))
    rows: list[dict[str, str | int | float]] = []
    for name, run in runs.items():
        assert run.keys() == reference.keys(), f"{kind}, {name}: steps are missing"
        difference = max(abs(run[step] / loss - 1) for step, loss in reference.items())
        rows.append({"parallel": kind, "run": name, "steps": len(run), "difference": difference})
    return rows


def new(out: Path, kind: str, epochs: int) -> list[str]:
    """The options of a new run."""
    return [
        *("--recipe=digits", f"--out={out}", f"--parallel={kind}", f"--epochs={epochs}", f"--batch_size={BATCH}"),
        *("--device=cpu", "--precision=fp32", "--optim.name=adamw", "--progress=none", "--log_every=1"),
        *("--eval.count=1", "--eval.knn_count=0", "--eval.images=50", "--checkpoint_minutes=0.02", "--threads=1"),
    ]


class Group:
    """torchrun and its ranks."""

    def __init__(self, ranks: int, options: list[str], restarts: int = 0) -> None:
        self.mark = uuid.uuid4().hex
        self.options = options
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *(f"--max-restarts={restarts}", "-m", "torchmae", "pretrain", *options),
        ]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the group)
        environment = {**os.environ, MARK: self.mark}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def wait_for(self, out: Path, step: int) -> None:
        """Returns once a checkpoint of `step` or later is there."""
        while not any(int(path.name[5:]) >= step for path in (out / "checkpoints").glob("step-*")):
            if self.process.poll() is not None:
                raise SystemExit(f"the run ended before step {step}:\n{self.said()}")
            time.sleep(0.01)

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal to one rank."""
        wanted = {f"{MARK}={self.mark}".encode(), f"RANK={rank}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((folder / "environ").read_bytes().split(b"\0"))
                is_reader = b"forkserver" in (folder / "cmdline").read_bytes()
            except OSError:  # it ended, or is not ours
                continue
            if wanted <= environment and not is_reader:
                os.kill(int(folder.name), number)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()


def finish(group: Group) -> Path:
    """Waits for the end of a run; its folder."""
    if group.process.wait() != 0:
        raise SystemExit(f"failed: {' '.join(group.options)}\n{group.said()}")
    words = dict(word.lstrip("-").split("=", 1) for word in group.options if "=" in word)
    return Path(words["out"] if "out" in words else group.options[group.options.index("--resume") + 1])


def losses(out: Path) -> dict[int, float]:
    """The loss of every step."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


if __name__ == "__main__":
    main()
