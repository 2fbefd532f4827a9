"""Faults of the world around a run, each with what is promised then.

Beside them stand: damaged checkpoints, full disks, processes that end at any write (`training/test_checkpoint.py`),
SIGKILL, SIGINT and SIGTERM with their exit statuses (`test_resume.py`), a full disk under the command, output that
nobody reads, changed data (`test_cli.py`), memory that runs out, numbers that are not finite
(`training/test_pretrain.py`), and ranks that end (`distributed/`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("training", "commands")]
from small import images, train, vit
from tiny_run import write_run

from torchmae import runs
from torchmae.cli import main
from torchmae.config import OptimConfig, PretrainConfig
from torchmae.errors import CheckpointError, ConfigError, Interrupted, TorchmaeError
from torchmae.evaluation.subject import Subject
from torchmae.settings import to_yaml
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.ranks import Ranks, check_device, open_ranks, ranks_from_environment
from torchmae.training.run_folder import RunFolder
from torchmae.training.trainer import Evaluator, train_step

CONFIG = PretrainConfig(epochs=3, batch_size=4, log_every=2, optim=OptimConfig(lr=1e-3))


def at(step: int, act: Callable[[], Any]) -> list[Evaluator]:
    """Something that happens in a step of a run of nine."""

    def run(now: int) -> dict[str, float]:
        if now == step:
            act()
        return {}

    return [Evaluator(9, run)]


def one_line(error: TorchmaeError) -> str:
    text = str(error)
    assert "\n" not in text
    assert "; " in text, "it says what to do"
    return text


# Two runs in one folder


def hold(path: str, pipe: Connection, with_child: bool) -> None:
    """Another process that trains there, as far as the lock can tell; a reader process of its own may outlive it."""
    folder = RunFolder(Path(path))
    folder.lock()
    child = os.fork() if with_child else os.getpid()
    if child == 0:
        signal.pause()
    pipe.send(child)
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(tmp_path), theirs, request.param))
    process.start()
    child = ours.recv()
    yield process
    process.kill()
    process.join()
    if child != process.pid:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("holder", [False], indirect=True)
def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunFolder(tmp_path).lock()
    assert one_line(caught.value) == (
        f"another process is training in {tmp_path}; wait for it, stop it, or choose another --out"
    )


@pytest.mark.parametrize("holder", [False], indirect=True)
def test_a_resumed_run_too(tmp_path: Path, holder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(PretrainConfig(recipe="digits")))
    assert main(["pretrain", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"torchmae: another process is training in {tmp_path}; ")


@pytest.mark.parametrize("holder", [False, True], indirect=True, ids=["alone", "with a process that outlives it"])
def test_a_killed_run_leaves_its_folder_open(tmp_path: Path, holder: Any) -> None:
    holder.kill()
    holder.join()
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.close()


def test_a_disk_that_knows_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    RunFolder(tmp_path).lock()


# Folders and files


def test_the_run_folder_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(CheckpointError) as caught:
        train(CONFIG, vit(), images(10), out, evaluators=at(5, lambda: shutil.rmtree(out)))
    assert one_line(caught.value).startswith(f"cannot save the checkpoint of step 9 in {out}/checkpoints: No such file")
    assert not out.exists()


def test_the_checkpoints_are_removed(tmp_path: Path) -> None:
    state, _ = train(
        CONFIG, vit(), images(10), tmp_path, evaluators=at(5, lambda: shutil.rmtree(tmp_path / "checkpoints"))
    )
    assert state.step == 9
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 9


def test_a_file_in_place_of_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(
        CheckpointError, match="cannot save the checkpoint of step 0 .*: File exists; free space or mend"
    ):
        train(CONFIG, vit(), images(10), tmp_path)


def test_the_checkpoint_to_roll_back_to_is_gone(tmp_path: Path) -> None:
    loader = images(10)
    loader.images[:] = torch.nan
    with pytest.raises(TorchmaeError, match="3 steps in a row, by step 3, have no finite loss") as caught:
        train(CONFIG, vit(), loader, tmp_path, evaluators=at(1, lambda: shutil.rmtree(tmp_path / "checkpoints")))
    one_line(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path), "File exists"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "File exists"),
        (lambda path: path.write_text(""), "exists and is not an empty folder"),
    ],
    ids=["a link to itself", "a link to nothing", "a file"],
)
def test_what_is_no_folder(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "a")
    with pytest.raises(ConfigError, match=message) as caught:
        RunFolder.create(tmp_path / "a")
    assert one_line(caught.value).endswith("choose another --out")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long; choose another --out"):
        RunFolder.create(tmp_path / ("a" * 300))


def test_the_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(ConfigError, match="cannot write to runs/a: No such file or directory; choose another --out"):
        RunFolder.create(Path("runs/a"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("recipe: [", "config.yaml is not valid YAML"),
        ("- 1\n", "config.yaml holds a list; it must be a mapping"),
        ("batch_size: many\n", "batch_size is many"),
        ("sed: 4\n", "unknown option 'sed'; did you mean --seed?"),
        ("\x00", "config.yaml is not valid YAML"),
    ],
)
def test_a_damaged_config_of_a_run(
    tmp_path: Path, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert main(["pretrain", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_checkpoint_of_a_later_version(tmp_path: Path) -> None:
    train(CONFIG, vit(), images(10), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    later = replace(checkpoint, state={**checkpoint.state, "momentum_of_momentum": 1})
    with pytest.raises(CheckpointError, match="does not fit the model: .*momentum_of_momentum") as caught:
        train(CONFIG, vit(), images(10), tmp_path, checkpoint=later)
    one_line(caught.value)


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    train(CONFIG, vit(), images(10), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    added = ("epoch_skipped", "lr_scale")
    earlier = replace(checkpoint, state={name: value for name, value in checkpoint.state.items() if name not in added})
    state, _ = train(CONFIG, vit(), images(10), tmp_path, checkpoint=earlier)
    assert (state.step, state.lr_scale) == (9, 1.0)


def test_metrics_cut_short_while_training(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in range(1, 6)]
    folder.metrics.write_text("\n".join(lines) + '\n{"kind": "tra')
    with folder.metrics.open("ab", buffering=0) as tracker:
        folder.rewind_metrics(3)
        tracker.write(b'{"kind": "train", "step": 4}\n')  # a tracker that had the file open
    assert [record["step"] for record in folder.read_metrics()] == [1, 2, 3, 4]


# Processes that read images


@pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked")
@pytest.mark.parametrize("command", ["pretrain", "evaluate", "embed"])
def test_a_reader_that_is_killed_in_the_middle_of_a_step(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel kills what takes most memory. PyTorch then raises wherever the main process is."""
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("they are no children of this process, which so learns of it only when it next asks them")
    out, steps = tmp_path / "a", count(1)

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if next(steps) == 3:
                os.kill(next(iter(multiprocessing.active_children())).pid or 0, signal.SIGKILL)
                threading.Event().wait(60)  # until the signal
            return function(*args, **options)

        return step

    words = {
        "pretrain": ["--recipe", "digits", "--out", str(out), "--data.cache", "none", "--eval.knn_count", "0"],
        "evaluate": [str(out), "--method", "knn", "--data.memory_limit", "0", "--batch_size", "20"],
        "embed": [str(out), "--out", str(tmp_path / "x.npz"), "--data.memory_limit", "0", "--batch_size", "20"],
    }[command]
    if command == "pretrain":
        monkeypatch.setattr("torchmae.training.trainer.train_step", killing(train_step))
    else:
        write_run(out)
        monkeypatch.setattr(Subject, "encode", killing(Subject.encode))
    assert main([command, *words, "--threads", "1", "--data.num_workers", "2", "--progress", "none"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"torchmae: a process that reads images ended unexpectedly \(DataLoader worker \(pid \d+\) is killed by "
        r"signal: Killed\. ?\); most often memory ran out: lower data.num_workers or batch_size\n",
        said,
    ), said
    assert command != "pretrain" or load_checkpoint(out / "checkpoints") is not None


# Time


def test_a_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(past))
    state, tracker = train(replace(CONFIG, checkpoint_minutes=1e-9), vit(), images(10), tmp_path)
    assert state.step == 9
    seconds = [line["seconds"] for line in tracker.of("train")]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["step-00000008", "step-00000009"]


def test_a_rename_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network disk's; meanwhile the scheduler asks for an end."""
    rename = Path.rename

    def slow(path: Path, target: Path) -> Path:
        if target.name == "step-00000003":
            signal.raise_signal(signal.SIGTERM)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slow)
    config = replace(CONFIG, checkpoint_minutes=0)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 9, all saved") as caught:
        train(config, vit(), images(10), tmp_path)
    assert caught.value.exit_status == 143
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


# Ranks and devices


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("cuda", 4, "8 ranks on a machine with 4 GPUs; start torchrun with --nproc-per-node 4, or give --device cpu"),
        ("cuda", 0, "8 ranks on a machine with 0 GPUs; start torchrun with --nproc-per-node 1, or give --device cpu"),
        ("cuda:1", 8, "device is 'cuda:1' with 8 ranks; use auto, cuda or cpu"),
        ("mps", 0, "device is 'mps' with 8 ranks; use auto, cuda or cpu"),
    ],
)
def test_ranks_without_a_gpu_each(device: str, num_gpus: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_device(device, Ranks(0, 8, 0, 8), num_gpus)
    assert one_line(caught.value) == message


def test_ranks_that_have_one() -> None:
    ranks = Ranks(0, 16, 0, 8)
    assert check_device("auto", ranks, 8)
    assert not check_device("auto", ranks, 0)
    assert not check_device("cpu", ranks, 8)


@pytest.mark.parametrize("given", [{}, {"RANK": "1"}])
def test_half_of_an_environment_is_none(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ranks_from_environment() == Ranks()
    with open_ranks("cpu") as ranks:
        assert (ranks.is_main, ranks.all_reduce_max(2.0), ranks.on_main(lambda: 5), ranks.gather(7)) == (
            True,
            [2.0],
            5,
            [7],
        )


def test_a_restarted_run_needs_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["pretrain", "--recipe", "digits"]) == 2
    assert capsys.readouterr().err == (
        "torchmae: torchrun may start this run again and would not find its folder; give --out\n"
    )


def test_a_restarted_run_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(PretrainConfig(recipe="digits", out=str(tmp_path), seed=3)))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["pretrain", "--recipe", "digits", "--out", str(tmp_path)]) == 2
    assert "cannot change in a resumed run" in capsys.readouterr().err


def test_a_restarted_run_keeps_the_batch_that_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(recipe="digits", out=str(tmp_path), batch_size=64, seed=3)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(runs, "_run", lambda config, path, own, resume: (config, path, resume))
    again = replace(config, batch_size=256, fit_batch=True)
    assert runs.start(again) == (config, tmp_path, True)
