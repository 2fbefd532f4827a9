"""Limits that a container, or whoever started the process, sets: each is obeyed, or one line names it."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from torchmae import machine, runs
from torchmae.cli import main
from torchmae.config import DataConfig
from torchmae.data import loader as loader_module
from torchmae.data.opening import open_data
from torchmae.data.reading import reader_processes
from torchmae.training.ranks import Ranks
from torchmae.training.runtime import default_threads

linux_root = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="needs Linux, and root, to set limits of its own"
)
CLONE_NEWNS = 0x20000
GROUPS_2 = {"a/cpu.max": "150000 100000", "cpu.max": "max 100000", "a/memory.max": "max", "memory.max": "1073741824"}
GROUPS_1 = {
    "cpu/a/cpu.cfs_quota_us": "-1",
    "cpu/a/cpu.cfs_period_us": "100000",
    "cpu/cpu.cfs_quota_us": "150000",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": "1073741824",  # the group "a" is the host's, and is not there
}


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/a\n", GROUPS_2),
        ("0::/../../a\n", {"cpu.max": "150000 100000", "memory.max": "1073741824"}),
        ("4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n", GROUPS_1),
        ("0::/a\n", {}),
    ],
    ids=["version 2", "from outside", "version 1", "none"],
)
def test_a_containers_cores_and_memory(
    membership: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = 2 if files else 16  # one and a half, rounded up
    assert (machine.num_cores(), reader_processes(None), default_threads(Ranks())) == (cores, min(cores, 8), cores)
    memory = 2**30 if files else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory() == memory
    assert machine.bytes_to_keep(0.25) == 2**28
    assert machine.bytes_to_keep(1e9) == memory / 2


@linux_root
def test_a_real_control_group(tmp_path: Path) -> None:
    group = Path(f"/sys/fs/cgroup/memory/torchmae-test-{os.getpid()}")
    name = "memory.limit_in_bytes"
    if not group.parent.is_dir():
        group, name = Path(f"/sys/fs/cgroup/torchmae-test-{os.getpid()}"), "memory.max"
    try:
        group.mkdir()
        (group / name).write_text(str(2**28))
    except OSError as error:
        pytest.skip(f"no control groups can be made here: {error}")
    try:
        code = (
            "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()));"
            "from torchmae import machine; print(int(machine.memory()))"
        )
        done = subprocess.run([sys.executable, "-c", code, group], capture_output=True, text=True, check=True)
        assert int(done.stdout) == 2**28
    finally:
        group.rmdir()


def test_more_images_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((16, 8, 8, 1), np.uint8))
    opened = partial(open_data, input_size=(8, 8), channels=1, device=torch.device("cpu"))
    for limit, is_held in ((3000, True), (2 * 16 * 64 - 1, False)):
        monkeypatch.setattr("torchmae.data.opening.memory", lambda limit=limit: limit)
        monkeypatch.setattr(machine, "memory", lambda limit=limit: limit)
        data = opened(DataConfig(source=str(tmp_path / "a.npy"), val="none", num_workers=0))
        assert (data.train.held is not None) is is_held


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_too_large_for_shared_memory(workers: int, open_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come through pipes, and are the same."""
    config = DataConfig(source=str(open_world / "images"), val="none", cache="none", num_workers=workers)
    train = open_data(config, input_size=(64, 64), channels=3, device=torch.device("cpu")).train
    batches = []
    for free in (2**30, 2**18):
        monkeypatch.setattr(loader_module, "free_shared_memory", lambda free=free: free)
        assert ("/dev/shm" in train.note_on_room(8)) is (free == 2**18)
        batches.append(list(train.eval_batches(np.arange(12), 8)))
    for roomy, narrow in zip(*batches, strict=True):
        assert torch.equal(roomy.images, narrow.images)
        assert torch.equal(roomy.labels, narrow.labels)


# Environments of a process


@pytest.fixture(scope="module")
def open_world() -> Iterator[Path]:
    """A folder that every user may use, with images under names that not every system likes."""
    folder = Path(tempfile.mkdtemp(prefix="torchmae-"))
    folder.chmod(0o777)
    for i in range(20):
        path = folder / "images" / "klein und groß" / f"图像 {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    names = [f"klein und groß\\图像 {i}.png" for i in range(20)]  # as a list from Windows has them
    (folder / "images" / "a list.txt").write_text("\n".join(names), encoding="utf-8")
    yield folder
    shutil.rmtree(folder)


FONTS = matplotlib.get_cachedir()  # for MPLCONFIGDIR: without it Matplotlib lists the machine's fonts again, 10 s
TINY = (
    *("--recipe=digits", "--threads=1", "--epochs=1", "--batch=16", "--progress=plain", "--eval.knn_count=0"),
    *("--model.input_size=[64,64]", "--model.patch_size=32", "--model.depth=1", "--model.embed_dim=16"),
    *("--model.decoder_depth=1", "--model.decoder_embed_dim=16", "--eval.count=1", "--eval.images=2"),
    *("--data.cache=none", "--data.num_workers=2"),
)


def small_shared_memory() -> None:
    """Gives this process a /dev/shm of its own, of 1 MiB: a batch of 16 images takes 192 KiB."""
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)


def unknown_user_without_a_home() -> None:
    """Becomes a user whom the system does not know; the effective user stays, who may read Python's own files."""
    for name in ("USER", "LOGNAME", "USERNAME", "LNAME", "HOME", "TORCHMAE_CACHE"):
        os.environ.pop(name, None)
    os.setresuid(54321, 0, 0)


def read_only_home_and_few_files() -> None:
    """A home folder that nobody can write to, and 64 open files at most."""
    os.environ["HOME"] = "/sys/kernel"
    os.environ.pop("TORCHMAE_CACHE", None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def very_few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) + 8,) * 2)


def run_in(prepare: Callable[[], Any], words: list[str], log: Path) -> None:
    """What a process of its own does: the command in a changed environment, with all that it prints in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method(None, force=True)  # not this process's own, but the platform's
    faulthandler.dump_traceback_later(300, exit=True)  # rather than wait for ever
    os.chdir(log.parent)
    os.environ["MPLCONFIGDIR"] = FONTS
    runs.write_pictures = lambda *_: []  # as in the tests' own process
    prepare()
    sys.exit(main(words))


@linux_root
@pytest.mark.parametrize(
    ("prepare", "status", "said"),
    [
        (small_shared_memory, 0, "of /dev/shm, and"),
        (unknown_user_without_a_home, 0, "report: "),
        (read_only_home_and_few_files, 0, "report: "),
        (very_few_files, 2, "ulimit -n"),
    ],
)
def test_a_run_in_an_environment(prepare: Callable[[], Any], status: int, said: str, open_world: Path) -> None:
    name = prepare.__name__
    log, data = open_world / f"{name}.log", open_world / "images" / "a list.txt"
    words = ["pretrain", f"--data={data}", f"--out={open_world / name}", *TINY]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_in, args=(prepare, words, log))
    process.start()
    process.join()
    text = log.read_text()
    assert process.exitcode == status, text
    assert said in text
    assert "Traceback" not in text
    if status:
        assert text.splitlines()[-1].startswith("torchmae: "), text


def test_a_plain_locale_without_a_home(open_world: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    kept["MPLCONFIGDIR"] = FONTS
    out = open_world / "größe 1"
    words = ["pretrain", f"--data={open_world / 'images'}", f"--out={out}", *TINY]
    done = subprocess.run(
        [sys.executable, "-m", "torchmae", *words], env={**kept, "LANG": "C"}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").exists()
