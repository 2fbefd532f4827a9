from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from torchmae.config import PretrainConfig
from torchmae.errors import CheckpointError, ConfigError
from torchmae.settings import to_yaml
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.tracking import JsonLines, TensorBoard, Trackers, open_trackers, tracker_names

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

    def log_picture(self, name: str, step: int, path: Path) -> None:
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


def opened(path: Path, trackers: str, step: int = 0) -> Trackers:
    folder = RunFolder(path)
    folder.config.write_text(to_yaml(PretrainConfig(trackers=trackers)))
    return open_trackers(trackers, folder, Display("none"), step)


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with opened(tmp_path, "auto") as tracker:
        tracker.log("baseline", 0, {"knn_pixels": 50.0})
        for step in (1, 2, 3):
            tracker.log("train", step, {"loss": float(step)})
    time.sleep(1.1)  # files are read in the order of their names, which begin with the second
    with opened(tmp_path, "tensorboard", step=2) as tracker:
        tracker.log("train", 3, {"loss": 30.0})
    assert scalars(tmp_path / "tensorboard") == {
        "baseline/knn_pixels": [(0, 50.0)],
        "train/loss": [(1, 1.0), (2, 2.0), (3, 30.0)],
    }


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with opened(tmp_path, "auto") as tracker:
        tracker.log("train", 1, {"loss": 1.0})
        tracker.log_picture("reconstruction", 1, tmp_path / "none.png")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_tensorboard_has_pictures_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGBA", (6, 4), "red").save(tmp_path / "a.png")
    with opened(tmp_path, "tensorboard") as tracker:
        tracker.log_picture("reconstruction", 5, tmp_path / "a.png")
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (picture,) = read.Images("reconstruction")
    assert (picture.step, picture.width, picture.height) == (5, 6, 4)
    (config,) = read.Tensors("config/text_summary")
    assert "\ntrackers: tensorboard\n" in config.tensor_proto.string_val[0].decode()


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tensorboard", "wandb", "trackio"):  # stand-ins: what is installed here must not matter
        (tmp_path / f"{name}.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert tracker_names("auto") == tracker_names("tensorboard") == ("tensorboard",)
    assert tracker_names("none") == ()
    assert tracker_names("trackio, wandb,trackio") == ("trackio", "wandb")


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("tensorboard", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "wandb").mkdir()  # what an earlier run left is not the library
    assert tracker_names("auto") == ()
    with pytest.raises(
        ConfigError, match=r"^trackers is 'wandb' and wandb is not installed; pip install 'torchmae\[wa"
    ):
        tracker_names("wandb")


NAMES = "tensorboard, wandb, trackio, swanlab"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("wanb", f"trackers is 'wanb'; did you mean 'wandb'? choose from auto, none, {NAMES}"),
        ("wandb,auto", f"trackers is 'auto'; choose from {NAMES}"),
        ("", f"trackers is ''; choose from auto, none, {NAMES}"),
    ],
)
def test_names_that_do_not_exist(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        PretrainConfig(trackers=given)
    assert str(raised.value) == said


def test_tensorboards_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker._writer, "close", full)
    with pytest.raises(CheckpointError, match=r": No space left on device; free space or mend the folder, then resume"):
        tracker.close()
