"""One run, killed by SIGKILL at random moments and resumed each time, against the same run left alone.

    python benchmarks/soak.py [--kills 100] [--data digits|FOLDER] [--epochs 100] [--seed 0]
                              [--work FOLDER] [--json FILE]

A small network trains on one processor core, with images decoded by two reader processes and a checkpoint about every
tenth of a second. The moments lie anywhere: while Python and torch are loaded, data is opened, a step is taken, a
checkpoint is being written, figures are measured. A kill takes the readers too. After each, the newest checkpoint that
was there must be whole, for that is what the next start goes on from. Choose --epochs so that there are some dozen
steps for each kill.

At the end, the weights and the validation figures must be those of the undisturbed run to the last bit, and the folder
must hold the same files and no others. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torchmae.training.checkpoint import load_checkpoint

OPTIONS = (
    *("--threads=1", "--precision=fp32", "--compile=false"),
    *("--progress=plain", "--log-every=1", "--checkpoint-minutes=0.002"),
    *("--model.depth=1", "--model.embed_dim=48", "--model.num_heads=3"),
    *("--model.decoder_depth=1", "--model.decoder_embed_dim=48", "--model.decoder_num_heads=3"),
    *("--eval.count=4", "--eval.images=64", "--eval.knn_count=2", "--eval.knn_train=200", "--eval.knn_val=100"),
    *("--data.cache=none", "--data.num_workers=2"),
)
FIRST_START_S = 8.0  # how long a start is taken to last before one was seen


@dataclass(frozen=True)
class Kill:
    """One of them.

    Attributes:
        after_s: seconds after the start.
        saved: steps up to the newest checkpoint at that moment.
        logged: the last step that was logged.
        writing: whether a checkpoint was half written.
    """

    after_s: float
    saved: int
    logged: int
    writing: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="an empty or new folder to keep both runs in")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        (work / "tmp").mkdir(parents=True)
        start = time.perf_counter()
        options = [f"--data={args.data}", f"--epochs={args.epochs}", *OPTIONS]
        run(work, "whole", command(work / "whole", options))
        whole_s = time.perf_counter() - start
        steps = json.loads((work / "whole" / "summary.json").read_text())["steps"]
        print(f"undisturbed: {steps} steps in {whole_s:.0f} s", flush=True)
        kills = soak(work, options, steps, args.kills, random.Random(args.seed))
        report(kills, steps, time.perf_counter() - start - whole_s)
        problems = differences(work / "killed", work / "whole")
        left = [path for path in (work / "tmp").rglob("*") if path.is_file()]
        problems += [f"left in TMPDIR: {path}" for path in sorted(left)]
    print("\n".join(problems) or "weights and validation figures: the same bits; files: the same, none left over")
    if args.json:
        facts = {"date": time.strftime("%Y-%m-%d"), "steps": steps, "problems": problems}
        args.json.write_text(json.dumps({**facts, "kills": [vars(kill) for kill in kills]}, indent=1) + "\n")
    sys.exit(1 if problems else 0)


def soak(work: Path, options: list[str], steps: int, count: int, chance: random.Random) -> list[Kill]:
    """Runs to the end, with `count` kills on the way."""
    out = work / "killed"
    kills: list[Kill] = []
    start_s = FIRST_START_S
    for number, target in enumerate(sorted(chance.choices(range(1, max(2, steps * 9 // 10)), k=count)), 1):
        begun, saved = time.perf_counter(), newest(out)
        with launched(work, "killed", command(out, options)) as process:
            if saved >= target:  # this far it came before: what is hit is the next start
                sleep(process, chance.uniform(0, start_s))
            else:
                while newest(out) == saved:
                    sleep(process, 0.005)
                start_s = time.perf_counter() - begun
                while newest(out) < target:
                    sleep(process, 0.005)
                sleep(process, chance.uniform(0, 0.2))
            saved = newest(out)
        half_written = any((out / "checkpoints").glob(".writing-*"))
        kills.append(Kill(time.perf_counter() - begun, saved, last_logged(out), half_written))
        checkpoint = load_checkpoint(out / "checkpoints")
        found = checkpoint.state["step"] if checkpoint else 0
        if found < saved:
            raise SystemExit(f"kill {number}: the checkpoint of step {saved} was there, {found} is what is left")
        print(f"kill {number}: after {kills[-1].after_s:.2f} s, at step {found} of {steps}", flush=True)
    run(work, "killed", command(out, options))
    return kills


def command(out: Path, options: list[str]) -> list[str]:
    """What a user would give: to go on with the run, once it has settings to go on with."""
    return ["--resume", str(out)] if (out / "config.yaml").exists() else ["--out", str(out), *options]


@contextmanager
def launched(work: Path, name: str, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`torchmae pretrain` as the leader of a group of processes, all killed at the end of the context.

    What it prints goes to NAME.log.
    """
    environment = {**os.environ, "TMPDIR": str(work / "tmp"), "TORCHMAE_CACHE": str(work / "cache")}
    with (work / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "torchmae", "pretrain", *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(work: Path, name: str, arguments: list[str]) -> None:
    """`torchmae pretrain` to its end."""
    with launched(work, name, arguments) as process:
        if process.wait() != 0:
            raise SystemExit(f"failed with status {process.returncode}:\n{(work / f'{name}.log').read_text()[-2000:]}")


def sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Waits so long, while the process runs; ends the benchmark when it ended by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise SystemExit(f"the run ended before its last kill, with status {process.returncode}: give it more --epochs")


def newest(out: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def records(out: Path) -> list[dict[str, float | str]]:
    """The whole lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_logged(out: Path) -> int:
    return max((int(record.get("step", 0)) for record in records(out)), default=0)


def report(kills: list[Kill], steps: int, seconds: float) -> None:
    """Prints when the kills came, and what they cost."""
    starts = sum(later.saved == earlier.saved for earlier, later in itertools.pairwise(kills))
    repeated = [max(0, kill.logged - kill.saved) for kill in kills]
    print(
        f"{len(kills)} kills in {steps} steps and {seconds:.0f} s: {starts} before a start had saved anything new, "
        f"{sum(kill.writing for kill in kills)} while a checkpoint was being written\n"
        f"every newest checkpoint was whole; steps behind it, done again: {sum(repeated)} in all, "
        f"{max(repeated, default=0)} at most after one kill"
    )


def differences(killed: Path, whole: Path) -> list[str]:
    """What is not the same in the two folders, one line each."""
    problems = []
    if (killed / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes():
        problems.append("the weights differ")
    figures = [[record for record in records(out) if record["kind"] in ("baseline", "val")] for out in (killed, whole)]
    if figures[0] != figures[1]:
        problems.append("the validation figures differ")
    extra, missing = names(killed) - names(whole), names(whole) - names(killed)
    problems += [f"left over: {name}" for name in sorted(extra)] + [f"missing: {name}" for name in sorted(missing)]
    return problems


def names(out: Path) -> set[str]:
    """The files of a run; those of the checkpoint before the last and of TensorBoard, which go by time, left out."""
    last = f"step-{newest(out):08d}"
    return {
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file()
        and not path.name.startswith("events.out.tfevents")
        and (path.parent.name == last or not path.parent.name.startswith("step-"))
    }


if __name__ == "__main__":
    main()
