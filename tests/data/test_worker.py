from __future__ import annotations

import numpy as np
import pytest
import torch
from picture_files import picture

from torchmae.data.transforms import eval_box, resample
from torchmae.data.worker import Request, View, cut, draw_views, labels_of, stack

VIEW = View((8, 8), (0.2, 1.0), (0.75, 1.3333), True)


def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    sizes = [(30, 40), (20, 20), (30, 40), (64, 32)]
    boxes, flips = draw_views(Request(np.array([5, 0, 9, 2]), 3, 1), sizes, VIEW)
    for i, index in enumerate((5, 0, 9, 2)):
        alone = draw_views(Request(np.array([index]), 3, 1), sizes[i : i + 1], VIEW)
        np.testing.assert_array_equal(boxes[i], alone[0][0])
        assert flips[i] == alone[1][0]
    same_size = Request(np.arange(50), 3, 1)
    np.testing.assert_array_equal(
        draw_views(same_size, [(30, 40)], VIEW)[0], draw_views(same_size, [(30, 40)] * 50, VIEW)[0]
    )
    for other in (Request(np.arange(50), 4, 1), Request(np.arange(50), 3, 2)):
        assert (draw_views(other, [(30, 40)], VIEW)[0] != draw_views(same_size, [(30, 40)], VIEW)[0]).any()


def test_the_view_of_an_evaluation_is_the_centre() -> None:
    boxes, flips = draw_views(Request(np.arange(3), None, 0), [(30, 40)], VIEW)
    assert (boxes == eval_box((30, 40), (8, 8))).all()
    assert not flips.any()


def test_labels_of_nothing_are_unknown() -> None:
    assert labels_of(None, np.arange(3)).tolist() == [-1, -1, -1]
    assert labels_of(np.array([4, 5, 6]), np.array([2, 0])).tolist() == [6, 4]


def test_bytes_beside_sixteen_bits_and_floats() -> None:
    small, large = torch.tensor([0, 128, 255], dtype=torch.uint8), torch.tensor([0, 1, 65535], dtype=torch.uint16)
    both = stack([small, large])
    assert both.dtype == torch.uint16
    assert both.tolist() == [[0, 128 * 257, 65535], [0, 1, 65535]]
    mixed = stack([small, torch.tensor([0.0, 0.25, 1.0])])
    torch.testing.assert_close(mixed, torch.tensor([[0, 128 / 255, 1], [0, 0.25, 1]]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_cutting_one_image_is_resampling_it(dtype: type) -> None:
    high = 1 if dtype is np.float32 else np.iinfo(dtype).max
    image = (picture(30, 40) / 255 * high).astype(dtype)
    box, target = np.array([[3, 20], [5, 31]]), (16, 48)
    ours = cut(image, box, True, target)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    theirs = resample(batch, box[None], target, np.array([True]))[0]
    assert ours.dtype == batch.dtype
    assert (ours.float() - theirs).abs().max() <= {np.uint8: 2, np.uint16: 1, np.float32: 1e-5}[dtype]
