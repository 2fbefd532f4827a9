from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchmae.errors import CheckpointError
from torchmae.files import replace_file
from torchmae.training import checkpoint as module
from torchmae.training.checkpoint import load_checkpoint, save_checkpoint, verify

FILES = ("checksums.json", "model.safetensors", "optimizer.pt", "state.json")


def stepped(value: float) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A model and its optimiser after one step, distinct for each value."""
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int) -> Path:
    model, optimizer = stepped(step)
    return save_checkpoint(folder, model.state_dict(), [optimizer.state_dict()], {"step": step, "loss": 0.1 + 0.2})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 12)
    assert path.name == "step-00000012"
    loaded = load_checkpoint(tmp_path / "checkpoints")
    assert loaded is not None
    assert (loaded.path, loaded.state) == (path, {"step": 12, "loss": 0.1 + 0.2})
    model, optimizer = stepped(12)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.model.items())
    other = torch.optim.AdamW(nn.Linear(4, 3).parameters())
    other.load_state_dict(loaded.optimizers[0])
    for mine, saved in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[name], saved[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_nothing_there(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoints") is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (0, 5, 100_000_000, 9):
        save(tmp_path, step)
    # 100,000,000 is later than 9: it was passed over, else nobody would be at step 9 again.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000009"]


def test_damaged_later_ones_do_not_crowd_out_whole_ones(tmp_path: Path) -> None:
    for step in (30, 40):
        save(tmp_path, step)
    (tmp_path / "step-00000040" / "state.json").unlink()
    save(tmp_path, 35)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000035"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
def test_a_damaged_file_sends_back_to_the_one_before(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest / name)
    told: list[str] = []
    loaded = load_checkpoint(tmp_path, told.append)
    assert loaded is not None
    assert loaded.state["step"] == 1
    assert len(told) == 1
    assert told[0].startswith(f"{newest} is damaged (")
    assert told[0].endswith("); going on from step-00000001")
    assert "\n" not in told[0]
    damage(tmp_path / "step-00000001" / name)
    with pytest.raises(
        CheckpointError, match=r"^no whole checkpoint is left: .*step-00000002 is damaged \(.*\); start"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("sums", ["[]", "{}", "1", '{"model.safetensors": 1, "optimizer.pt": 2, "state.json": 3}'])
def test_strange_checksums(tmp_path: Path, sums: str) -> None:
    path = save(tmp_path, 1)
    (path / "checksums.json").write_text(sums)
    assert verify(path) is not None


class Interruption(BaseException):
    """Stands for a process that ends: nothing catches it."""


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> list[str]:
    """Makes the given call (from 0) of all that write or rename fail; returns the list of calls, which grows."""
    calls: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == call:
                raise error
            return real(*args, **kwargs)

        return act

    for owner, name in (
        *((Path, name) for name in ("mkdir", "write_text", "write_bytes", "rename", "replace")),
        (os, "fsync"),
        (module, "save_file"),
        (torch, "save"),
    ):
        monkeypatch.setattr(owner, name, failing(name, getattr(owner, name)))
    return calls


def calls_of_a_save(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, -1, Interruption())
        save(tmp_path, 1)
    assert {"mkdir", "save_file", "save", "write_text", "fsync", "rename"} == set(calls)
    return len(calls)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a\n short write")])
def test_a_full_disk_at_any_write_loses_nothing(tmp_path: Path, error: Exception) -> None:
    for call in range(calls_of_a_save(tmp_path / "count")):
        folder = tmp_path / str(call)
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, error)
            with pytest.raises(CheckpointError) as caught:
                save(folder, 2)
        assert str(caught.value).startswith(f"cannot save the checkpoint of step 2 in {folder}: ")
        assert str(caught.value).endswith("; free space or mend the folder, then resume the run")
        assert "\n" not in str(caught.value)
        loaded = load_checkpoint(folder)
        assert loaded is not None
        assert loaded.state["step"] in (1, 2)  # 2: all was done but the last flush
        assert not list(folder.glob(".writing-*"))


def test_a_process_that_ends_at_any_write_loses_nothing(tmp_path: Path) -> None:
    for call in range(calls_of_a_save(tmp_path / "count")):
        folder = tmp_path / str(call)
        save(folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, Interruption())
            with pytest.raises(Interruption):
                save(folder, 2)
        told: list[str] = []
        loaded = load_checkpoint(folder, told.append)
        assert loaded is not None
        assert told == []
        save(folder, 3)
        assert not list(folder.glob(".writing-*"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.json"
    replace_file(path, b"old")
    for call in range(3):
        with monkeypatch.context() as patch:
            calls = fail_at(patch, call, OSError(errno.EDQUOT, "Disk quota exceeded"))
            with pytest.raises(CheckpointError, match=r"model\.json: Disk quota exceeded; free space"):
                replace_file(path, b"new")
        assert calls[call] == ("mkdir", "fsync", "replace")[call]
        assert [item.name for item in tmp_path.iterdir()] == ["model.json"]
        assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        replace_file(tmp_path / "file" / "model.json", b"")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=1000", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder, filler = small_disk / "checkpoints", small_disk / "filler"
    failures = []
    for step, filled in enumerate(range(0, 28_673, 4096), start=1):
        save(folder, 2 * step)
        filler.write_bytes(bytes(filled))
        try:
            save(folder, 2 * step + 1)
        except CheckpointError as error:
            failures.append(str(error))
        loaded = load_checkpoint(folder)
        assert loaded is not None
        assert loaded.state["step"] == 2 * step + (not failures)
        filler.unlink()
    assert 0 < len(failures) < step
    assert all("No space left on device" in message for message in failures), failures


def test_state_is_plain_json(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert json.loads((path / "state.json").read_text())["step"] == 3
    assert sorted(item.name for item in path.iterdir()) == sorted(FILES)
