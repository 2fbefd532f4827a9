from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from torchmae.data.arrays import ArraySource, DoesNotFitError, hold, map_array
from torchmae.data.layouts import folder_splits
from torchmae.data.reading import BadFiles
from torchmae.data.sources import Subset
from torchmae.errors import DataError

EVERYTHING = float("inf")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_are_used_where_they_lie(dtype: type) -> None:
    images = np.arange(6 * 4 * 5 * 2).reshape(6, 4, 5, 2).astype(dtype)
    held = hold(Subset(ArraySource(images), np.array([5, 1])), EVERYTHING, BadFiles(2, 0))
    assert held.images.data_ptr() == images.ctypes.data
    gathered, _ = held.gather(np.array([1, 0]))
    assert gathered.shape == (2, 2, 4, 5)
    np.testing.assert_array_equal(gathered.numpy(), np.moveaxis(images[[1, 5]], -1, 1))
    gathered.zero_()
    assert images[5].any()


def test_other_types_are_converted() -> None:
    held = hold(ArraySource(np.eye(4, dtype=bool)[None]), EVERYTHING, BadFiles(1, 0))
    assert held.images.dtype == torch.uint8
    assert held.images.sum() == 4 * 255


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 4, 4), np.uint8))
    images = map_array(tmp_path / "x.npy")
    assert hold(ArraySource(images), EVERYTHING, BadFiles(3, 0)).images.data_ptr() == images.ctypes.data


def test_read_only_arrays_are_copied() -> None:
    images = np.ones((3, 4, 4), np.uint8)
    images.flags.writeable = False
    assert hold(ArraySource(images), EVERYTHING, BadFiles(3, 0)).images.sum() == 48


def test_files_are_decoded_once_with_progress(write_pictures, tmp_path: Path) -> None:
    write_pictures("a/1.png", "a/2.png", "b/1.png")
    source = folder_splits(tmp_path)["train"]
    reports = []
    held = hold(source, EVERYTHING, BadFiles(3, 0), lambda *report: reports.append(report))
    assert reports == [("reading images", done, 3) for done in (1, 2, 3)]
    assert held.images.shape == (3, 3, 12, 16)
    assert held.images.nbytes == 3 * 3 * 12 * 16
    np.testing.assert_array_equal(held.gather(np.array([2]))[0][0].permute(1, 2, 0).numpy(), source.read(2))
    assert held.labels.tolist() == [0, 0, 1]


def test_stand_ins_bring_their_labels(write_pictures, tmp_path: Path) -> None:
    write_pictures("a/1.png", "b/1.png", "b/2.png")[0].write_bytes(b"")
    source = folder_splits(tmp_path)["train"]
    bad = BadFiles(3, 0.4)
    held = hold(source, EVERYTHING, bad)
    assert held.labels.tolist() == [1, 1, 1]
    assert source.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(held.images[0].numpy(), held.images[1].numpy())
    assert bad.items == [(str(tmp_path / "a" / "1.png"), "the file is empty")]
    with pytest.raises(DataError, match="1 of 3 images cannot be read"):
        hold(source, EVERYTHING, BadFiles(3, 0))


def test_what_does_not_fit(write_pictures, tmp_path: Path) -> None:
    write_pictures("a.png", "b.png")
    write_pictures("c.png", size=(8, 9))
    source = folder_splits(tmp_path)["train"]
    with pytest.raises(DoesNotFitError, match=r"differ: .*a.png is 12x16x3 uint8, .*c.png is 8x9x3 uint8"):
        hold(source, EVERYTHING, BadFiles(3, 0))
    with pytest.raises(DoesNotFitError, match=r"take 0.0 GiB, and 0.0 GiB are there for them"):
        hold(source, 3 * 12 * 16 * 3 - 1, BadFiles(3, 0))
    with pytest.raises(DoesNotFitError, match="0.0 GiB are there"):
        hold(ArraySource(np.zeros((3, 4, 4), np.uint8)), 47, BadFiles(3, 0))


def test_reading_ends_at_the_first_that_differs(
    write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(*(f"{i}.png" for i in range(9)))
    write_pictures("1.png", size=(8, 9))
    source = folder_splits(tmp_path)["train"]
    read = []
    monkeypatch.setattr(source, "open", lambda index: read.append(index) or type(source).open(source, index))
    with pytest.raises(DoesNotFitError):
        hold(source, EVERYTHING, BadFiles(9, 0))
    assert set(read) == {0, 1}
