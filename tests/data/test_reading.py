from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from picture_files import picture
from PIL import Image

from torchmae.data import reading
from torchmae.data.arrays import ArraySource, hold
from torchmae.data.items import Context
from torchmae.data.layouts import folder_splits
from torchmae.data.reading import MAX_MISSES, BadFiles, first_readable, measure, probe, read_many
from torchmae.data.sources import Source, Subset
from torchmae.errors import DataError


def statistics_of(source: Source, **options) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found = measure(source, **options).normalisation
    return found.mean, found.std


@pytest.fixture
def three_of_five(write_pictures, tmp_path: Path) -> Source:
    """Files 0 to 4, of which 1 and 4 cannot be read."""
    paths = write_pictures(*(f"{i}.png" for i in range(5)))
    paths[1].write_bytes(b"")
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    return folder_splits(tmp_path)["train"]


def test_the_next_one_that_reads_stands_in(three_of_five: Source, tmp_path: Path) -> None:
    bad: list[tuple[str, str]] = []
    read = [first_readable(three_of_five, i, bad, three_of_five.read)[0] for i in range(5)]
    assert read == [0, 2, 2, 3, 0]
    assert [name for name, _ in bad] == [str(tmp_path / "1.png"), str(tmp_path / "4.png")]
    assert bad[0][1] == "the file is empty"


def test_windows_of_a_damaged_image_count_once(write_pictures, tmp_path: Path) -> None:
    write_pictures("0.png", "1.png")[0].write_bytes(b"")
    source = Subset(folder_splits(tmp_path)["train"], np.repeat([0, 1], 2 * MAX_MISSES))
    bad: list[tuple[str, str]] = []
    assert first_readable(source, 3, bad, source.read)[0] == 2 * MAX_MISSES
    assert bad == [(str(tmp_path / "0.png"), "the file is empty")]


def test_a_source_that_went_away_is_not_read_to_its_end(write_pictures, tmp_path: Path) -> None:
    for i in range(MAX_MISSES + 36):
        (tmp_path / f"{i:03d}.png").touch()
    source = folder_splits(tmp_path)["train"]
    bad: list[tuple[str, str]] = []
    with pytest.raises(DataError, match=r"64 images in a row cannot be read; the last: .*073.png: the file is empty"):
        first_readable(source, 10, bad, source.read)
    assert len(bad) == MAX_MISSES
    with pytest.raises(DataError, match=r"none of 64 images can be read; the last: .*099.png: the file is empty"):
        probe(source)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("worth", [0, 10**9])
def test_reading_many_keeps_the_order(
    three_of_five: Source, cores: int, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "num_cores", lambda: cores)
    monkeypatch.setattr(reading, "_WORTH_THREADS", worth)
    indices = np.array([4, 0, 3, 1, 2] * 20)
    readings = list(read_many(three_of_five, indices))
    assert [asked for asked, *_ in readings] == indices.tolist()
    assert [read for _, read, *_ in readings] == [0, 0, 3, 2, 2] * 20
    for _, read, (image, _), _ in readings:
        np.testing.assert_array_equal(image, three_of_five.read(read))
    assert [len(bad) for *_, bad in readings[:5]] == [1, 0, 0, 1, 0]


def test_probe_finds_channels_sizes_and_type(write_pictures, tmp_path: Path) -> None:
    write_pictures("a.png", "b.png")
    source = folder_splits(tmp_path)["train"]
    assert (probe(source).channels, set(probe(source).sizes)) == (3, {(12, 16)})
    for name in ("a", "b"):
        Image.fromarray(picture(5, 7)).convert("L").save(tmp_path / f"{name}.png")
    assert (probe(source).channels, set(probe(source).sizes)) == (1, {(5, 7)})
    Image.fromarray(np.zeros((6, 7), np.uint16)).save(tmp_path / "a.png")
    write_pictures("c.png")
    mixed = probe(folder_splits(tmp_path)["train"])
    assert (mixed.channels, set(mixed.sizes)) == (3, {(6, 7), (5, 7), (12, 16)})


@pytest.mark.parametrize(("dtype", "high"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_statistics_are_those_of_numpy(dtype: str, high: int) -> None:
    rng = np.random.default_rng(0)
    images = (rng.random((40, 6, 5, 2)) * [high, high / 2]).astype(dtype)
    mean, std = statistics_of(ArraySource(images))
    scaled = images.astype(np.float64) / high
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-6)


def test_statistics_count_every_image_alike(write_pictures, tmp_path: Path) -> None:
    for name, value, size in (("a", 0, (40, 40)), ("b", 255, (4, 4))):
        Image.new("L", size, value).save(tmp_path / f"{name}.png")
    mean, std = statistics_of(folder_splits(tmp_path)["train"])
    assert mean == pytest.approx((0.5,))
    assert std == pytest.approx((0.5,))


def test_a_channel_that_never_changes_gets_deviation_one() -> None:
    images = np.zeros((10, 4, 4, 2), np.uint8)
    images[..., 0] = 51
    images[:5, ..., 1] = 255
    mean, std = statistics_of(ArraySource(images))
    assert mean == pytest.approx((0.2, 0.5))
    assert std == pytest.approx((1.0, 0.5))


def test_statistics_of_a_sample_reaches_over_the_whole_source() -> None:
    images = np.arange(1000, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    seen = []
    mean, _ = statistics_of(ArraySource(images), sample=200, progress=lambda *report: seen.append(report))
    assert mean[0] == pytest.approx(499.5, abs=3)
    assert seen == [("measuring mean and deviation", done, 200) for done in range(1, 201)]


def test_values_that_are_not_finite_are_named() -> None:
    images = np.random.default_rng(0).random((6, 2, 2), np.float32)
    images[1, 0, 0] = np.inf
    source = ArraySource(images, context=Context(nodata="none"))
    with pytest.raises(DataError, match="array/1: holds values that are not finite"):
        source.read(1)
    bad = BadFiles(6, 0.2)
    held = hold(source, float("inf"), bad)
    np.testing.assert_array_equal(held.gather(np.arange(6))[0][:, 0], images[[0, 2, 2, 3, 4, 5]])
    assert [name for name, _ in bad.items] == ["array/1"]
    with pytest.raises(DataError, match=r"--data\.nodata auto"):
        hold(source, float("inf"), BadFiles(6, 0))
    filled = ArraySource(images, context=Context(nodata="nan")).read(1)
    assert filled[0, 0, 0] == pytest.approx(images[1].ravel()[1:].mean())
