from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from torchmae.api import suggested_input
from torchmae.data.arrays import ArraySource
from torchmae.data.layouts import folder_splits
from torchmae.data.reading import inspect_splits


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
