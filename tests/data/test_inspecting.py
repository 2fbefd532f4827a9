from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchmae.api import suggested_input
from torchmae.cli import main
from torchmae.data.arrays import ArraySource
from torchmae.data.items import Context
from torchmae.data.layouts import folder_splits, open_splits
from torchmae.data.reading import SplitFacts, inspect_splits, kind_of_data


def test_what_a_folder_holds(write_pictures, tmp_path: Path) -> None:
    paths = write_pictures("train/ant/1.png", "train/ant/2.jpg", "train/bee/1.png", "val/bee/1.png")
    write_pictures("train/bee/big.png", size=(30, 40))
    (tmp_path / "train" / "ant" / "copy.png").write_bytes(paths[0].read_bytes())
    (tmp_path / "val" / "bee" / "copy.png").write_bytes(paths[2].read_bytes())
    (tmp_path / "train" / "bee" / "bad.jpg").write_bytes(b"")
    seen = []
    found = inspect_splits(folder_splits(tmp_path), None, lambda what, done, total: seen.append((done, total)))
    train = found.splits["train"]
    assert seen[-1] == (8, 8)
    assert (train.images, train.examined) == (6, 6)
    assert train.sizes == {(12, 16): 4, (30, 40): 1}
    assert train.formats == {"PNG": 4, "JPEG": 1}
    assert train.channels == {3: 5}
    assert train.corrupt == [(str(tmp_path / "train/bee/bad.jpg"), "the file is empty")]
    assert train.classes == {"ant": 3, "bee": 3}
    assert (
        len(found.duplicates) == 2 or len(found.duplicates) == 3
    )  # write_pictures begins anew: big.png differs in size
    assert [f"train: {tmp_path}/train/bee/1.png", f"val: {tmp_path}/val/bee/copy.png"] in found.duplicates
    assert found.leaked == 1
    assert json.loads(json.dumps(train.as_json()))["median_size"] == [12, 16]


def test_arrays_and_limits() -> None:
    images = np.linspace(-1, 3, 10 * 6 * 6 * 4).reshape(10, 6, 6, 4)
    images[5] = np.nan
    source = ArraySource(images, [0, 0, -1, *[7] * 7], ["zero"], title="x")
    found = inspect_splits({"train": source}, limit=None).splits["train"]
    assert (found.low, found.high) == (pytest.approx(-1), pytest.approx(3))
    assert found.corrupt == [("x/5", "holds no data at all")]
    assert found.formats == {"array": 9}
    assert found.classes == {"unlabelled": 1, "zero": 2, "7": 7}
    assert inspect_splits({"train": source}, limit=4).splits["train"].examined == 4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((8, 8), ((8, 8), 2)),
        ((13, 16), ((12, 16), 2)),
        ((224, 224), ((224, 224), 16)),
        ((100, 400), ((96, 400), 16)),
        ((500, 1500), ((112, 368), 16)),
        ((1000,), ((1000,), 4)),
        ((30, 64, 64), ((24, 64, 64), 8)),
    ],
)
def test_suggested_input(size: tuple[int, ...], expected: tuple[tuple[int, ...], int]) -> None:
    assert suggested_input(size) == expected


def test_what_volumes_and_sound_seem_to_be_and_the_command_to_begin_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nibabel = pytest.importorskip("nibabel")
    (tmp_path / "scans").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        values = rng.normal(size=(12, 12, 12)).astype(np.float32) * 3**i
        file = tmp_path / "scans" / f"{'abcdefgh'[i]}.nii"
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 1 + i % 2, 1])), file)
    splits = open_splits(str(tmp_path / "scans"), Context(spatial_dims=3))
    found = inspect_splits(splits)
    assert kind_of_data(found.splits["train"]).startswith("volumes: 1 channel, 12 x 12 x 12, spacing 1 x 1 x 1")
    assert {name: value for name, (value, _) in found.proposals.items()} == {"spacing": "median", "normalise": "sample"}
    (low, middle, high), *_ = found.splits["train"].percentiles
    assert low < middle < high
    assert main(["data", "inspect", str(tmp_path / "scans"), "--progress", "none"]) == 0
    words = shlex.split(capsys.readouterr().out.rpartition("to train on it: ")[2])
    assert words[:2] == ["torchmae", "pretrain"]
    extra = ["--epochs=1", "--batch=8", "--progress=none", "--device=cpu", "--out", str(tmp_path / "run")]
    assert main([*words[1:], *extra]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"sizes": {(1800,): 3}, "channels": {12: 3}, "example": {"rate": 360}},
            "signals such as ECG: 12 channels, 5 s at 360 Hz",
        ),
        (
            {"sizes": {(8000,): 3}, "channels": {1: 3}, "example": {"rate": 16000}},
            "sound: 1 channel, 0.5 s at 16000 Hz",
        ),
        ({"sizes": {(64, 64): 3}, "channels": {3: 3}, "dtypes": {"uint8": 3}}, "colour pictures: 64 x 64"),
        (
            {"sizes": {(50, 48, 64): 1}, "channels": {3: 1}, "example": {"fps": 25}},
            "video: 2 s at 25 frames a second, frames of 48 x 64",
        ),
    ],
)
def test_one_sentence_says_what_the_data_seems_to_be(facts: dict[str, Any], expected: str) -> None:
    counted = {name: Counter(value) if name != "example" else value for name, value in facts.items()}
    found = SplitFacts(3, **{"formats": Counter({"array": 3}), "dtypes": Counter({"float32": 3}), **counted})
    assert kind_of_data(found) == expected
