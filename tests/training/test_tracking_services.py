"""Weights & Biases, trackio and SwanLab, without a network: what they wrote is read back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from torchmae.api import pretrain
from torchmae.training import tracking
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.tracking import Trackers, tracking_id

TINY: dict[str, Any] = {
    "threads": 1,
    "epochs": 2,
    "batch_size": 500,
    "progress": "plain",
    "log_every": 1,
    "model": {"depth": 1, "embed_dim": 16, "decoder_depth": 1, "decoder_embed_dim": 16},
    "eval": {"count": 2, "images": 20, "knn_count": 0},
}


class Memory:
    """A service that keeps what it gets; it fails at its `fails_at`th figure."""

    place = "here"
    made: list[Memory]
    fails_at = 0

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        self.id = tracking_id(folder)
        self.config = config
        self.figures: list[tuple[str, int, dict[str, float]]] = []
        self.pictures: list[tuple[str, int, bytes]] = []
        self.closed = False
        self.made.append(self)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if len(self.figures) + 1 == self.fails_at:
            raise ConnectionError("the server\nis away.")
        self.figures.append((kind, step, dict(values)))

    def log_picture(self, name: str, step: int, path: Path) -> None:
        self.pictures.append((name, step, path.read_bytes()[:4]))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    """A stand-in for wandb and trackio, which count as installed."""
    service = type("Service", (Memory,), {"made": []})
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(tracking.SERVICES, name, service)
    monkeypatch.setattr("torchmae.training.tracking._is_installed", lambda name: True)
    return service


def records(run: Path) -> list[tuple[str, int, dict[str, float]]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("kind"), line.pop("step"), line) for line in lines]


def test_a_service_gets_what_the_run_folder_gets(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(**TINY, out=tmp_path / "a", trackers="wandb")
    assert "wandb: here" in capsys.readouterr().err
    (service,) = memory.made
    assert service.figures == records(run.path)
    assert service.pictures == [("reconstruction", step, b"\x89PNG") for step in (3, 6)]
    assert service.config["model"]["depth"] == 1
    assert service.closed
    assert not (run.path / "tensorboard").exists()
    # The service may be another one when the run goes on; the id is the run's.
    pretrain(resume=run.path, trackers="trackio")
    assert [item.id for item in memory.made] == [service.id] * 2


def test_a_service_that_fails_costs_the_run_nothing(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str]
) -> None:
    memory.fails_at = 2
    run = pretrain(**TINY, out=tmp_path / "a", trackers="wandb")
    assert run.figures["state"] == "finished"
    assert len(records(run.path)) == 10
    (service,) = memory.made
    assert (len(service.figures), service.pictures) == (1, [])
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert said[1:] == [
        "wandb gets no more figures of this run: the server is away; metrics.jsonl has all of them",
    ]


def test_a_service_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: RunFolder, config: Mapping[str, Any]) -> Any:
        raise TimeoutError

    monkeypatch.setitem(tracking.SERVICES, "trackio", refuse)
    with Trackers() as trackers:
        trackers.start("trackio", RunFolder(tmp_path), {}, Display("plain"))
        trackers.log("train", 1, {"loss": 1.0})
        trackers.log_picture("reconstruction", 1, tmp_path / "a.png")
    said = capsys.readouterr().err.splitlines()
    assert said == ["trackio gets no more figures of this run: TimeoutError; metrics.jsonl has all of them"]


def test_an_id_is_kept_and_renewed_when_it_cannot_be_read(tmp_path: Path) -> None:
    first, other = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    other.mkdir()
    name = tracking_id(RunFolder(first))
    assert len(name) == 8
    assert tracking_id(RunFolder(first)) == name != tracking_id(RunFolder(other))
    (first / "tracking.json").write_text("{")
    assert tracking_id(RunFolder(first)) not in (name, "")


# Steps from one to another of a run.
PART = """
import sys
from pathlib import Path
from torchmae.training.run_folder import RunFolder
from torchmae.training.tracking import SERVICES
path = Path("a")
tracker = SERVICES[sys.argv[1]](RunFolder(path), {"mask": {"ratio": 0.75}})
place = tracker.place
for step in range(int(sys.argv[2]), int(sys.argv[3]) + 1):
    tracker.log("train", step, {"loss": 1 / step, "lr": 0.0})
    tracker.log("val", step, {"knn": float("nan")})
    tracker.log_picture("reconstruction", step, path / "a.png")
tracker.close()
print(place)
"""


def in_two_parts(service: str, place: Path, **environment: str) -> str:
    """A run of three steps, of which the second is repeated; where the service says that it is."""
    (place / "a").mkdir()
    Image.new("RGB", (6, 4), "red").save(place / "a" / "a.png")
    # No credentials of whoever runs the tests.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "TRACKIO_", "SWANLAB_", "HF_"))
    }
    for steps in ("1", "2"), ("2", "3"):
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", PART, service, *steps],
            cwd=place,
            env=kept | {"HOME": str(place), "WANDB_ERROR_REPORTING": "false"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.count("\n") == 1
    return ran.stdout.strip()


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after seven bytes of their own."""
    from wandb.proto import wandb_internal_pb2

    block = 32768
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # the rest of a block is too short for a head
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(tmp_path: Path) -> None:
    place = in_two_parts("wandb", tmp_path, WANDB_MODE="offline", WANDB_PROJECT="digits")
    name = json.loads((tmp_path / "a" / "tracking.json").read_text())["id"]
    files = sorted((tmp_path / "a" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert place == f"offline; to upload: wandb sync {files[-1].parent.relative_to(tmp_path)}"
    runs, histories = [], []
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                runs.append((record.run.run_id, record.run.project, record.run.display_name, config["mask"]))
            elif record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key): item.value_json for item in record.history.item}
                histories.append({name: json.loads(value) for name, value in items.items() if value})
    assert set(map(str, runs)) == {str((name, "digits", "a", {"ratio": 0.75}))}
    assert {row["_step"]: row["train/loss"] for row in histories} == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert {row["reconstruction/_type"] for row in histories} == {"image-file"}
    for row in histories:
        assert list((tmp_path / "a").glob(f"wandb/*/files/{row['reconstruction/path']}"))


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio(tmp_path: Path) -> None:
    place = in_two_parts("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"), TRACKIO_PROJECT="digits")
    name = "a-" + json.loads((tmp_path / "a" / "tracking.json").read_text())["id"]
    assert place == f"{name}; to see it: trackio show --project digits"
    code = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage; (run,) = trackio.Api().runs('digits');"
        "print(json.dumps([run.name, run.config, SQLiteStorage.get_logs('digits', run.name)]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    )
    run, config, logs = json.loads(ran.stdout)
    assert (run, config["mask"]) == (name, {"ratio": 0.75})
    assert [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row] == [
        *((1, 1.0), (2, 0.5)),
        *((2, 0.5), (3, 1 / 3)),
    ]
    pictures = [row["reconstruction"]["file_path"] for row in logs if "reconstruction" in row]
    assert [(tmp_path / "trackio" / "media" / path).is_file() for path in pictures] == [True] * 4


@pytest.mark.skipif(find_spec("swanlab") is None, reason="swanlab is not installed")
def test_swanlab_offline(tmp_path: Path) -> None:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    place = in_two_parts("swanlab", tmp_path, SWANLAB_MODE="offline", SWANLAB_PROJ_NAME="digits")
    name = json.loads((tmp_path / "a" / "tracking.json").read_text())["id"]
    files = sorted((tmp_path / "a" / "swanlab").glob(f"run-*-{name}/run-{name}.swanlab"))
    assert place == f"offline; to upload: swanlab sync {files[-1].parent.relative_to(tmp_path)}"
    runs, losses, pictures = set(), [], []
    for file in files:
        reader = DataStoreReader()
        reader.open(file)
        with closing(reader):
            stored = [Record.FromString(data) for data in reader]
        for record in stored:
            if record.HasField("start"):
                runs.add((record.start.id, record.start.project, record.start.name))
            elif record.HasField("scalar") and record.scalar.key == "train/loss":
                losses.append((record.scalar.step, record.scalar.value.number))
            elif record.HasField("media"):
                pictures += [(file.parent, item.filename) for item in record.media.value.items]
        assert "ratio: 0.75" in (file.parent / "files" / "config.yaml").read_text()
    assert runs == {(name, "digits", "a")}
    assert losses == [(1, 1.0), (2, 0.5), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [len(list(folder.rglob(picture))) for folder, picture in pictures] == [1] * 4
