"""What values mean: types on one scale, extremes that are no measurements, what is shown, what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torchmae
from torchmae.config import DataConfig
from torchmae.data.arrays import ArraySource
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.opening import open_data
from torchmae.data.reading import measure, probe
from torchmae.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
BANDS = RNG.random((40, 16, 16, 4), np.float32)


@pytest.mark.parametrize("value", [-9999.0, 3.4e38, float(np.finfo(np.float32).min)])
def test_a_lone_extreme_is_said_with_the_option_that_mends_it(value: float) -> None:
    images = BANDS.copy()
    images[RNG.random(images.shape[:-1]) < 0.05] = value
    found = measure(ArraySource(images))
    assert any(f"--data.nodata={np.float32(value)!s}" in note for note in found.notes)
    mended = measure(ArraySource(images, context=Context(nodata=value)))
    assert not any("--data.nodata" in note for note in mended.notes)
    np.testing.assert_allclose(mended.normalisation.mean, BANDS.mean(axis=(0, 1, 2)), atol=0.02)


def test_saturated_words_are_said_and_other_ends_are_not() -> None:
    words = RNG.integers(0, 10000, (20, 16, 16, 1)).astype(np.uint16)
    assert not any("nodata" in note for note in measure(ArraySource(words)).notes)
    words[:, 0, 0] = 65535
    assert any("--data.nodata=65535" in note for note in measure(ArraySource(words)).notes)
    assert measure(ArraySource(BANDS)).notes == ()


def test_nan_in_many_images(tmp_path: Path) -> None:
    images = BANDS.copy()
    images[20:, 3, 3] = np.nan
    np.save(tmp_path / "x.npy", images)

    def opened(**settings):
        config = DataConfig(source=str(tmp_path / "x.npy"), num_workers=0, val="none", **settings)
        return open_data(config, input_size=(8, 8), channels=None, device=torch.device("cpu"))

    for cache in ("memory", "none"):
        with pytest.raises(DataError, match=r"--data\.nodata auto"):
            data = opened(cache=cache, nodata="none")
            list(data.train.eval_batches(np.arange(40), 10))
        filled = opened(cache=cache)
        assert all(torch.isfinite(batch.images).all() for batch in filled.train.eval_batches(np.arange(40), 10))
        assert filled.bad.items == []
    with pytest.raises(DataError, match=r"x\.npy/\d+: holds values that are not finite"):
        opened(cache="memory", max_bad=0.4, nodata="none")


def mixed(folder: Path, names: str) -> None:
    library = pytest.importorskip("tifffile")
    for i in range(8):
        picture = RNG.random((12, 12))
        if "b" in names:
            Image.fromarray((picture * 255).astype(np.uint8)).save(folder / f"b{i}.png")
        if "w" in names:
            library.imwrite(folder / f"w{i}.tif", (picture * 4095).astype(np.uint16))
        if "r" in names:
            library.imwrite(folder / f"r{i}.tif", (picture * 255).astype(np.float32))


@pytest.mark.parametrize("names", ["bw", "br", "bwr"])
def test_mixed_types_are_put_on_one_scale_by_the_option_that_is_named(tmp_path: Path, names: str) -> None:
    mixed(tmp_path, names)
    source = open_splits(str(tmp_path))["train"]
    found = measure(source, kinds=probe(source).kinds)
    (note,) = (note for note in found.notes if note.startswith("types mixed"))
    scale = json.loads(note.partition("--data.scale '")[2].partition("'")[0])
    assert scale == {**({"uint16": 4095.0} if "w" in names else {}), **({"float32": 255.0} if "r" in names else {})}
    config = DataConfig(source=str(tmp_path), num_workers=0, val="none", crop_scale=(1, 1), flip=False, scale=scale)
    data = open_data(config, input_size=(12, 12), channels=None, device=torch.device("cpu"))
    (batch,) = data.train.eval_batches(np.arange(len(data.train)), len(data.train))
    means = {
        name: batch.images[[i for i in range(len(source)) if f"/{name}" in source.name(i)]].mean() for name in names
    }
    assert all(abs(value) < 0.3 for value in means.values())


def test_the_majority_decides_about_bands(tmp_path: Path) -> None:
    library = pytest.importorskip("tifffile")
    for i in range(9):
        bands = 3 if i < 2 else 4
        pixels = RNG.integers(0, 255, (12, 12, bands), dtype=np.uint8)
        library.imwrite(tmp_path / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig")
    seen = probe(open_splits(str(tmp_path))["train"])
    assert seen.channels == 4
    assert seen.notes == ("4 bands", "of 3 bands, not used (2 of 9 looked at)")


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("uint16", 0, 4095), ("uint16", 300, 9000), ("int16", -1024, 3071), ("float32", -3, 4)]
)
def test_pictures_of_anything_are_shown_over_their_own_range(dtype: str, low: int, high: int, tmp_path: Path) -> None:
    waves = np.sin(np.arange(24 * 16 * 16) / 7).reshape(24, 16, 16) * 0.5 + 0.5
    np.save(tmp_path / "x.npy", (waves * (high - low) + low).astype(dtype))
    run = torchmae.pretrain(
        {"source": tmp_path / "x.npy", "num_workers": 0},
        recipe="digits",
        model={"input_size": [16, 16]},
        epochs=1,
        batch_size=8,
        out=tmp_path / "run",
        progress="none",
    )
    pretrained = torchmae.load(run.path)
    shown = pretrained.description.normalisation.shown(pretrained.preprocess(*np.load(tmp_path / "x.npy")[..., None]))
    assert float(shown.min()) == pytest.approx(0, abs=0.05)
    assert float(shown.max()) == pytest.approx(1, abs=0.05)
    grid = np.asarray(Image.open(sorted((run.path / "reconstructions").glob("*.png"))[-1]).convert("L"))
    assert grid.std() > 20
    kind = "float32" if dtype == "int16" else dtype
    assert json.loads((run.path / "model.json").read_text())["scale"] == {kind: {"uint16": 65535, "float32": 1}[kind]}


def test_features_of_another_type_are_refused_or_said(tmp_path: Path) -> None:
    run = torchmae.pretrain(recipe="digits", epochs=1, out=tmp_path / "run", progress="none", data={"val": "none"})
    pretrained = torchmae.load(run.path)
    with pytest.raises(ConfigError, match="floats up to 200 and the model was trained on uint8 divided by 255"):
        pretrained.preprocess(np.full((8, 8, 1), 200.0, np.float32))
    np.save(tmp_path / "words.npy", RNG.integers(0, 4096, (30, 8, 8)).astype(np.uint16))
    from torchmae.config.data import DataOptions
    from torchmae.evaluation.images import ModelInput, open_parts

    _, notes = open_parts(
        DataOptions(source=str(tmp_path / "words.npy"), num_workers=0),
        "all",
        ModelInput((8, 8), 1, pretrained.description.normalisation, torch.device("cpu")),
    )
    assert any("uint16 divided by 65535 for a model trained on uint8 divided by 255" in note for note in notes)


def test_single_files_are_read_as_the_run_read_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(9):
        values = RNG.random((8, 8), dtype=np.float32)
        values[:2] = -9999
        np.save(folder / f"{i}.npy", values)
    run = torchmae.pretrain(
        {"source": folder, "num_workers": 0, "nodata": -9999, "val": "none"},
        recipe="digits",
        epochs=1,
        out=tmp_path / "run",
        progress="none",
    )
    assert json.loads((run.path / "model.json").read_text())["reading"] == {"nodata": -9999}
    images = torchmae.load(run.path).preprocess(folder / "0.npy")
    assert images.abs().max() < 10  # the mean of its channel, not ten thousand deviations away
