"""Samples at another spacing, and clips along time: regions, no data, what is stored and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from field_files import clip, sound

import torchmae
from torchmae.config import DataConfig
from torchmae.data.arrays import ArraySource
from torchmae.data.formats import open_item
from torchmae.data.items import ArrayItem, Context, Item, prepared
from torchmae.data.layouts import open_splits
from torchmae.data.loader import Plan
from torchmae.data.opening import Data, open_data
from torchmae.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def spaced(values: np.ndarray, **options) -> Item:
    """An array with pixels of one millimetre."""
    return prepared(ArrayItem(values, meta={"spacing": (1.0,) * (values.ndim - 1)}), Context(**options))


def check_regions(item: Item) -> np.ndarray:
    whole = item.read()
    assert whole.shape == (*item.size, item.channels)
    assert whole.dtype == item.dtype
    for _ in range(4):
        starts = [int(RNG.integers(0, length)) for length in item.size]
        region = tuple((s, int(RNG.integers(1, n - s + 1))) for s, n in zip(starts, item.size, strict=True))
        part = whole[tuple(slice(start, start + length) for start, length in region)]
        np.testing.assert_allclose(item.read(region), part, atol=1e-4)
    return whole


@pytest.mark.parametrize(("wanted", "size"), [(2.0, (20, 15, 10)), ((1, 0.5, 2), (40, 60, 10)), (0.7, (57, 42, 28))])
def test_volumes_at_another_spacing(wanted: float | tuple[float, ...], size: tuple[int, ...]) -> None:
    z, y, x = np.mgrid[:40, :30, :20].astype(np.float32) + 0.5  # a ramp in millimetres
    item = spaced((z + 2 * y + 3 * x)[..., None], spacing=wanted)
    steps = np.broadcast_to(wanted, 3)
    assert item.size == size
    np.testing.assert_allclose(item.meta["spacing"], steps)
    z, y, x = ((np.arange(n) + 0.5) * step for n, step in zip(size, steps, strict=True))
    ramp = z[:, None, None] + 2 * y[:, None] + 3 * x
    inner = (slice(5, -5), slice(5, -5), slice(4, -4))
    np.testing.assert_allclose(check_regions(item)[..., 0][inner], ramp[inner], atol=0.01)


def test_integers_stay_integers_and_no_data_stays_away() -> None:
    values = RNG.integers(0, 60000, (24, 24, 2)).astype(np.uint16)
    assert check_regions(spaced(values, spacing=1.5)).dtype == np.uint16
    values[:12], values[12:] = 7, 65535
    image, valid = spaced(values, spacing=2, nodata=65535).read_valid()
    assert valid is not None
    assert valid[:6].all() and not valid[6:].any()
    assert (image[:6] == 7).all()


def test_sound_at_another_rate(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)[:, None]
    path = sound(tmp_path / "a.wav", tone * 0.5)
    item = open_item(path, Context(spacing=8000))
    assert (item.size, item.meta["rate"]) == ((8000,), 8000)
    expected = np.sin(2 * np.pi * 440 * (np.arange(8000) * 2 + 0.5) / 16000) * 0.5
    np.testing.assert_allclose(check_regions(item)[10:-10, 0], expected[10:-10], atol=0.02)
    bands = open_item(path, Context(spacing=8000, spectrogram=20))
    assert (bands.size, bands.meta["rate"]) == ((20, 98), 8000)
    with pytest.raises(DataError, match="give one"):
        open_item(path, Context(spacing=(1, 2)))
    with pytest.raises(DataError, match="larger"):
        open_item(path, Context(spacing=1e6))
    with pytest.raises(DataError, match="max_megapixels"):
        open_item(path, Context(spacing=160000, max_megapixels=0.1)).read()


def test_frames_are_chosen(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 40, "mpeg4")
    whole = open_item(path, Context()).read()
    fifth = open_item(path, Context(spacing=5))  # of 25 a second
    assert fifth.meta["fps"] == pytest.approx(5)
    np.testing.assert_array_equal(check_regions(fifth), whole[2::5])
    np.testing.assert_array_equal(open_item(path, Context(clip=(4, 4))).read(), whole[2::4])


def test_the_median(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    for i, scale in enumerate((1, 2, 4)):
        values = RNG.normal(size=(12, 12, 12)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([scale, 2 * scale, 3 * scale, 1])), tmp_path / f"{i}.nii")
    source = open_splits(str(tmp_path), Context(spatial_dims=3, spacing="median"))["train"]
    assert [source.open(i).size for i in range(3)] == [(6, 6, 6), (12, 12, 12), (24, 24, 24)]
    with pytest.raises(DataError, match="do not say"):
        open_splits("digits", Context(spacing="median"))
    with pytest.raises(DataError, match="does not say"):
        ArraySource(np.zeros((2, 4, 4)), context=Context(spacing=2.0)).open(0)


VIDEOS = RNG.integers(0, 256, (3, 20, 24, 32, 1)).astype(np.uint8)
VIDEOS[:, :, 0, 0, 0] = np.arange(20)


def opened(images: np.ndarray, size: tuple[int, ...], **settings) -> Data:
    config = DataConfig(source="own", num_workers=0, val="none", flip=False, crop_scale=(1, 1), **settings)
    own = {"train": ArraySource(images, context=Context.of(config, spatial_dims=len(size)))}
    return open_data(config, input_size=size, channels=None, device=torch.device("cpu"), own=own)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_clips_are_windows_along_time_of_whole_frames(cache: str) -> None:
    data = opened(VIDEOS, (4, 24, 32), clip=4, cache=cache)
    assert data.window == (4, 0, 0)
    assert len(data.train) == 3 * 5
    firsts = set()
    for batch in data.train.train_batches(Plan(15, 15, 0), 0, 4):
        stored = (batch.images * data.normalisation.std[0] + data.normalisation.mean[0]) * 255
        for image, index in zip(stored.numpy(), batch.indices, strict=True):
            first = round(float(image[0, 0, 0, 0]))
            firsts.add(first)
            np.testing.assert_allclose(image[0], VIDEOS[index // 5, first : first + 4, ..., 0], atol=0.01)
    assert len(firsts) > 10 and max(firsts) == 16
    strided = opened(VIDEOS, (4, 24, 32), clip=(4, 3), cache=cache)
    assert len(strided.train) == 3 * 2  # of 6 frames
    (batch,) = strided.train.train_batches(Plan(6, 6, 0), 0, 1)
    frames = (batch.images * strided.normalisation.std[0] + strided.normalisation.mean[0])[:, 0, :, 0, 0] * 255
    assert (frames.diff(dim=1).round() == 3).all()
    with pytest.raises(ConfigError, match="time"):
        opened(VIDEOS[0], (8, 8), clip=4)


def test_a_run_on_clips_is_evaluated_on_clips(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(5):
        clip(tmp_path / "data" / f"{i}.mp4", 20 + i, "mpeg4")
    run = torchmae.pretrain(
        {"source": tmp_path / "data", "num_workers": 0, "clip": (4, 2), "spacing": "median"},
        recipe="digits",
        model={"input_size": (4, 24, 32), "patch_size": (2, 8, 8)},
        epochs=1,
        batch_size=16,
        max_tokens=2 * 3 * 4 * 5,  # 5 clips of 24 patches
        out=tmp_path / "run",
        progress="none",
    )
    about = json.loads((run.path / "model.json").read_text())
    assert about["window"] == [4, 0, 0]
    assert "batch_size: 5\n" in (run.path / "config.yaml").read_text()
    assert about["reading"] == {"spacing": 25.0, "clip": [4, 2]}
    model = torchmae.load(run.path)
    file = tmp_path / "data" / "0.mp4"
    torchmae.embed(run.path, {"num_workers": 0}, out=tmp_path / "x.npz", precision="fp32")
    found = np.load(tmp_path / "x.npz")
    half = open_item(file, Context(clip=(4, 2))).read()
    assert torch.equal(model.preprocess(file), model.preprocess(half[3:7]))
    expected = model.encode(model.preprocess(half[:4], half[3:7], half[6:])).mean(0)  # an even grid over 10 frames
    row = [Path(path).name for path in found["paths"]].index("0.mp4")
    np.testing.assert_allclose(found["features"][row], expected, atol=1e-4)
