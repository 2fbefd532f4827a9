"""Pixels without data: no statistics, no loss, no crop that is mostly of them, whatever value stands there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import RUNTIME, mlp, vit

import torchmae
from torchmae import presets
from torchmae.building import pretrain_settings
from torchmae.config import DataConfig, MaskConfig, OptimConfig, PretrainConfig
from torchmae.data.arrays import ArraySource
from torchmae.data.items import Context
from torchmae.data.loader import Batch, Plan
from torchmae.data.opening import Data, open_data
from torchmae.data.reading import measure
from torchmae.errors import ConfigError
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.nn.patches import gather, patchify, unpatchify
from torchmae.training.pretrain_task import PretrainTask
from torchmae.training.trainer import train_step

RNG = np.random.default_rng(0)
VALUES = RNG.random((24, 16, 16, 2), np.float32)
EMPTY = np.zeros((24, 16, 16), bool)
EMPTY[:, :6, :7] = True
EMPTY[::3] = False


def convnext() -> MaskedAutoencoder:
    torch.manual_seed(1)
    return presets.build("convnext_32", in_chans=2, input_size=(16, 16))


MODELS = {
    "pixels": lambda: vit(in_chans=2, input_size=(16, 16), norm_pix=False),
    "normalised": lambda: vit(in_chans=2, input_size=(16, 16), patch_size=(4, 4), norm_pix=True),
    "gradients": lambda: vit(in_chans=2, input_size=(16, 16), patch_size=(4, 4), hog_weight=0.5),
    "part": lambda: vit(in_chans=2, input_size=(16, 16), decoder="cross", predict_ratio=0.5),
    "convnext": convnext,
}


def with_value(value: float, dtype: str = "float32") -> np.ndarray:
    images = (VALUES if dtype == "float32" else VALUES * 200).astype(dtype)
    images[EMPTY] = value
    return images


def opened(images: np.ndarray, size: tuple[int, int] = (16, 16), **settings) -> Data:
    config = DataConfig(source="own", num_workers=0, val="none", **settings)
    own = {"train": ArraySource(images, context=Context.of(config))}
    return open_data(config, input_size=size, channels=None, device=torch.device("cpu"), own=own)


def whole(images: np.ndarray, **settings) -> Batch:
    """All images, uncropped."""
    return next(opened(images, **settings).train.eval_batches(np.arange(len(images)), len(images)))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_no_value_without_data_reaches_a_batch(cache: str) -> None:
    batches = [
        next(opened(with_value(value), (12, 12), nodata=nodata, cache=cache).train.train_batches(Plan(24, 24, 0), 0, 1))
        for value, nodata in ((np.nan, "auto"), (np.inf, "nan"), (-9999.0, -9999), (1e6, 1e6))
    ]
    first = batches[0]
    assert first.valid.shape == (24, 1, 12, 12)
    assert not first.images[~first.valid.expand_as(first.images)].any()
    assert first.valid.float().mean((1, 2, 3)).min() >= 0.5
    for other in batches[1:]:
        assert torch.equal(other.images, first.images)
        assert torch.equal(other.valid, first.valid)
    assert opened(VALUES).train.held.valid is None
    assert whole(VALUES, cache=cache).valid is None


@pytest.mark.parametrize(("dtype", "value", "nodata"), [("uint8", 255, 255), ("uint16", 0, 0), ("float32", 7e9, 7e9)])
def test_held_in_memory_or_read_by_workers(dtype: str, value: float, nodata: float) -> None:
    loaders = [
        opened(with_value(value, dtype), (12, 8), nodata=nodata, cache=cache).train for cache in ("memory", "none")
    ]
    step = {"uint8": 0.15, "uint16": 0.02, "float32": 1e-4}[dtype]  # of noise, whose edges two kernels round apart
    for first, second in zip(*(loader.train_batches(Plan(24, 12, 1), 0, 4) for loader in loaders), strict=True):
        assert torch.equal(first.valid, second.valid)
        torch.testing.assert_close(first.images, second.images, rtol=0, atol=step)


def test_crops_are_drawn_anew_until_half_of_them_holds_data() -> None:
    images = VALUES.copy()
    images[:, :, :9] = np.nan
    for cache in ("memory", "none"):
        loader = opened(images, (8, 8), cache=cache, crop_scale=(0.1, 0.3)).train
        shares = torch.cat(
            [batch.valid.float().mean((1, 2, 3)) for batch in loader.train_batches(Plan(24, 24, 0), 0, 10)]
        )
        assert (shares < 0.5).float().mean() < 0.2  # of one crop, 0.6
        again = opened(images, (8, 8), cache=cache, crop_scale=(0.1, 0.3)).train
        later = next(again.train_batches(Plan(24, 24, 0), 9, 10))
        assert torch.equal(later.valid.float().mean((1, 2, 3)), shares[-24:])


def test_statistics_are_of_what_was_measured() -> None:
    expected = np.concatenate([VALUES[i][~EMPTY[i]] for i in range(24)])
    for value, nodata in ((np.nan, "auto"), (-9999.0, -9999)):
        found = measure(ArraySource(with_value(value), context=Context(nodata=nodata)))
        np.testing.assert_allclose(found.normalisation.mean, expected.mean(0), atol=5e-3)  # images count alike
        np.testing.assert_allclose(found.normalisation.std, expected.std(0), atol=5e-3)
        (note,) = found.notes
        assert f"{EMPTY.mean():.1%}" in note


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_valid_patches_alone(name: str) -> None:
    model = MODELS[name]().train()
    batch = whole(with_value(np.nan))
    mask = Masker(model.encoder, "random", 0.5)(3, 0, batch.indices, "cpu", batch.valid)
    found = model(batch.images, mask)
    has_data = patchify(batch.valid, model.patch_size).any(-1)
    assert has_data.gather(1, mask.ids_keep).all()
    assert mask.ids_keep.shape[1] == round(has_data.sum(1).min().item() / 2)
    assert torch.equal(mask.ids_keep.sort()[0].unique(dim=1), mask.ids_keep.sort()[0])
    # The same prediction, compared patch by patch with the values that are there.
    total, count = 0.0, 0
    ids = model.predicted(mask).ids_masked
    true, shown = (gather(patchify(item, model.patch_size), ids) for item in (batch.images, batch.valid))
    for pred, values, valid in zip(found.pred.flatten(0, 1), true.flatten(0, 1), shown.flatten(0, 1), strict=True):
        kept = valid.repeat_interleave(2)
        if kept.any():
            part = values[kept]
            part = (part - part.mean()) / (part.var() + 1e-6).sqrt() if model.target.norm_pix else part
            total += (pred[kept] - part).square().sum().item()
            count += int(kept.sum())
    assert found.losses[0].item() == pytest.approx(total / count, rel=1e-5)
    assert model.target.num_values(model.predicted(mask)) == count


def test_images_without_gaps_keep_their_masks_and_patches_without_data_weigh_nothing() -> None:
    model, indices = vit(input_size=(16, 16), in_chans=2), np.arange(4)
    for strategy in ("random", "block", "grid", "cells2"):
        masker = Masker(model.encoder, strategy, 0.75)
        valid = torch.ones(4, 1, 16, 16, dtype=torch.bool)
        plain, same = masker(0, 0, indices), masker(0, 0, indices, "cpu", valid)
        assert torch.equal(plain.ids_keep, same.ids_keep) and torch.equal(plain.ids_masked, same.ids_masked)
        valid[0, :, 4:] = False  # 16 of 64 patches are left: half of them are shown
        assert masker(0, 0, indices, "cpu", valid).ids_keep.shape == (4, 8)
        valid[0] = False  # nothing to learn from
        empty = masker(0, 0, indices, "cpu", valid)
        assert empty.ids_keep.shape == (4, 8)
        assert model.target.weights(empty)[0].sum() == 0


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_batch_make_the_step_of_the_whole(name: str) -> None:
    batch = whole(with_value(np.nan))
    results = []
    for parts in (1, 5):
        model = MODELS[name]()
        config = PretrainConfig(batch_size=24, accumulate=parts, optim=OptimConfig(lr=0.1))
        task = PretrainTask(pretrain_settings(config, model), model, RUNTIME, 24)
        task.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
        loss = train_step(task, task.inputs(batch, 0, 1)).loss
        results.append([loss, *(p.detach() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_figures_are_of_valid_pixels_whatever_stands_elsewhere() -> None:
    figures = []
    for value, nodata in ((np.nan, "auto"), (1e6, 1e6)):
        model, batch = MODELS["normalised"](), whole(with_value(value), nodata=nodata)
        mask = Masker(model.encoder, "random", 0.5)(0, 0, batch.indices, "cpu", batch.valid)
        figures.append(HoldOut(model, [(batch.images, mask)], RUNTIME).run())
        result = model.reconstruct(batch.images, mask)
        assert not result.images[~batch.valid.expand_as(batch.images)].any()
        assert result.removed[~batch.valid].all()
    assert figures[0] == figures[1]
    assert 0.9 < figures[0]["loss_mean_patch"] < 1.2  # of normalised noise


@pytest.mark.parametrize("name", ["pixels", "convnext"])
def test_features_are_of_the_patches_with_data(name: str) -> None:
    model, batch = MODELS[name]().eval(), whole(VALUES)
    valid = torch.ones(24, 1, 16, 16, dtype=torch.bool)
    valid[1::2, :, :9, :10] = False
    has_data = patchify(valid, model.patch_size).any(-1)
    changed = torch.where(unpatchify_flags(has_data, model), batch.images, 7.0)
    for pool in model.pools:
        found = model.encode(changed, pool, valid)
        for row in (0, 1):
            ids = has_data[row].nonzero().T
            encoded = model.encoder(batch.images[row : row + 1], ids)
            features = {
                "mean": [encoded.patches.mean(1)],
                "cls": [encoded.prefix[:, 0]] if "cls" in model.pools else [],
            }
            wanted = torch.cat(features["mean"] + features["cls"] if pool == "both" else features[pool], 1)
            torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-5)
    tokens = model.encode(changed, "tokens", valid)
    assert not tokens[~has_data].any() and tokens[has_data].any(-1).all()
    assert torch.equal(model.encode(batch.images, valid=torch.ones_like(valid)), model.encode(batch.images))


def unpatchify_flags(flags: torch.Tensor, model: MaskedAutoencoder) -> torch.Tensor:
    """(B, 1, *size) of (B, L)."""
    pixels = flags[..., None].expand(-1, -1, int(np.prod(model.patch_size)))
    return unpatchify(pixels, model.patch_size, model.encoder.grid)


def test_an_early_part_of_small_images_and_a_model_without_patches() -> None:
    batch = whole(with_value(np.nan))
    config = PretrainConfig(batch_size=24, start_size=8, mask=MaskConfig(ratio=0.5))
    model = MODELS["pixels"]()
    images, mask = PretrainTask(pretrain_settings(config, model), model, RUNTIME, 24).inputs(batch, 0, 4)
    assert images.shape[2:] == (8, 8) and mask.valid.shape == (24, 16, 4)
    encoder = mlp(input_size=(16, 16), in_chans=2).encoder
    with pytest.raises(ConfigError, match="vit"):
        Masker(encoder, "elements", 0.5)(0, 0, batch.indices, "cpu", batch.valid)


def test_the_tag_of_a_file_and_a_run_on_real_tiles(shared_data: Path, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    images = sorted((shared_data / "s2-wildfire" / "images").glob("*.tif"))[::4]
    for i, path in enumerate(images):
        tile = tifffile.imread(path)
        if i % 3 == 0:
            tile[:40, : 20 + i % 30] = 65535
        place = tmp_path / "tiles" / ("post" if "post" in path.name else "pre") / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        options = {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(place, tile, extratags=[(42113, "s", 0, "65535", True)], **options)
    run = torchmae.pretrain(
        {"source": tmp_path / "tiles", "num_workers": 0},
        recipe="digits",
        model={"input_size": [32, 32], "patch_size": 4, "norm_pix": True},
        epochs=2,
        batch_size=16,
        out=tmp_path / "run",
        progress="none",
    )
    about = json.loads((run.path / "model.json").read_text())
    assert max(about["mean"]) < 0.1  # of reflectance, not of 65535
    notes = json.loads((run.path / "environment.json").read_text())["data"]
    assert "65535 means no data" in notes and "of the pixels hold no data" in notes
    assert 0.5 < run.figures["loss"] < 5
    assert 0.5 < run.figures["loss_mean_patch"] < 1.5
