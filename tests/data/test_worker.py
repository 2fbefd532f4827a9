from __future__ import annotations

import io
import os
import pickle
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from picture_files import encoded, picture
from PIL import Image

from torchmae.data.formats import FORMATS, Format
from torchmae.data.items import ArrayItem, Context
from torchmae.data.layouts import folder_splits
from torchmae.data.loader import (
    Reader,
    Request,
    View,
    _groups,
    _place,
    _Sample,
    boxes_of,
    crop_numbers,
    cut,
    cut_between_pixels,
    draw_flips,
    labels_of,
    of_one_type,
)
from torchmae.data.transforms import eval_box, resample

VIEW = View((8, 8), (0.2, 1.0), (0.75, 1.3333), True)


def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    request = Request(np.array([5, 0, 9, 2]), 3, 1)
    numbers, flips = crop_numbers(request, VIEW), draw_flips(request, VIEW)
    for i, index in enumerate((5, 0, 9, 2)):
        alone = Request(np.array([index]), 3, 1)
        np.testing.assert_array_equal(numbers[i : i + 1], crop_numbers(alone, VIEW))
        assert flips[i] == draw_flips(alone, VIEW)[0]
    for other in (request._replace(seed=4), request._replace(epoch=2)):
        assert (crop_numbers(other, VIEW) != numbers).any()


def test_one_epoch_for_each_image() -> None:
    mixed = Request(np.array([5, 5, 2]), 3, np.array([1, 7, 1]))
    parts = [Request(np.array([index]), 3, epoch) for index, epoch in ((5, 1), (5, 7), (2, 1))]
    np.testing.assert_array_equal(
        crop_numbers(mixed, VIEW), np.concatenate([crop_numbers(part, VIEW) for part in parts])
    )
    np.testing.assert_array_equal(draw_flips(mixed, VIEW), np.concatenate([draw_flips(part, VIEW) for part in parts]))


def test_the_view_of_an_evaluation_is_the_centre() -> None:
    request = Request(np.arange(3), None, 0)
    boxes = boxes_of(crop_numbers(request, VIEW), (30, 40), VIEW)
    assert boxes.shape == (3, 2, 2)
    assert (boxes == eval_box((30, 40), (8, 8))).all()
    assert not draw_flips(request, VIEW).any()


def test_labels_of_nothing_are_unknown() -> None:
    assert labels_of(None, np.arange(3)).tolist() == [-1, -1, -1]
    assert labels_of(np.array([4, 5, 6]), np.array([2, 0])).tolist() == [6, 4]


def test_bytes_beside_sixteen_bits_and_floats() -> None:
    small, large = torch.tensor([0, 128, 255], dtype=torch.uint8), torch.tensor([0, 1, 65535], dtype=torch.uint16)
    both = torch.stack(of_one_type([small, large]))
    assert both.dtype == torch.uint16
    assert both.tolist() == [[0, 128 * 257, 65535], [0, 1, 65535]]
    mixed = torch.stack(of_one_type([small, torch.tensor([0.0, 0.25, 1.0])]))
    torch.testing.assert_close(mixed, torch.tensor([[0, 128 / 255, 1], [0, 0.25, 1]]))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_cutting_one_image_is_resampling_it(dtype: type, channels: int) -> None:
    high = 1 if dtype is np.float32 else np.iinfo(dtype).max
    image = (np.tile(picture(30, 40), 2)[..., :channels] / 255 * high).astype(dtype)
    box, target = np.array([[3, 20], [5, 31]]), (16, 48)
    ours = cut(image, box, target)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    theirs = resample(batch, box[None], target, np.array([False]))[0].permute(1, 2, 0)
    assert ours.dtype == batch.dtype
    assert ours.shape == (*target, channels)
    assert (ours.float() - theirs).abs().max() <= {np.uint8: 2, np.uint16: 1, np.float32: 1e-5}[dtype]


@pytest.mark.parametrize("channels", [1, 3])
def test_cutting_between_pixels_is_cutting_where_the_edges_meet_pixels(channels: int) -> None:
    image = picture(30, 40)[..., :channels].copy()
    box = np.array([[3, 20], [5, 31]])
    exact = cut_between_pixels(image, box.astype(float), (16, 12))
    assert exact.shape == (16, 12, channels)
    assert (exact.float() - cut(image, box, (16, 12)).float()).abs().max() <= 1
    # A ramp of 4 levels a pixel: half a pixel further is 2 levels more.
    ramp = np.broadcast_to(np.arange(0, 160, 4, dtype=np.uint8)[None, :, None], (30, 40, channels)).copy()
    on, between = (cut_between_pixels(ramp, np.array([[3.0, 8.0], [x, 16.0]]), (4, 8)).float() for x in (5.0, 5.5))
    assert (between - on)[:, 1:-1].mean() == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_cut_as_if_it_were_decoded_whole(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = picture(640, 480)
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(pixels), "JPEG", quality=95, exif=exif))
    (tmp_path / "b.png").write_bytes(encoded(Image.open(io.BytesIO((tmp_path / "a.jpg").read_bytes())), exif=exif))
    reader = Reader(folder_splits(tmp_path)["train"], 3, View((32, 24), (0.2, 1.0), (0.75, 1.3333), True))
    for request in (Request(np.array([0]), 0, 0), Request(np.array([0]), None, 0)):
        jpeg = reader[request].images
        sample = _Sample(reader.source, request, crop_numbers(request, reader.view), 1)
        _place([sample], reader.view)
        sample.read(reader.view)
        png = cut(sample.image, sample.boxes[0], (32, 24))  # the same crop of a file that is never reduced
        assert jpeg.shape == (1, 32, 24, 3)
        difference = (jpeg[0].float() - png.float()).abs()
        assert 0 < difference.mean() < 0.01 * 255


def test_an_image_that_follows_itself_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        Image.fromarray(picture(seed=i)).save(tmp_path / f"{i}.png")
    source = folder_splits(tmp_path)["train"]
    reads: list[int] = []
    original = type(source).content
    monkeypatch.setattr(type(source), "content", lambda self, i: reads.append(i) or original(self, i))
    request = Request(np.array([2, 2, 2, 0, 1, 1]), 0, np.array([4, 5, 6, 4, 4, 5]))
    views = Reader(source, 3, VIEW)[request].images
    assert reads == [2, 0, 1]
    for i in range(6):
        alone = Request(request.indices[i : i + 1], 0, int(request.epoch[i]))
        assert torch.equal(Reader(source, 3, VIEW)[alone].images[0], views[i])


def test_a_batch_is_its_images_one_by_one_whatever_is_broken_where(tmp_path: Path) -> None:
    for i in range(24):
        raw = encoded(Image.fromarray(np.tile(picture(40 + i, 50), (2, 2, 1))), "JPEG", quality=90)
        if i in (3, 17, 18):
            raw = raw[: len(raw) // 2]  # a header, and not all of the pixels
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"" if i in (4, 9) else raw)
    reader = Reader(folder_splits(tmp_path)["train"], 3, View((16, 16), (0.2, 1.0), (0.75, 1.3333), True))
    together = reader[Request(np.arange(24), 0, 0)]
    for i in range(24):
        alone = reader[Request(np.array([i]), 0, 0)]
        assert torch.equal(alone.images[0], together.images[i])
    assert {Path(name).name for name, _ in together.bad} == {f"{i:02d}.jpg" for i in (3, 4, 9, 17, 18)}


def open_blank(data: bytes, context: Context) -> ArrayItem:
    return ArrayItem(np.zeros((8, 8, 3), np.uint8))


def test_a_reader_goes_by_pickle_with_the_formats_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    source = folder_splits(tmp_path)["train"]
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "png", Format((".png",), rb"\x89PNG", open_blank))
        sent = pickle.dumps(Reader(source, 3, VIEW))  # as the start methods spawn and forkserver do
    patched = dict(FORMATS)
    assert pickle.loads(sent)[Request(np.array([0]), 0, 0)].images.max() == 0
    FORMATS.update(patched)
    assert Reader(source, 3, VIEW)[Request(np.array([0]), 0, 0)].images.max() > 0


def test_groups_are_small_enough_to_hold() -> None:
    def sample(pixels: int) -> SimpleNamespace:
        return SimpleNamespace(pixels=pixels)

    def lengths(samples: list[SimpleNamespace]) -> list[int]:
        return [len(group) for group in _groups(samples)]  # type: ignore[arg-type]

    assert lengths([sample(500 * 375)] * 40) == [16, 16, 8]
    assert lengths([sample(24_000_000)] * 3) == [1, 1, 1]
    assert lengths([sample(10), sample(5_000_000), sample(10)]) == [2, 1]
    assert lengths([]) == []


MAIN = """
import sys
from torch.utils.data import DataLoader
from torchmae.data.loader import start_worker

if __name__ == "__main__":
    loader = DataLoader(
        range(10**9), num_workers=1, worker_init_fn=start_worker, multiprocessing_context="forkserver"
    )
    batches = iter(loader)
    next(batches)
    print(batches._workers[0].pid, flush=True)
    next(iter(sys.stdin))
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_worker_ends_with_a_main_process_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    main = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with main:
        worker = os.pidfd_open(int(main.stdout.readline()))
        main.send_signal(signal.SIGKILL)
        ended, _, _ = select.select([worker], [], [], 60)
        os.close(worker)
    assert ended
