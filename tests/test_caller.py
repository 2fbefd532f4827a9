"""A program that calls torchmae gets back what belongs to the whole process, and the same weights as ever."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._functorch import config as functorch

import torchmae
from torchmae.data.loader import one_line_when_a_worker_ends
from torchmae.errors import ConfigError, DataError
from torchmae.training import compilation, trainer

SETTINGS: dict[str, Any] = {
    "recipe": "digits",
    "epochs": 1,
    "batch_size": 8,
    "threads": 1,
    "progress": "none",
    "model": {"depth": 1, "embed_dim": 16, "decoder_embed_dim": 16, "decoder_depth": 1, "drop_path": 0.3},
    "eval": {"count": 1, "images": 4, "knn_count": 0},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
    return folder


def state() -> dict[str, Any]:
    """What is the process's own."""
    with ThreadPoolExecutor(1) as pool:
        of_new_threads = pool.submit(torch.get_num_threads).result()
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "filters": list(warnings.filters),
        "threads": (torch.get_num_threads(), of_new_threads),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # type: ignore[index]
        "compiler": (torch._dynamo.eval_frame._stance.stance, functorch.activation_memory_budget),
        "running": threading.active_count(),
    }


@pytest.fixture
def unusual() -> Iterator[None]:
    """A caller with settings of its own."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None), torch.get_num_threads()
    torch.set_num_threads(2)
    with warnings.catch_warnings(), torch.compiler.set_stance("eager_on_recompile"):
        warnings.simplefilter("ignore", UnicodeWarning)
        functorch.activation_memory_budget = 0.9
        yield
    functorch.activation_memory_budget = 1.0
    signal.signal(signal.SIGTERM, before[0])
    torch.set_num_threads(before[1])


def pretrain(images: Path, out: Path, seed: int = 0, **changes: Any) -> bytes:
    torchmae.pretrain({"source": str(images), "num_workers": 1}, out=str(out), seed=seed, **SETTINGS, **changes)
    return (out / "model.safetensors").read_bytes()


def in_a_thread(run: Callable[..., bytes], out: Path) -> list[bytes]:
    with ThreadPoolExecutor(1) as pool:
        return [pool.submit(run, out).result()]


def in_an_event_loop(run: Callable[..., bytes], out: Path) -> list[bytes]:
    async def cell() -> bytes:
        return run(out)

    return [asyncio.run(cell())]


def in_two_threads(run: Callable[..., bytes], out: Path) -> list[bytes]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, [out / "a", out / "b"], [0, 1]))


def after_an_exception(run: Callable[..., bytes], out: Path) -> list[bytes]:
    class Lost(Exception):
        pass

    def step(*arguments: Any, **options: Any) -> Any:
        raise Lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        with pytest.raises(Lost):
            run(out / "a")
    return [run(out / "b")]


def from_files(run: Callable[..., bytes], out: Path) -> list[bytes]:
    settings = {"source": str(run.args[0]), "num_workers": 1, "cache": "none"}  # type: ignore[attr-defined]
    torchmae.pretrain(settings, out=str(out), **SETTINGS)
    return [(out / "model.safetensors").read_bytes()]


def compiled(run: Callable[..., bytes], out: Path) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "check_compiler", lambda: None)
        patch.setattr("torchmae.runs.check_compiler", lambda: None)
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        return [run(out, compile=True, activation_memory_budget=0.5)]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The weights of each seed's run in the main thread."""
    return [pretrain(images, tmp_path_factory.mktemp("alone") / "run", seed) for seed in (0, 1)]


# torch hides this one, but not from a filter that makes errors of warnings.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    "way", [in_a_thread, in_an_event_loop, in_two_threads, after_an_exception, from_files, compiled]
)
def test_the_callers_state_and_the_same_weights(
    way: Callable[..., list[bytes]], images: Path, alone: list[bytes], tmp_path: Path, unusual: None
) -> None:
    before = state()
    weights = way(partial(pretrain, images), tmp_path / "run")
    after = state()
    for name, value in before.items():
        assert after[name] == value, name
    if way not in (compiled, from_files):  # which round elsewhere
        assert weights == alone[: len(weights)]


def test_a_missing_compiler_is_found_before_there_is_a_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        pretrain(images, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


def test_a_program_that_its_readers_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not forked, they run all that is not guarded."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ConfigError, match='if __name__ == "__main__"'):
        torchmae.pretrain("digits", out=str(tmp_path / "run"), progress="none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "method", "fix"),
    [
        (RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly"), "spawn", "__main__"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "spawn", "most often memory"),
        (RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly"), "fork", "most often memory"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. out of shared memory"), "fork", "shm"),
        (OSError(24, "Too many open files"), "fork", "ulimit -n"),
        (RuntimeError("received 0 items of ancillary data"), "fork", "ulimit -n"),
    ],
)
def test_why_a_reader_ended(error: Exception, method: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    with pytest.raises(DataError) as caught, one_line_when_a_worker_ends():
        raise error
    assert fix in caught.value.fix.partition(";")[0]
