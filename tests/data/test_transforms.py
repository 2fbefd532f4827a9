from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from torchmae.data import transforms
from torchmae.data.transforms import (
    CROP_NUMBERS,
    FULL_SCALE,
    Normalisation,
    crop_boxes,
    eval_box,
    mirror,
    normalise,
    reduction,
    resample,
    resample_long,
    resample_weights,
)
from torchmae.random import Purpose, uniform


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return uniform(seed, 0, np.arange(count), Purpose.CROP, CROP_NUMBERS)


def no_flip(count: int) -> np.ndarray:
    return np.zeros(count, dtype=bool)


@pytest.mark.parametrize("size", [(32, 32), (200, 90), (40, 300)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    scale, ratio, count = (0.2, 1.0), (0.75, 1.3333), 5000
    ours = crop_boxes(numbers(count), size, scale, ratio, (224, 224))
    blank = torch.empty(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)])  # top, left, h, w
    theirs = theirs.reshape(count, 2, 2).transpose(0, 2, 1)
    for axis in range(2):
        for what in range(2):
            a, b = ours[:, axis, what] / size[axis], theirs[:, axis, what] / size[axis]
            assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / count) + 1e-12
            np.testing.assert_allclose(
                np.quantile(a, [0.1, 0.25, 0.5, 0.75, 0.9]), np.quantile(b, [0.1, 0.25, 0.5, 0.75, 0.9]), atol=0.04
            )
    area = (ours[:, :, 1].prod(axis=1) / (size[0] * size[1])).mean()
    assert area == pytest.approx((theirs[:, :, 1].prod(axis=1) / (size[0] * size[1])).mean(), abs=0.015)


@pytest.mark.parametrize("size", [(375, 500), (32, 32), (7, 900), (1, 1)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_one_box_is_as_it_would_be_among_many(size: tuple[int, int], scale: tuple[float, float]) -> None:
    u = numbers(2000)
    many = crop_boxes(u, size, scale, (0.75, 1.3333), (224, 160))
    for row in range(len(u)):
        one = crop_boxes(u[row : row + 1], size, scale, (0.75, 1.3333), (224, 160))
        assert one.dtype == many.dtype
        np.testing.assert_array_equal(one[0], many[row])


lengths = st.integers(1, 40)
sizes = st.one_of(st.tuples(lengths), st.tuples(lengths, lengths), st.tuples(lengths, lengths, lengths))


@given(sizes, st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 1000))
def test_boxes_lie_inside(size: tuple[int, ...], one: float, other: float, seed: int) -> None:
    scale = (min(one, other), max(one, other))
    boxes = crop_boxes(numbers(20, seed), size, scale, (0.5, 2.0), (8,) * len(size))
    assert boxes.shape == (20, len(size), 2)
    assert (boxes[..., 0] >= 0).all()
    assert (boxes[..., 1] >= 1).all()
    assert (boxes.sum(axis=-1) <= size).all()


@pytest.mark.parametrize(("size", "target"), [((32, 32), (8, 8)), ((10, 20), (32, 64)), ((5,), (9,)), ((4, 5, 6),) * 2])
def test_scale_one_takes_the_whole_image(size: tuple[int, ...], target: tuple[int, ...]) -> None:
    boxes = crop_boxes(numbers(200), size, (1.0, 1.0), (0.75, 1.3333), target)
    assert (boxes == [[0, length] for length in size]).all()


def test_aspect_is_relative_to_the_target() -> None:
    boxes = crop_boxes(numbers(4000), (300, 300), (0.1, 0.3), (0.75, 4 / 3), (32, 64))
    aspect = np.log(boxes[:, 1, 1] / boxes[:, 0, 1])
    assert aspect.mean() == pytest.approx(math.log(2), abs=0.02)
    assert aspect.min() > math.log(2 * 0.75) - 0.05
    assert aspect.max() < math.log(2 * 4 / 3) + 0.05


def test_where_no_try_fits_the_box_is_centred() -> None:
    boxes = crop_boxes(numbers(50), (10, 1000), (0.9, 1.0), (0.75, 4 / 3), (8, 8))
    assert (boxes == [[0, 10], [493, 13]]).all()


@pytest.mark.parametrize("size", [(50,), (20, 30, 40)])
def test_volume_shares_the_scale_over_all_axes(size: tuple[int, ...]) -> None:
    boxes = crop_boxes(numbers(2000), size, (0.2, 0.8), (1.0, 1.0), size)
    share = (boxes[..., 1] / size).prod(axis=-1)
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert share.min() > 0.15
    assert share.max() < 0.85
    starts = boxes[..., 0] / np.maximum(1, np.array(size) - boxes[..., 1])
    assert starts.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("size", "target", "box"),
    [
        ((375, 500), (224, 224), [[0, 375], [62, 375]]),
        ((500, 375), (224, 224), [[62, 375], [0, 375]]),
        ((8, 8), (32, 32), [[0, 8], [0, 8]]),
        ((100, 100), (32, 64), [[25, 50], [0, 100]]),
        ((7,), (3,), [[0, 7]]),
        ((4, 8, 16), (2, 2, 2), [[0, 4], [2, 4], [6, 4]]),
    ],
)
def test_eval_box(size: tuple[int, ...], target: tuple[int, ...], box: list[list[int]]) -> None:
    assert eval_box(size, target).tolist() == box


@pytest.mark.parametrize("target", [(32, 48), (17, 9), (64, 90), (40, 50)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_resample_is_torchvisions_resized_crop(target: tuple[int, int], channels: int) -> None:
    images = torch.rand(24, channels, 40, 50)
    boxes = crop_boxes(numbers(24), (40, 50), (0.01, 1.0), (0.5, 2.0), target)
    flip = np.arange(24) % 3 == 0
    ours = resample(images, boxes, target, flip)
    assert ours.shape == (24, channels, *target)
    for i, ((top, height), (left, width)) in enumerate(boxes.tolist()):
        theirs = F.resized_crop(images[i], top, left, height, width, list(target), InterpolationMode.BICUBIC, True)
        torch.testing.assert_close(ours[i], theirs.flip(-1) if flip[i] else theirs, atol=1e-4, rtol=0)


def test_resample_agrees_with_pillow_on_bytes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44), dtype=np.uint8)
    ours = resample(torch.from_numpy(pixels)[None, None], eval_box((30, 44), (15, 22))[None], (15, 22), no_flip(1))
    theirs = np.array(Image.fromarray(pixels).resize((22, 15), Image.Resampling.BICUBIC))
    assert np.abs(ours[0, 0].numpy() - theirs).max() <= 1


def test_only_the_box_contributes() -> None:
    images = torch.full((1, 1, 20, 20), float("inf"))
    images[:, :, 5:15, 3:9] = 2.0
    images = torch.nan_to_num(images, posinf=1e6)
    inside = resample(images, np.array([[[5, 10], [3, 6]]]), (7, 30), no_flip(1))
    torch.testing.assert_close(inside, torch.full((1, 1, 7, 30), 2.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_integers_stay_in_range_and_whole(dtype: torch.dtype) -> None:
    high = int(FULL_SCALE[str(dtype)[6:]])
    images = (torch.rand(8, 2, 16, 16) > 0.5).int().mul(high).to(dtype)  # edges that overshoot
    result = resample(images, crop_boxes(numbers(8), (16, 16), (0.2, 1), (1, 1), (24, 24)), (24, 24), no_flip(8))
    assert result.dtype == torch.float32
    assert result.min() == 0
    assert result.max() == high
    assert (result == result.round()).all()


@pytest.mark.parametrize("size", [(30,), (12, 14), (6, 8, 10)])
def test_identity_flip_and_constant_in_every_dimension(size: tuple[int, ...]) -> None:
    images = torch.rand(4, 2, *size)
    whole = np.array([[[0, length] for length in size]] * 4)
    assert (resample(images, whole, size, no_flip(4)) == images).all()
    flip = np.array([True, False, True, False])
    mirrored = resample(images, whole, size, flip)
    torch.testing.assert_close(mirrored[0], images[0].flip(-1))
    torch.testing.assert_close(mirrored[1], images[1])
    target = tuple(length * 2 - 3 for length in size)
    boxes = crop_boxes(numbers(4), size, (0.3, 1), (1, 1), target)
    ones = resample(torch.ones(4, 2, *size), boxes, target, flip)
    torch.testing.assert_close(ones, torch.ones(4, 2, *target))


def test_axes_are_resampled_one_by_one() -> None:
    volume = torch.rand(1, 1, 6, 8, 10)
    whole = np.array([[[0, 6], [0, 8], [0, 10]]])
    result = resample(volume, whole, (6, 8, 5), no_flip(1))
    rows = resample(volume.reshape(48, 1, 10), np.array([[[0, 10]]] * 48), (5,), no_flip(48))
    torch.testing.assert_close(result, rows.reshape(1, 1, 6, 8, 5))


def test_large_batches_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    images, boxes = torch.rand(10, 1, 16, 16), crop_boxes(numbers(10), (16, 16), (0.2, 1), (1, 1), (8, 8))
    flip = np.arange(10) % 2 == 0
    expected = resample(images, boxes, (8, 8), flip)
    monkeypatch.setattr("torchmae.data.transforms._MAX_WEIGHTS", 3 * 16 * 8)
    torch.testing.assert_close(resample(images, boxes, (8, 8), flip), expected)


def test_an_empty_batch_stays_empty() -> None:
    empty = resample(torch.empty(0, 3, 8, 8), np.empty((0, 2, 2), dtype=np.int64), (4, 4), no_flip(0))
    assert empty.shape == (0, 3, 4, 4)


def test_normalise() -> None:
    images = torch.randint(0, 256, (5, 2, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.25, 0.5]), torch.tensor([0.5, 2.0])
    expected = (images.double() / 255 - mean.view(2, 1, 1)) / std.view(2, 1, 1)
    torch.testing.assert_close(normalise(images, mean, std, 255.0), expected.float(), atol=1e-6, rtol=1e-6)
    plain = Normalisation((0.0,), (1.0,))
    assert [plain.one(dtype) for dtype in (torch.uint8, torch.uint16, torch.float32)] == [255, 65535, 1]
    twelve = Normalisation((0.0,), (1.0,), scale={"uint16": 4095.0})
    assert [twelve.one(dtype) for dtype in (torch.uint8, torch.uint16)] == [255, 4095]


@pytest.mark.parametrize(
    ("lengths", "target", "expected"),
    [([(671, 900)], 224, 1), ([(672, 900)], 224, 2), ([(2688, 2688)], 224, 8), ([(9000, 9000), (700, 9000)], 224, 2)],
)
def test_the_reduction_leaves_half_as_many_pixels_again_as_are_wanted(
    lengths: list[tuple[int, int]], target: int, expected: int
) -> None:
    boxes = np.array([[[5, height], [7, width]] for height, width in lengths])
    assert reduction(boxes, (target, target)) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_mirror_turns_some_images_round(dtype: torch.dtype) -> None:
    images = torch.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2).to(dtype)
    expected = images.clone()
    expected[1] = torch.from_numpy(images[1].numpy()[:, ::-1].copy())
    assert torch.equal(mirror(images, torch.tensor([1])), expected)


@pytest.mark.parametrize("target", [3, 100, 250, 700])
def test_long_axes_are_resampled_as_short_ones(target: int) -> None:
    values = torch.from_numpy(np.random.default_rng(0).random((3, 2, 400), np.float32))
    boxes = np.array([[0, 400], [17, 300], [399, 1]])
    weights = resample_weights(torch.from_numpy(boxes), 400, target)
    expected = torch.bmm(values, weights.transpose(1, 2))
    torch.testing.assert_close(resample_long(values, boxes, target), expected, atol=2e-4, rtol=0)


def test_a_signal_of_a_million_samples_takes_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "resample_weights", lambda *_: pytest.fail("a matrix"))
    signals = torch.linspace(0, 1, 1_000_000).expand(2, 1, -1)
    halves = resample(signals, np.array([[[0, 500_000]], [[500_000, 500_000]]]), (16_000,), np.array([False, True]))
    assert halves.shape == (2, 1, 16_000)
    assert float(halves[0, 0, -1]) == pytest.approx(0.5, abs=1e-4)
    assert [float(halves[1, 0, i]) for i in (0, -1)] == pytest.approx([1, 0.5], abs=1e-4)


def test_volumes_with_one_long_axis() -> None:
    volumes = torch.from_numpy(np.random.default_rng(0).random((2, 2, 4, 3000), np.float32))
    boxes = np.array([[[0, 4], [100, 2000]], [[1, 2], [0, 3000]]])
    found = resample(volumes, boxes, (3, 900), np.array([False, True]))
    for i, flip in enumerate((False, True)):
        rows = torch.bmm(
            volumes[i], resample_weights(torch.tensor(boxes[i, 1:]), 3000, 900).transpose(1, 2).expand(2, -1, -1)
        )
        columns = resample_weights(torch.tensor(boxes[i, :1]), 4, 3).expand(2, -1, -1) @ rows
        torch.testing.assert_close(found[i], columns.flip(-1) if flip else columns, atol=2e-4, rtol=0)
