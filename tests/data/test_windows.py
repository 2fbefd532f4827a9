"""Windows of large images, not resized: random ones in training, a grid in evaluation, their mean in embed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import torchmae
from torchmae.commands.reconstruct import mask_from_image
from torchmae.config import DataConfig
from torchmae.config.data import DataOptions
from torchmae.data.arrays import ArraySource
from torchmae.data.formats import FORMATS, Format, open_item
from torchmae.data.items import ArrayItem, Context, Image, Region
from torchmae.data.loader import Plan
from torchmae.data.opening import Data, grid_of_windows, open_data, window_size
from torchmae.data.reading import probe
from torchmae.data.sources import Source
from torchmae.errors import ConfigError
from torchmae.evaluation.images import run_data

RNG = np.random.default_rng(0)
SCENES = (RNG.random((5, 40, 52, 3)) * 60000).astype(np.uint16)
SIZE = (16, 16)


def opened(images: np.ndarray | Source, size: tuple[int, ...] = SIZE, **settings) -> Data:
    config = DataConfig(source="own", **{"num_workers": 0, "val": "none", "flip": False, **settings})
    own = {"train": images if isinstance(images, Source) else ArraySource(images, context=Context.of(config))}
    return open_data(config, input_size=size, channels=None, device=torch.device("cpu"), own=own)


def stored(data: Data, batch: torch.Tensor) -> np.ndarray:
    """A batch's values as they were stored, channels last."""
    mean, std = (torch.tensor(v).view(1, -1, *[1] * (batch.ndim - 2)) for v in data_of(data))
    return ((batch * std + mean) * 65535).round().movedim(1, -1).numpy().astype(np.uint16)


def data_of(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return data.normalisation.mean, data.normalisation.std


def place_of(window: np.ndarray, scene: np.ndarray) -> tuple[int, ...] | None:
    views = np.lib.stride_tricks.sliding_window_view(scene[..., 0], window.shape[:2])
    found = np.argwhere((views == window[..., 0]).all((-1, -2)))
    return tuple(found[0].tolist()) if len(found) else None


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_random_windows_of_an_epoch(cache: str) -> None:
    data = opened(SCENES, cache=cache)
    assert data.window == SIZE
    each = -(-40 * 52 // 256)  # the area over a window's
    assert len(data.train) == 5 * each
    assert any(f"windows of 16x16 at their own resolution, {5 * each} of 5 images" in note for note in data.notes)
    plan = Plan(len(data.train), 8, 3)
    places: list[tuple[int, tuple[int, ...] | None]] = []
    for batch in data.train.train_batches(plan, 0, 2 * plan.steps_per_epoch):
        for window, index in zip(stored(data, batch.images), batch.indices, strict=True):
            places.append((int(index) // each, place_of(window, SCENES[index // each])))
    assert None not in [place for _, place in places]  # pixels as they are
    assert len(set(places)) > 0.9 * len(places)  # other places for each draw and epoch
    corners = np.array([place for _, place in places])
    assert (corners.min(0) <= 3).all() and (corners.max(0) >= [21, 33]).all()
    step = 4  # a place is a function of (seed, epoch, index)
    (again,) = opened(SCENES, cache=cache).train.train_batches(plan, step, step + 1)
    first = [place_of(w, SCENES[i // each]) for w, i in zip(stored(data, again.images), again.indices, strict=True)]
    assert first == [place for _, place in places[8 * step : 8 * step + 8]]


def test_memory_and_workers_give_the_same_windows() -> None:
    gaps = SCENES.astype(np.float32)
    gaps[:, :20, :25] = np.nan
    for images in (SCENES, gaps):
        loaders = [opened(images, cache=cache, flip=True).train for cache in ("memory", "none")]
        plan = Plan(len(loaders[0]), 9, 0)
        for one, other in zip(*(loader.train_batches(plan, 0, 6) for loader in loaders), strict=True):
            torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-5)
            assert (one.valid is None) == (other.valid is None)
            assert one.valid is None or torch.equal(one.valid, other.valid)
            assert one.valid is None or one.valid.float().mean((1, 2, 3)).median() > 0.5


def test_a_few_large_pictures_are_cut_into_windows() -> None:
    seen = probe(ArraySource(np.zeros((1, 1000, 1200, 3), np.uint8)))
    found = [window_size(DataOptions(), seen, (16, 16), count) for count in (1, 63, 64, None)]
    assert found == [(16, 16), (16, 16), None, None]


def test_a_grid_covers_every_pixel() -> None:
    source = grid_of_windows(ArraySource(SCENES, labels=[0, 1, 0, 1, 1]), SIZE, None)
    assert len(source) == 5 * 3 * 4
    assert source.labels.tolist() == np.repeat([0, 1, 0, 1, 1], 12).tolist()
    seen = np.zeros((40, 52), int)
    for index in range(12):
        window = source.read(12 + index)
        top, left = place_of(window, SCENES[1])
        seen[top : top + 16, left : left + 16] += 1
        np.testing.assert_array_equal(source.open(12 + index).read(((2, 5), (0, 7))), window[2:7, :7])
    assert seen.min() == 1
    data = opened(SCENES, val="held-out")
    assert len(data.val) == 12


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "expected"),
    [
        ((32, 32, 3), np.uint16, (16, 16), None),  # twice as large
        ((33, 20, 3), np.uint16, (16, 16), (16, 16)),
        ((64, 64, 3), np.uint8, (16, 16), None),  # a photograph
        ((64, 64, 5), np.uint8, (16, 16), (16, 16)),
        ((64, 64, 1), np.float32, (16, 16), (16, 16)),
        ((640, 2), np.float32, (64,), (64,)),
        ((20, 20, 20, 1), np.uint8, (8, 8, 8), (8, 8, 8)),
    ],
)
def test_what_auto_means(shape: tuple[int, ...], dtype: type, size: tuple[int, ...], expected: object) -> None:
    source = ArraySource(np.zeros((3, *shape), dtype), context=Context(spatial_dims=len(size)))
    assert window_size(DataOptions(), probe(source), size) == expected
    assert window_size(DataOptions(window="none"), probe(source), size) is None
    assert window_size(DataOptions(window=24), probe(source), size) == (24,) * len(size)
    with pytest.raises(ConfigError, match="one for each axis"):
        window_size(DataOptions(window=(2, 2, 2, 2)), probe(source), size)


def test_other_windows_than_the_input_and_images_smaller_than_one() -> None:
    data = opened(SCENES, window=32, cache="none")
    (batch,) = data.train.train_batches(Plan(len(data.train), 4, 0), 0, 1)
    assert batch.images.shape == (4, 3, 16, 16)
    small = opened(SCENES[:, :12], window=16)
    assert len(small.train) == 5 * 5  # reduced to 12 x 12
    assert next(small.train.eval_batches(np.arange(6), 6)).images.shape == (6, 3, 16, 16)


def test_a_window_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Region | None] = []

    class Scene(ArrayItem):
        def read(self, region: Region | None = None, reduction: int = 1) -> Image:
            asked.append(region)
            return super().read(region, reduction)

    form = Format((".scene",), rb"SCENE", lambda data, _: Scene(SCENES[data[5]], form="scene"))
    monkeypatch.setitem(FORMATS, "scene", form)
    (tmp_path / "scenes").mkdir()
    for i in range(5):
        (tmp_path / "scenes" / f"{i}.scene").write_bytes(b"SCENE" + bytes([i]))
    run = torchmae.pretrain(
        {"source": tmp_path / "scenes", "num_workers": 0, "cache": "none"},
        recipe="digits",
        model={"input_size": SIZE, "patch_size": 4},
        epochs=1,
        batch_size=16,
        out=tmp_path / "run",
        progress="none",
    )
    regions = [region for region in asked if region is not None]
    assert len(regions) > 40 and {tuple(length for _, length in region) for region in regions} == {SIZE}
    assert asked.count(None) <= 5  # each scene once, to look for near twins among the held-out scenes
    about = json.loads((run.path / "model.json").read_text())
    assert about["window"] == [16, 16] and about["reading"] is None
    model = torchmae.load(run.path)
    middle = model.preprocess(SCENES[0])
    assert torch.equal(middle, model.preprocess(SCENES[0][12:28, 18:34]))
    hole = np.zeros((40, 52), np.uint8)
    hole[16:24, 18:22] = 255  # of the window in the middle, rows 4 to 11 and columns 0 to 3
    PIL.Image.fromarray(hole).save(tmp_path / "hole.png")
    assert mask_from_image(model, tmp_path / "hole.png", 1).ids_masked.tolist() == [[4, 8]]

    torchmae.embed(run.path, {"num_workers": 0}, out=tmp_path / "x.npz", precision="fp32")
    found = np.load(tmp_path / "x.npz")
    assert found["features"].shape[0] == 5
    grid = grid_of_windows(ArraySource(SCENES), SIZE, None)
    expected = model.encode(model.preprocess(*(grid.read(i) for i in range(12)))).mean(0)
    row = [Path(path).name for path in found["paths"]].index("0.scene")
    np.testing.assert_allclose(found["features"][row], expected, atol=1e-5)
    with pytest.raises(ConfigError, match="window"):
        torchmae.embed(run.path, {"num_workers": 0}, out=tmp_path / "y.npz", pool="tokens")
    figures = torchmae.evaluate(
        run.path, {"num_workers": 0}, method="reconstruction", reconstruction={"ratios": (0.5,)}
    )
    assert any(name.endswith("_psnr") for name in figures)
    assert run_data(str(run.path)).window == SIZE  # for a run that is resumed
    del about["window"]
    (run.path / "model.json").write_text(json.dumps(about))
    assert run_data(str(run.path)).window == "none"  # a run from before there were windows


def test_windows_of_one_file_are_read_by_several_threads(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 60000, (512, 512), dtype=np.uint16)
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "scene.tif", pixels, rowsperstrip=1)
    context = Context()
    item = open_item(tmp_path / "scene.tif", context)
    regions = [((row, 64), (column, 64)) for row in range(0, 512, 64) for column in range(0, 512, 64)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for region, found in zip(regions, pool.map(item.read, regions), strict=True):
                (row, height), (column, width) = region
                np.testing.assert_array_equal(found[..., 0], pixels[row : row + height, column : column + width])


def test_a_photograph_above_the_limit_is_seen_whole(tmp_path: Path) -> None:
    pixels = np.zeros((1600, 1600, 3), np.uint8)
    pixels[:, 800:] = 255
    pixels[800:] //= 2
    PIL.Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    settings = {
        "source": str(tmp_path),
        "val": "none",
        "num_workers": 0,
        "flip": False,
        "cache": "none",
        "window": "none",
    }
    seen = []
    for limit in (100, 1):  # at its own size, and at half of it
        config = DataConfig(max_megapixels=limit, **settings)
        data = open_data(config, input_size=(32, 32), channels=3, device=torch.device("cpu"))
        (batch,) = data.train.eval_batches(np.arange(1), 1)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in data_of(data))
        seen.append(batch.images * std + mean)
    torch.testing.assert_close(seen[0], seen[1], atol=0.05, rtol=0)
    assert [round(float(seen[1][0, 0, row, column]), 1) for row in (4, 28) for column in (4, 28)] == [0, 1, 0, 0.5]
