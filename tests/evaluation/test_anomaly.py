"""Anomaly detection: masks that cover evenly, distances by hand, pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torchmae import presets
from torchmae.config.data import DataOptions
from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.arrays import ArraySource
from torchmae.data.reading import BadFiles
from torchmae.data.sources import Source
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, ConfigError, DataError
from torchmae.evaluation import anomaly
from torchmae.evaluation.bench import Bench
from torchmae.evaluation.images import EvaluationData, ImageSet, ModelInput
from torchmae.evaluation.subject import Subject
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


def image_set(source: Source) -> ImageSet:
    return ImageSet(
        source,
        data=DataOptions(num_workers=0),
        model=ModelInput((8, 8), 1, NORMALISATION, CPU, 16),
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


def detect(*args: Any, **options: Any) -> anomaly.Detection:
    return anomaly.detect(*args, runtime=RUNTIME, **options)


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
    data = EvaluationData(*sets(), ("normal", "anomalous"), ())
    options = EvaluateOptions(method="anomaly", normal="a", test="b", out=str(tmp_path / "new"))
    bench = Bench(data, RUNTIME, Display("none"), "run")
    figures = anomaly.measure(bench, Subject("model", predicts_grey()), options).figures
    assert set(figures) == {f"anomaly_{name}" for name in anomaly.SCORES}
    assert figures["anomaly_reconstruction_max"] == 1.0
    assert figures["anomaly_patch_knn_max"] == 1.0
    with Image.open(tmp_path / "new" / "anomaly.png") as picture:
        assert picture.size[0] > 2 * 3 * 96
        assert len(set(picture.get_flattened_data())) > 50
        assert "unusual" in picture.info["Description"]
    text = (tmp_path / "new" / "anomaly_scores.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["anomalous"] for row in rows] == ["0"] * 20 + ["1"] * 10
    assert rows[29]["path"] == "array/29"
    worst = [float(row["reconstruction_max"]) for row in rows]
    assert min(worst[20:]) > max(worst[:20])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    detection = detect(model(), *sets())
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*; .*another folder"):
        anomaly.write_files(tmp_path / "file" / "new", detection, sets()[1], (4, 4), Look())


def test_maps_point_at_the_patch() -> None:
    detection = detect(predicts_grey(), *sets())
    assert detection.anomalous.tolist() == [False] * 20 + [True] * 10
    for name in ("reconstruction", "patch_knn"):
        assert detection.maps[name].shape == (30, 16)
        assert detection.maps[name][20:].argmax(1).tolist() == [6] * 10
    torch.testing.assert_close(detection.scores["reconstruction_max"], detection.maps["reconstruction"].amax(1))
    torch.testing.assert_close(detection.scores["reconstruction"], detection.maps["reconstruction"].mean(1))


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
    normal, _ = sets()
    means, tokens = anomaly.normal_features(model(), normal, RUNTIME, 0)
    assert (len(means), len(tokens)) == (40, 50)


def test_the_mlp_model_cannot() -> None:
    with pytest.raises(ConfigError, match="this model has no patches to find anomalies by; use a vit model"):
        detect(presets.build("mlp", in_chans=1, input_size=(8, 8)), *sets())


# Pictures.


def test_maps_are_on_the_scale_of_all_test_images() -> None:
    maps = {"reconstruction": torch.rand(5, 6), "patch_knn": torch.rand(5, 6) + 3}
    detection = anomaly.Detection({}, maps, torch.tensor([True, False, True, False, True]), torch.arange(5))
    shown = anomaly.heat_maps(detection, torch.tensor([4, 0, 1]), (2, 3), (8, 12))
    assert {name: values.shape for name, values in shown.items()} == dict.fromkeys(maps, (3, 8, 12))
    everything = anomaly.heat_maps(detection, torch.arange(5), (2, 3), (2, 3))
    for name, values in everything.items():
        assert (values.min(), values.max()) == (0, 1)
        assert np.array_equal(values.reshape(-1) == 1, maps[name].numpy().reshape(-1) == maps[name].max().item())
