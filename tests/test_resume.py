"""A run that was killed or stopped and went on ends with the weights of one that was left alone, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from torchmae import runs
from torchmae.cli import main
from torchmae.training.checkpoint import load_checkpoint, verify

# Small, and with images read by worker processes as a large folder's are.
OPTIONS = (
    *("--threads=1", "--epochs=3", "--batch=96", "--progress=plain", "--log-every=7", "--checkpoint-minutes=0.0008"),
    *("--model.depth=1", "--model.embed_dim=32", "--model.decoder_depth=1", "--model.decoder_embed_dim=32"),
    *("--eval.count=3", "--eval.images=40", "--eval.knn_count=2", "--eval.knn_train=100", "--eval.knn_val=50"),
    *("--data.cache=none", "--data.mean=[0.3]", "--data.std=[0.4]"),
)
UNMEASURED = ("--data.val=none", "--epochs=1")
STEPS = 3 * 15  # 1437 images in batches of 96


def run(args: list[str], log: Path, method: str | None) -> None:
    """What a process of its own does: the command, with all that it prints in a file.

    `method` is how its readers start; None: as is usual on the platform.
    """
    multiprocessing.set_start_method(method, force=True)
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    runs.write_pictures = lambda *_: []  # as in the tests' own process
    sys.exit(main(args))


def launch(log: Path, *args: object, method: str | None = None) -> BaseProcess:
    """Starts `torchmae pretrain` in a process of its own, without the seconds that imports take."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run, args=(["pretrain", *map(str, args)], log, method))
    process.start()
    return process


def wait_for_step(process: BaseProcess, out: Path, step: int) -> None:
    """Returns once a checkpoint of `step` or later is there."""
    while not any(int(path.name.removeprefix("step-")) >= step for path in (out / "checkpoints").glob("step-*")):
        process.join(0.002)
        assert process.exitcode is None, "the run ended before the step that was waited for"


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def of_kind(out: Path, kind: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of one kind."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["pretrain", "--out", str(out), *OPTIONS, "--data.num_workers=0"]) == 0
    return out


def test_killed_three_times(whole: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    chance = random.Random(7)
    moments = sorted(chance.sample(range(2, STEPS - 8), 3))
    args: tuple[object, ...] = ("--out", out, *OPTIONS, "--data.num_workers=2")
    for step, num_workers in zip(moments, (1, 0, 3), strict=True):
        process = launch(log, *args)
        wait_for_step(process, out, step)
        process.join(chance.uniform(0, 0.03))
        assert process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "model.safetensors").exists()
        args = ("--resume", out, f"--data.num_workers={num_workers}")
    process = launch(log, *args)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert weights(out) == weights(whole)
    for kind in ("baseline", "val"):
        assert of_kind(out, kind) == of_kind(whole, kind)
    # Partial sums are rounded elsewhere, for a window of progress ends with each checkpoint.
    losses = [[line["loss"] for line in of_kind(path, "epoch")] for path in (out, whole)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without held-out images, for which more readers would have to start, that nothing interrupted."""
    out = tmp_path_factory.mktemp("unmeasured") / "run"
    assert main(["pretrain", "--out", str(out), *OPTIONS, *UNMEASURED, "--data.num_workers=0"]) == 0
    return out


@pytest.mark.parametrize("method", ["spawn", "forkserver"])  # macOS and Windows; Linux from Python 3.14 on
def test_readers_that_are_not_forked(unmeasured: Path, tmp_path: Path, method: str) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = launch(log, "--out", out, *OPTIONS, *UNMEASURED, "--data.num_workers=1", method=method)
    if method == "forkserver":
        wait_for_step(process, out, 3)
        process.kill()
        process.join()
        assert not (out / "model.safetensors").exists()
        process = launch(log, "--resume", out, method=method)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert weights(out) == weights(unmeasured)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_saves_and_says_how_to_go_on(
    whole: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out, log = tmp_path / "a run", tmp_path / "log"
    process = launch(log, "--out", out, *OPTIONS, "--data.num_workers=2")
    wait_for_step(process, out, 20)
    assert process.pid is not None
    os.killpg(process.pid, number)  # as a terminal does, to the processes that read images too
    process.join()
    assert process.exitcode == status
    said = log.read_text().splitlines()[-1]
    checkpoint = load_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    step = checkpoint.state["step"]
    assert said == (
        f"torchmae: stopped by {number.name} after step {step} of {STEPS}, all saved; "
        f"go on with: torchmae pretrain --resume '{out}'"
    )
    assert "Traceback" not in log.read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("interrupted", step)
    assert main(["pretrain", "--resume", str(out), "--data.num_workers=0"]) == 0
    assert weights(out) == weights(whole)
    assert json.loads((out / "summary.json").read_text())["state"] == "finished"


def test_killed_before_the_first_checkpoint(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints" / ".writing-00000000").mkdir(parents=True)
    (out / "checkpoints" / ".writing-00000000" / "model.safetensors").write_bytes(b"half a checkp")
    for name in ("model.safetensors", "summary.json", "report.html"):
        (out / name).unlink()
    (out / "metrics.jsonl").write_text('{"kind": "baseline", "step": 0, "knn_pix')
    assert main(["pretrain", "--resume", str(out)]) == 0
    assert weights(out) == weights(whole)
    assert of_kind(out, "baseline") == of_kind(whole, "baseline")
    assert not list((out / "checkpoints").glob(".writing-*"))


def test_killed_after_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("model.safetensors", "summary.json", "report.html"):
        (out / name).unlink()
    assert main(["pretrain", "--resume", str(out)]) == 0
    assert weights(out) == weights(whole)
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert json.loads((out / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before, newest = sorted((out / "checkpoints").glob("step-*"))
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert main(["pretrain", "--resume", str(out), "--progress=none"]) == 0
    said = capsys.readouterr().err
    assert said == f"{newest} is damaged (model.safetensors does not match its checksum); going on from {before.name}\n"
    assert weights(out) == weights(whole)
    assert verify(newest) is None


def test_all_checkpoints_damaged(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        (path / "optimizer.pt").unlink()
    assert main(["pretrain", "--resume", str(out), "--progress=none"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"torchmae: no whole checkpoint is left: {out}/checkpoints/step-{STEPS:08d} is damaged (")
    assert said[0].endswith("); start again in another folder")
    assert weights(out) == weights(whole)  # nothing more was lost
