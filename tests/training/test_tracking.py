from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from torchmae.errors import CheckpointError
from torchmae.training.tracking import JsonLines, TensorBoard, Trackers, open_trackers

FULL = Path("/dev/full")  # every write to it fails as on a full disk


def test_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path)
    tracker.log("train", 10, {"loss": 0.25, "lr": 1e-3})
    # There before the file is closed: a process that is killed loses nothing.
    assert json.loads(path.read_text()) == {"kind": "train", "step": 10, "loss": 0.25, "lr": 1e-3}
    tracker.log("val", 20, {"loss": float("inf"), "knn": float("nan")})
    tracker.close()
    again = JsonLines(path)
    again.log("epoch", 20, {})
    again.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines[1:] == [{"kind": "val", "step": 20, "loss": None, "knn": None}, {"kind": "epoch", "step": 20}]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_error() -> None:
    message = "^cannot write /dev/full: No space left on device; free space"
    with pytest.raises(CheckpointError, match=message), Trackers(JsonLines(FULL)) as tracker:
        tracker.log("train", 1, {"loss": 1.0})
    JsonLines(FULL).close()


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*: Is a directory; free space or mend"):
        JsonLines(tmp_path)


class Closing:
    """A tracker that fails when it is closed, as one that writes late does on a full disk."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        raise CheckpointError("late", "")


def test_an_error_under_way_is_the_one_that_counts() -> None:
    with pytest.raises(KeyError), Trackers(Closing()):
        raise KeyError
    with pytest.raises(CheckpointError, match="late"), Trackers(Closing()):
        pass


def test_every_tracker_gets_every_figure(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with Trackers(*map(JsonLines, paths)) as tracker:
        tracker.log("val", 3, {"loss": 1.0})
    assert paths[0].read_text() == paths[1].read_text() == '{"kind": "val", "step": 3, "loss": 1.0}\n'


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "tensorboard"
    with open_trackers(tmp_path / "metrics.jsonl", folder) as tracker:
        tracker.log("baseline", 0, {"knn_pixels": 50.0})
        for step in (1, 2, 3):
            tracker.log("train", step, {"loss": float(step)})
    with open_trackers(tmp_path / "metrics.jsonl", folder, step=2) as tracker:
        tracker.log("train", 3, {"loss": 30.0})
    assert scalars(folder) == {
        "baseline/knn_pixels": [(0, 50.0)],
        "train/loss": [(1, 1.0), (2, 2.0), (3, 30.0)],
    }


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with open_trackers(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as tracker:
        tracker.log("train", 1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboards_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker._writer, "close", full)
    with pytest.raises(CheckpointError, match=r": No space left on device; free space or mend the folder, then resume"):
        tracker.close()
