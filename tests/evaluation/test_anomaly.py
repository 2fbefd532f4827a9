"""Anomaly detection: masks that cover evenly, distances by hand, pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from torchmae import presets
from torchmae.config.data import DataOptions
from torchmae.config.evaluate import AnomalyOptions, EvaluateOptions
from torchmae.data.arrays import ArraySource
from torchmae.data.reading import BadFiles
from torchmae.data.sources import FileSource, Source
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, ConfigError, DataError
from torchmae.evaluation import anomaly, anomaly_maps
from torchmae.evaluation.anomaly_data import AnomalyData
from torchmae.evaluation.bench import Bench
from torchmae.evaluation.images import ImageSet, ModelInput
from torchmae.evaluation.subject import PIXELS, Subject
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.report.panels import Look
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, "fp32", 1)
NORMALISATION = Normalisation((0.5,), (0.25,))
TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}


def model(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    built = presets.build("vit_digits", in_chans=1, decoder_num_heads=2, **TINY, **changes).eval()
    assert isinstance(built, MaskedAutoencoder)
    return built


def image_set(source: Source, size: tuple[int, int] = (8, 8)) -> ImageSet:
    return ImageSet(
        source,
        data=DataOptions(num_workers=0),
        model=ModelInput(size, 1, NORMALISATION, CPU, 16),
        normalisation=NORMALISATION,
        bad=BadFiles(len(source), 0.0),
    )


def predicts_grey() -> MaskedAutoencoder:
    """Whose predictions are all zero, the mean of the images: errors are squares."""
    network = model(norm_pix=False)
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.zero_()
    return network


def greys(count: int, odd: int) -> tuple[Any, Any]:
    """Grey images with a little noise; of the last `odd`, one patch is a chequerboard."""
    random = np.random.default_rng(0)
    images = 128 + random.normal(0, 2, (count, 8, 8, 1))
    labels = np.zeros(count, dtype=np.int64)
    if odd:
        images[-odd:, 2:4, 4:6, 0] += np.array([[60, -60], [-60, 60]])
        labels[-odd:] = 1
    return images.clip(0, 255).astype(np.uint8), labels


def sets() -> tuple[ImageSet, ImageSet]:
    normal, test = greys(40, 0), greys(30, 10)
    return image_set(ArraySource(normal[0])), image_set(ArraySource(*test, ("normal", "anomalous")))


def bench_of(normal: ImageSet, test: ImageSet, **more: Any) -> Bench:
    return Bench(AnomalyData(normal, test, ("normal", "anomalous"), (), **more), RUNTIME, Display("none"), "run")


def detect(network: MaskedAutoencoder, normal: ImageSet, test: ImageSet, **options: Any) -> anomaly.Detection:
    return anomaly.detect(bench_of(normal, test), Subject("model", network), **options)


# Masks.


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_masks_cover_every_patch_equally_often(length: int, ratio: float, seed: int) -> None:
    noise = torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
    masks = anomaly.covering_masks(noise, ratio)
    times = torch.stack([mask.removed() for mask in masks]).sum(0)
    assert int(times.min()) == int(times.max()) >= 1
    assert len({mask.ids_masked.shape for mask in masks}) == 1
    for mask in masks:
        both = torch.cat([mask.ids_keep, mask.ids_masked], dim=1)
        assert torch.equal(both.sort(1).values, torch.arange(length).expand(3, -1))
        assert mask.ids_keep.shape[1] >= 1


@pytest.mark.parametrize(
    ("length", "ratio", "groups"),
    [
        (64, 0.75, (4, 3)),
        (196, 0.75, (4, 3)),
        (64, 0.5, (2, 1)),
        (64, 0.9, (8, 7)),  # 14 of 16 is as near
        (49, 0.75, (7, 5)),
        (16, 0.999, (16, 15)),
        (17, 0.75, (17, 13)),
        (2, 0.75, (2, 1)),
    ],
)
def test_groups(length: int, ratio: float, groups: tuple[int, int]) -> None:
    assert anomaly.mask_groups(length, ratio) == groups


def test_each_image_has_groups_of_its_own_and_given_noise_gives_given_masks() -> None:
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]])
    masks = anomaly.covering_masks(noise, 0.5)
    assert [mask.ids_masked.tolist() for mask in masks] == [[[0, 1], [1, 3]], [[2, 3], [2, 0]]]


def test_patch_errors_are_those_of_the_model_averaged_over_masks() -> None:
    network, images, noise = model(norm_pix=False), torch.randn(3, 1, 8, 8), torch.rand(3, 16)
    with torch.no_grad():
        errors = anomaly.patch_errors(network, images, noise, 0.75, RUNTIME)
        losses = [network(images, mask).loss for mask in anomaly.covering_masks(noise, 0.75)]
    assert errors.shape == (3, 16)
    assert errors.min() > 0
    torch.testing.assert_close(errors.mean(), torch.stack(losses).mean())


def test_an_error_stands_where_the_patch_is() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 2:4, 4:6] = 3.0  # row 1, column 2 of a grid of 4 x 4
    with torch.no_grad():
        errors = anomaly.patch_errors(predicts_grey(), images, torch.rand(1, 16), 0.75, RUNTIME)
    expected = torch.zeros(1, 16)
    expected[0, 6] = 9.0
    torch.testing.assert_close(errors, expected)


# Distances and areas.


def test_distance_by_hand() -> None:
    memory = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, -1.0]]), dim=1)
    queries = torch.tensor([[5.0, 0.0], [2.0, 2.0]])
    half = 1 - 0.5**0.5
    torch.testing.assert_close(anomaly.distance(memory, queries, 1), torch.tensor([0.0, half]))
    torch.testing.assert_close(anomaly.distance(memory, queries, 2), torch.tensor([0.5, half]))
    torch.testing.assert_close(anomaly.distance(memory, queries, 9), torch.tensor([1.0, 1.0]))


def test_what_lies_far_outside_is_far_although_normal_images_lie_on_its_side() -> None:
    normal = torch.tensor([10.0, 0.0]) + torch.randn(200, 2)
    inside, outside = torch.tensor([[10.0, 0.5]]), torch.tensor([[10.0, 9.0]])
    memory = F.normalize(normal, dim=1)
    assert anomaly.distance(memory, outside, 5) > 10 * anomaly.distance(memory, inside, 5)


def test_auroc_by_hand() -> None:
    truth = torch.tensor([False, False, True, True])
    assert anomaly.auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), truth) == 1.0
    assert anomaly.auroc(torch.tensor([0.4, 0.3, 0.2, 0.1]), truth) == 0.0
    assert anomaly.auroc(torch.tensor([0.1, 0.3, 0.2, 0.4]), truth) == 0.75
    for kind in (True, False):
        with pytest.raises(DataError, match=f"all 4 test images are {'anomalous' if kind else 'normal'}"):
            anomaly.auroc(torch.rand(4), torch.full((4,), kind))


# Whole runs.


def test_an_odd_patch_is_found_and_located(tmp_path: Path) -> None:
    options = EvaluateOptions(
        method="anomaly", normal="a", test="b", out=str(tmp_path / "new"), anomaly=AnomalyOptions(maps=True)
    )
    figures = anomaly.measure(bench_of(*sets()), Subject("model", predicts_grey()), options).figures
    assert set(figures) == {f"anomaly_{name}" for name in anomaly.SCORES}
    assert figures["anomaly_reconstruction_max"] == 1.0
    assert figures["anomaly_patch_knn_max"] == 1.0
    with Image.open(tmp_path / "new" / "pictures" / "anomaly.png") as picture:
        assert picture.size[0] > 2 * 3 * 96
        assert len(set(picture.get_flattened_data())) > 50
        assert "unusual" in picture.info["Description"]
    text = (tmp_path / "new" / "anomaly_scores.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["anomalous"] for row in rows] == ["0"] * 20 + ["1"] * 10
    assert rows[29]["path"] == "array/29"
    every = sorted((tmp_path / "new" / "anomaly_maps").iterdir())
    assert len(every) == 2 * 30
    with Image.open(every[-1]) as picture:
        assert (picture.size, picture.mode) == ((8, 8), "L")
    worst = [float(row["reconstruction_max"]) for row in rows]
    assert min(worst[20:]) > max(worst[:20])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bench = bench_of(*sets())
    detection = anomaly.detect(bench, Subject("model", model()))
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*; .*another folder"):
        anomaly_maps.write_files(tmp_path / "file" / "new", bench.data, detection, Look())


def test_maps_point_at_the_patch() -> None:
    detection = detect(predicts_grey(), *sets())
    assert detection.anomalous.tolist() == [False] * 20 + [True] * 10
    for name in ("reconstruction", "patch_knn"):
        assert detection.maps[name].shape == (30, 4, 4)
        assert detection.maps[name][20:].flatten(1).argmax(1).tolist() == [6] * 10
    maps = detection.maps["reconstruction"]
    torch.testing.assert_close(detection.scores["reconstruction_max"], maps.amax((1, 2)))
    torch.testing.assert_close(detection.scores["reconstruction"], maps.mean((1, 2)))


def test_the_seed_decides() -> None:
    normal, test = sets()
    scores = [detect(model(), normal, test, rounds=1, seed=seed).scores["reconstruction"] for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_a_test_image_that_is_normal_in_every_pixel_has_no_distance() -> None:
    images, _ = greys(20, 0)
    same = image_set(ArraySource(images, np.arange(20) % 2))
    detection = detect(model(), image_set(ArraySource(images)), same)
    assert detection.maps["patch_knn"].abs().max() < 1e-5
    assert detection.scores["knn"].min() > -1e-5


def test_normal_patches_are_kept_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomaly, "MAX_TOKENS", 50)
    for share, count in ((1.0, 50), (0.2, 10)):
        means, tokens = anomaly.normal_features(bench_of(*sets()), Subject("model", model()), share, 0)
        assert (len(means), len(tokens)) == (40, count)
    means, tokens = anomaly.normal_features(bench_of(*sets()), Subject(PIXELS, None, (2, 2)), 1.0, 0)
    assert (means.shape, tokens.shape) == ((40, 64), (50, 4))


def test_a_coreset_covers_what_a_random_choice_leaves_out() -> None:
    torch.manual_seed(0)
    crowd, rare = torch.randn(500, 300) * 0.01, torch.eye(300)[:9] * 5
    features = torch.cat([crowd, rare])
    bench = bench_of(*sets())
    chosen = anomaly.coreset_of(features, 10 / 509, 0, bench)
    assert sorted(chosen.tolist()) == [0, *range(500, 509)]
    assert torch.equal(chosen, anomaly.coreset_of(features, 10 / 509, 0, bench))
    assert torch.equal(anomaly.coreset_of(features, 1.0, 0, bench), torch.arange(509))


def test_the_mlp_model_cannot() -> None:
    with pytest.raises(ConfigError, match="this model has no patches to find anomalies by; use a vit model"):
        detect(presets.build("mlp", in_chans=1, input_size=(8, 8)), *sets())


# Pictures.


def published(scores: Any, truth: Any, limit: float) -> float:
    """AUPRO as Bergmann et al. define it, a threshold at a time."""
    regions, count = ndimage.label(truth, np.ones((3, 3)))
    fpr, overlap = [0.0], [0.0]
    for threshold in np.unique(scores)[::-1]:
        found = scores >= threshold
        fpr.append(found[~truth].mean())
        overlap.append(np.mean([found[regions == number].mean() for number in range(1, count + 1)]))
    grid = np.linspace(0, limit, 200_001)
    return float(np.trapezoid(np.interp(grid, fpr, overlap), grid) / limit)


def test_pixel_figures_are_torchmetrics_and_the_published_ones() -> None:
    torch.manual_seed(1)
    truth = np.zeros((40, 60), dtype=bool)
    truth[5:9, 5:30], truth[9, 30], truth[20:38, 40:58], truth[30, 3] = True, True, True, True
    scores = (torch.rand(40, 60) + 0.3 * torch.from_numpy(truth)).numpy().round(2)
    values, numbers = np.unique(scores, return_inverse=True)
    regions, count = ndimage.label(truth, np.ones((3, 3)))
    assert count == 3  # one of them joined by a corner
    sizes = np.bincount(regions.ravel())
    normal, defects, of_regions = (
        np.bincount(numbers.ravel(), weights.ravel(), minlength=len(values))
        for weights in (~truth * 1.0, truth * 1.0, np.where(truth, 1 / sizes[regions], 0.0))
    )
    theirs = torchmetrics.functional.auroc(torch.from_numpy(scores), torch.from_numpy(truth), task="binary")
    assert anomaly_maps.area(normal, defects) == pytest.approx(float(theirs), abs=1e-5)
    for limit in (0.3, 0.05):
        assert anomaly_maps.area(normal, of_regions, limit) == pytest.approx(published(scores, truth, limit), abs=1e-4)


def test_maps_cover_pictures_of_any_size_and_are_compared_with_masks(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names, masks = [], {}
    for number, (height, width) in enumerate([(16, 16), (16, 40), (30, 16), (9, 8), (16, 16), (20, 20)]):
        pixels = 128 + random.normal(0, 2, (height, width))
        mask = np.zeros((height, width), dtype=np.uint8)
        if number in (1, 2):
            pixels[4:8, -8:-4] += np.array([[60, -60], [-60, 60]]).repeat(2, 0).repeat(2, 1)
            mask[4:8, -8:-4] = 255
        names.append(f"{number}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / names[-1])
        masks[number] = tmp_path / f"{number}_mask.png"
        Image.fromarray(mask).save(masks[number])
    labels = np.array([0, 1, 1, 0, 0, 0])
    normal = image_set(FileSource(tmp_path, [names[i] for i in (0, 4, 5)]))
    test = image_set(FileSource(tmp_path, names, labels, ("normal", "anomalous")))
    bench = bench_of(normal, test, masks=masks, threshold=127)
    detection = anomaly.detect(bench, Subject("model", predicts_grey()))
    assert len(detection.windows) == 1 + 3 + 2 + 2 + 1 + 1
    for place in range(6):
        found = anomaly_maps.map_of(detection, "reconstruction", place)
        assert found.shape == detection.grid.size(place)
        assert bool(found.isfinite().all())
    place = anomaly_maps.map_of(detection, "reconstruction", 1).argmax().item()
    assert 2 <= place // 40 <= 9 and 30 <= place % 40 <= 37
    figures = anomaly_maps.pixel_figures(bench.data, detection, lambda *_: None)
    truth = torch.cat([torch.from_numpy(bench.data.defect(i, detection.grid.size(i))).flatten() for i in range(6)])
    for name in ("reconstruction", "patch_knn"):
        scores = torch.cat([anomaly_maps.map_of(detection, name, i).flatten() for i in range(6)])
        theirs = torchmetrics.functional.auroc(scores, truth, task="binary")
        assert figures[f"anomaly_{name}_pixel"] == pytest.approx(float(theirs), abs=2e-3)
        assert 0 < figures[f"anomaly_{name}_aupro"] <= 1
    # Without the pixels of the defects that can be seen.
    bench = bench_of(normal, test, masks=masks, threshold=127, unscored=frozenset({1, 2}))
    with pytest.raises(DataError, match="of the pixels of the test images, none is a defect"):
        anomaly_maps.pixel_figures(bench.data, detection, lambda *_: None)
    own = anomaly.detect(bench_of(normal, test, window=(8, 8)), Subject("model", model()))
    assert len(own.windows) == 4 + 10 + 8 + 2 + 4 + 9  # at their own resolution
