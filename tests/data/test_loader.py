from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from torchmae.config import DataConfig
from torchmae.data import opening
from torchmae.data.arrays import ArraySource, hold
from torchmae.data.loader import Batch, Plan
from torchmae.data.opening import Data, _on_device, open_data
from torchmae.data.reading import BadFiles
from torchmae.data.sources import FileSource, Subset
from torchmae.data.transforms import normalise
from torchmae.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # Python 3.12 and 3.13
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a single core
]

CPU = torch.device("cpu")


def opened(
    source: object = "digits", input_size: tuple[int, ...] = (8, 8), channels: int | None = None, **rest
) -> Data:
    return open_data(DataConfig(source=str(source), **rest), input_size=input_size, channels=channels, device=CPU)


def steps(data: Data, start: int = 0, stop: int = 6, batch_size: int = 8, **rank: int) -> list[Batch]:
    return list(data.train.train_batches(Plan(len(data.train), batch_size, 7), start, stop, **rank))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.epoch, b.epoch)


@pytest.fixture
def mixed(write_pictures, tmp_path: Path) -> Path:
    """Two classes of ten pictures in three sizes."""
    write_pictures(*(f"a/{i}.png" for i in range(8)), size=(20, 30))
    write_pictures(*(f"b/{i}.jpg" for i in range(8)), size=(40, 30))
    write_pictures(*(f"b/{i}.png" for i in range(4)), size=(15, 15))
    return tmp_path


@pytest.fixture
def uniform_size(write_pictures, tmp_path: Path) -> Path:
    """Two classes of ten pictures of one size."""
    write_pictures(*(f"a/{i}.png" for i in range(10)), *(f"b/{i}.png" for i in range(10)), size=(24, 32))
    return tmp_path


def test_digits_by_default() -> None:
    data = opened()
    assert (len(data.train), len(data.val), data.channels) == (1437, 360, 1)
    assert data.train.held is not None
    assert data.classes == tuple("0123456789")
    assert data.bad.items == []
    batches = steps(data, 0, 12, 256)
    assert [len(batch.indices) for batch in batches[:6]] == [256] * 5 + [1437 - 5 * 256]
    assert [batch.epoch for batch in batches] == [0] * 6 + [1] * 6
    images = torch.cat([batch.images for batch in batches])
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)
    assert images.std() == pytest.approx(1, abs=0.1)
    for batch in batches:
        np.testing.assert_array_equal(batch.labels.numpy(), data.train.labels[batch.indices])


def test_evaluation_is_in_order_and_whole() -> None:
    data = opened()
    batches = list(data.val.eval_batches(np.arange(360)[::-1].copy(), 100))
    assert [len(batch.labels) for batch in batches] == [100, 100, 100, 60]
    images = torch.cat([batch.images for batch in batches])
    source = data.val.source
    stored = torch.stack([torch.from_numpy(source.read(i)) for i in reversed(range(360))]).permute(0, 3, 1, 2)
    expected = normalise(stored, torch.tensor(data.normalisation.mean), torch.tensor(data.normalisation.std), 255.0)
    torch.testing.assert_close(images, expected)
    assert torch.cat([batch.labels for batch in batches]).tolist() == source.labels[::-1].tolist()
    assert list(data.val.eval_batches(np.arange(0), 5)) == []


@pytest.mark.parametrize("input_size", [(16, 16), (24, 32), (40, 24)])
def test_memory_and_workers_give_the_same_batches(uniform_size: Path, input_size: tuple[int, int]) -> None:
    from_memory = opened(uniform_size, input_size, cache="memory", val="none")
    from_files = opened(uniform_size, input_size, cache="none", val="none", num_workers=0)
    assert (from_memory.train.held is not None, from_files.train.held) == (True, None)
    assert from_memory.fingerprint == from_files.fingerprint
    assert from_memory.normalisation.mean == pytest.approx(from_files.normalisation.mean)
    indices = np.arange(20)
    pairs = [
        *zip(steps(from_memory), steps(from_files), strict=True),
        *zip(from_memory.train.eval_batches(indices, 6), from_files.train.eval_batches(indices, 6), strict=True),
    ]
    for a, b in pairs:
        np.testing.assert_array_equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        levels = (a.images - b.images).abs() * torch.tensor(from_memory.normalisation.std).view(-1, 1, 1) * 255
        assert levels.mean() < 0.5
        assert levels.max() < 3


def test_worker_count_changes_nothing(mixed: Path) -> None:
    batches = {
        workers: steps(opened(mixed, (16, 16), val="none", num_workers=workers), batch_size=6) for workers in (0, 1, 2)
    }
    assert batches[0][0].images.shape == (6, 3, 16, 16)
    assert_same(batches[1], batches[0])
    assert_same(batches[2], batches[0])
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_starting_later_changes_nothing(uniform_size: Path, cache: str) -> None:
    data = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=0)
    assert_same(steps(data, 4, 6), steps(data, 0, 6)[4:])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_ranks_share_out_the_batch(uniform_size: Path, cache: str) -> None:
    data = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=0)
    whole = steps(data, batch_size=9)  # 9, 9, 2: three ranks, one of which has none of the last
    ranks = [steps(data, batch_size=9, rank=rank, world_size=3) for rank in range(3)]
    joined = [
        Batch(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
            np.concatenate([part.indices for part in parts]),
            parts[0].epoch,
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert [len(part.indices) for part in ranks[0]] == [3, 3, 0, 3, 3, 0]
    for ours, theirs in zip(joined, whole, strict=True):
        torch.testing.assert_close(ours.images, theirs.images, atol=0.02, rtol=0)  # a level, where rounding tips
        assert (ours.images != theirs.images).float().mean() < 0.001
        assert torch.equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.indices, theirs.indices)


def test_epochs_and_seeds_see_other_crops_and_half_the_flips() -> None:
    data = opened(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    plan = Plan(len(data.train), 1437, 0)
    (first, second) = data.train.train_batches(plan, 0, 2)
    (plain,) = data.train.eval_batches(np.arange(1437), 1437)
    flipped = []
    for batch in (first, second):
        original = plain.images[torch.from_numpy(batch.indices)]
        is_same = torch.isclose(batch.images, original, atol=1e-4).flatten(1).all(1)
        is_mirrored = torch.isclose(batch.images, original.flip(-1), atol=1e-4).flatten(1).all(1)
        assert (is_same | is_mirrored).all()
        assert 0.45 < is_mirrored.float().mean() < 0.55
        flipped.append(is_mirrored[torch.from_numpy(np.argsort(batch.indices))])
    assert 0.4 < (flipped[0] != flipped[1]).float().mean() < 0.6
    never = opened(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
    (batch,) = never.train.train_batches(plan, 0, 1)
    assert torch.equal(batch.images, plain.images[torch.from_numpy(batch.indices)])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_torchs_own_random_numbers_are_not_touched(uniform_size: Path, cache: str) -> None:
    before = torch.get_rng_state()
    steps(opened(uniform_size, (16, 16), cache=cache, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_evaluating_while_training(uniform_size: Path, cache: str) -> None:
    data = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=1)
    seen = []
    for batch in data.train.train_batches(Plan(20, 8, 7), 0, 6):
        seen.append(batch)
        assert sum(len(part.labels) for part in data.train.eval_batches(np.arange(5), 2)) == 5
    assert_same(seen, steps(data))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_kept_batches_are_the_same_in_the_type_they_are_stored_in(uniform_size: Path, cache: str) -> None:
    data = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=1)
    indices = np.arange(5)
    again = data.train.kept_batches(indices, 2)
    for _ in range(2):
        assert_same(list(again()), list(data.train.eval_batches(indices, 2)))
    kept = inspect.getclosurevars(again).nonlocals["kept"]
    assert {(images.dtype, images.device.type) for images, *_ in kept} == {(torch.uint8, "cpu")}


def test_closing_ends_the_workers(mixed: Path) -> None:
    data = opened(mixed, (16, 16), val="none", num_workers=2)
    batches = data.train.train_batches(Plan(20, 2, 0), 0, 1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    data.train.close()
    assert multiprocessing.active_children() == []
    assert next(batches, None) is None


def test_a_signal_to_all_processes_leaves_the_workers_alone(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, encoded = os.getpid(), FileSource.content

    def interrupted(self: FileSource, index: int) -> Path:
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return encoded(self, index)

    data = opened(mixed, (16, 16), val="none", num_workers=1)
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the changed class does not reach the workers")
    monkeypatch.setattr(FileSource, "content", interrupted)
    assert len(steps(data)) == 6


def test_a_worker_that_dies_is_said_so(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(mixed, (16, 16), val="none", num_workers=1)
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the changed class does not reach the workers")
    monkeypatch.setattr(FileSource, "content", lambda self, index: os._exit(1))
    with pytest.raises(DataError, match=r"ended unexpectedly .*lower data.num_workers"):
        steps(data)


def test_a_worker_that_hangs_does_not_hold_up_the_end(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file server that has gone."""
    main, encoded = os.getpid(), FileSource.content

    def hanging(self: FileSource, index: int) -> Path:
        if os.getpid() != main:
            time.sleep(1000)
        return encoded(self, index)

    data = opened(mixed, (16, 16), val="none", num_workers=1)
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the changed class does not reach the workers")
    monkeypatch.setattr(FileSource, "content", hanging)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # how long PyTorch waits

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            steps(data)
    finally:
        signal.signal(signal.SIGALRM, before)
    data.train.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_counted_and_named(mixed: Path, workers: int) -> None:
    (mixed / "a" / "3.png").write_bytes(b"")
    (mixed / "b" / "0.png").write_bytes(b"rubbish")
    data = opened(mixed, (16, 16), val="none", num_workers=workers, max_bad=0.1)
    batches = steps(data, 0, 10, 4)  # two epochs
    assert sum(len(batch.images) for batch in batches) == 40
    assert sorted(data.bad.items) == [
        (str(mixed / "a" / "3.png"), "the file is empty"),
        (str(mixed / "b" / "0.png"), "not an image, or cut short before its first pixel"),
    ]
    strict = opened(mixed, (16, 16), val="none", num_workers=workers, max_bad=0.05)
    with pytest.raises(
        DataError, match=r"^2 of 20 images cannot be read, more than data.max_bad 0.05 allows; "
    ) as caught:
        steps(strict, 0, 5, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_all_went_away(write_pictures, tmp_path: Path, workers: int) -> None:
    paths = write_pictures(*(f"{i}.png" for i in range(6)))
    data = opened(tmp_path, (16, 16), cache="none", val="none", num_workers=workers, max_bad=1.0)
    for path in paths:
        path.unlink()
    with pytest.raises(DataError, match="6 images in a row cannot be read") as caught:
        steps(data, 0, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize(
    ("shape", "dtype", "input_size"),
    [
        ((12, 40, 2), "float32", (32,)),
        ((12, 40), "uint16", (64,)),
        ((12, 9, 12), "float64", (6, 8)),
        ((12, 20, 16, 5), "uint8", (8, 8)),
        ((12, 6, 8, 10, 2), "uint8", (4, 4, 5)),
    ],
)
def test_arrays_of_any_dimension(
    tmp_path: Path, cache: str, shape: tuple[int, ...], dtype: str, input_size: tuple[int, ...]
) -> None:
    high = 1 if dtype.startswith("float") else np.iinfo(dtype).max
    np.save(tmp_path / "x.npy", (np.random.default_rng(0).random(shape) * high).astype(dtype))
    data = opened(tmp_path / "x.npy", input_size, cache=cache, num_workers=1, window="none")
    assert (len(data.train), len(data.val)) == (10, 2)
    assert data.channels == (shape[-1] if len(shape) == len(input_size) + 2 else 1)
    assert data.normalisation.mean == pytest.approx((0.5,) * data.channels, abs=0.1)
    images = torch.cat([batch.images for batch in steps(data)])
    assert images.shape[1:] == (data.channels, *input_size)
    assert images.mean() == pytest.approx(0, abs=0.3)
    other_cache = "memory" if cache == "none" else "none"
    other = opened(tmp_path / "x.npy", input_size, cache=other_cache, num_workers=0, window="none")
    # Noise is where bytes differ most: the integer kernel clamps between its two passes, as Pillow does.
    difference = (images - torch.cat([batch.images for batch in steps(other)])).abs()
    assert difference.mean() < (0.01 if dtype == "uint8" else 1e-4)


def test_a_folder_of_mixed_precision(tmp_path: Path) -> None:
    Image.fromarray(np.full((10, 10), 255, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((10, 10), 65535, np.uint16)).save(tmp_path / "b.png")
    data = opened(tmp_path, (8, 8), val="none", num_workers=0, mean=(0.0,), std=(1.0,))
    assert data.train.held is None
    (batch,) = data.train.eval_batches(np.arange(2), 2)
    torch.testing.assert_close(batch.images, torch.ones(2, 1, 8, 8))


def test_cache_settings(mixed: Path, tmp_path: Path) -> None:
    assert opened(mixed, (16, 16), num_workers=0).train.held is None
    with pytest.raises(ConfigError, match=r"data.cache is 'memory', but the images differ: .*; set data.cache to auto"):
        opened(mixed, (16, 16), cache="memory")
    assert opened(memory_limit=1e-6, num_workers=0).train.held is None
    assert opened(memory_limit=1e-6, cache="memory").train.held is not None


def test_the_memory_limit_is_for_training_and_validation_together() -> None:
    size = 1437 * 64 / 2**30
    data = opened(memory_limit=size * 1.01, num_workers=0)
    assert data.train.held is not None
    assert data.val.held is None


def test_parts_of_one_array_count_once(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    source = ArraySource(array)
    splits = {"train": Subset(source, np.arange(80)), "val": Subset(source, np.arange(80, 100))}
    with mock.patch.object(opening, "open_splits", return_value=splits):
        data = opened(memory_limit=array.nbytes * 1.01 / 2**30)
    assert data.val is not None
    assert data.train.held.images.data_ptr() == data.val.held.images.data_ptr() == array.ctypes.data


def test_val_auto_holds_out_where_there_is_no_val(uniform_size: Path) -> None:
    data = opened(uniform_size, (16, 16), val_size=3)
    names = [loader.source.name(i) for loader in (data.train, data.val) for i in range(len(loader))]
    assert (len(data.train), len(data.val)) == (17, 3)
    assert len(set(names)) == 20
    assert data.fingerprint != opened(uniform_size, (16, 16), val_size=2).fingerprint


def test_val_never_takes_the_test_split_by_itself(write_pictures, tmp_path: Path) -> None:
    write_pictures(*(f"train/{i}.png" for i in range(10)), "test/1.png", "test/2.png")
    assert len(opened(tmp_path, (16, 16)).val) == 2
    assert "train" in opened(tmp_path, (16, 16)).val.source.name(0)
    test = opened(tmp_path, (16, 16), val="test")
    assert (len(test.train), len(test.val)) == (10, 2)
    assert opened(tmp_path, (16, 16), val="none").val is None


def test_too_few_images_to_hold_any_out(write_pictures, tmp_path: Path) -> None:
    write_pictures("1.png", "2.png", "3.png")
    assert opened(tmp_path, (16, 16)).val is None


def test_val_from_another_path_goes_by_class_names(write_pictures, tmp_path: Path) -> None:
    write_pictures("one/ape/1.png", "one/cat/1.png", "one/dog/1.png", "two/cat/1.png", "two/eel/1.png")
    data = opened(tmp_path / "one", (16, 16), val=str(tmp_path / "two"))
    assert data.val.labels.tolist() == [1, -1]


def test_val_that_does_not_exist(uniform_size: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.val 'tset' cannot be used: .*; choose from val, held-out, or a path"):
        opened(val="tset")
    with pytest.raises(ConfigError, match=r"data.val is 'train'"):
        opened(val="train")


def test_channels_come_from_the_data_unless_given(write_pictures, tmp_path: Path) -> None:
    write_pictures(*(f"{i}.png" for i in range(5)))
    assert opened(tmp_path, (16, 16)).channels == 3
    grey = opened(tmp_path, (16, 16), channels=1)
    assert (grey.channels, len(grey.normalisation.mean)) == (1, 1)
    assert steps(grey, 0, 1)[0].images.shape[1] == 1
    with pytest.raises(ConfigError, match=r"digits has 1 channels and the model takes 3; set model.in_chans to 1"):
        opened(channels=3)


def test_dimensions_have_to_agree(uniform_size: Path) -> None:
    with pytest.raises(ConfigError, match=r"a/1.png has 2 dimensions and model.input_size has 1 numbers; give"):
        opened(uniform_size, (64,))
    with pytest.raises(ConfigError, match="digits/0 has 2 dimensions"):
        opened(input_size=(8, 8, 8))


def test_given_mean_and_deviation() -> None:
    data = opened(mean=(0.5,), std=(0.25,))
    assert (data.normalisation.mean, data.normalisation.std) == ((0.5,), (0.25,))
    (batch,) = data.train.eval_batches(np.arange(2), 2)
    stored = torch.from_numpy(data.train.source.read(1)[..., 0]) / 255
    torch.testing.assert_close(batch.images[1, 0], (stored - 0.5) / 0.25)
    with pytest.raises(ConfigError, match=r"data.mean has 3 numbers and the images 1 channels; give 1, or leave"):
        opened(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))


def test_small_images_are_enlarged(write_pictures, tmp_path: Path) -> None:
    write_pictures("a.png", size=(4, 5))
    data = opened(tmp_path, (32, 48))
    assert steps(data, 0, 1, 256)[0].images.shape == (1, 3, 32, 48)


def test_no_image_is_changed_by_training() -> None:
    data = opened()
    before = [data.train.source.read(i) for i in range(20)]
    steps(data)
    assert isinstance(data.train.source, ArraySource)
    for i, image in enumerate(before):
        np.testing.assert_array_equal(data.train.source.read(i), image)


def test_the_shared_photographs(shared_data: Path) -> None:
    data = opened(shared_data / "photos", (64, 96), num_workers=2, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (len(data.train), len(data.val), data.channels) == (240, 60, 3)
    assert data.train.held is None
    batches = steps(data, 0, 3, 16)
    assert all(batch.images.shape == (16, 3, 64, 96) for batch in batches)
    assert torch.isfinite(batches[0].images).all()
    assert data.bad.items == []


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_repeats_draw_what_the_epochs_would_have(uniform_size: Path, cache: str) -> None:
    plain = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=0)
    repeats = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=0, repeats=3)

    def views(data: Data) -> dict[tuple[int, int], torch.Tensor]:
        batches = steps(data, 0, 18, 8)  # six epochs of 20: batches of 8, 8, 4
        assert [len(batch.images) for batch in batches] == [8, 8, 4] * 6
        return {
            (epoch, index): image
            for batch in batches
            for epoch, index, image in zip(
                np.broadcast_to(batch.epoch, batch.indices.shape).tolist(),
                batch.indices.tolist(),
                batch.images,
                strict=True,
            )
        }

    expected, ours = views(plain), views(repeats)
    assert len(ours) == 6 * 20
    assert ours.keys() == expected.keys()
    for key, image in ours.items():
        torch.testing.assert_close(image, expected[key], atol=0.02, rtol=0)  # a level, where rounding tips
    first = steps(repeats, 0, 1, 8)[0]
    assert first.epoch.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert first.indices[:3].tolist() == [first.indices[0]] * 3


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_repeats_start_later_and_go_over_ranks(uniform_size: Path, cache: str) -> None:
    data = opened(uniform_size, (16, 16), cache=cache, val="none", num_workers=0, repeats=3)
    whole = steps(data, 0, 9)
    assert_same(steps(data, 5, 9), whole[5:])
    parts = [steps(data, 0, 9, rank=rank, world_size=2) for rank in range(2)]
    for batch, one, other in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([one.indices, other.indices]), batch.indices)
        np.testing.assert_array_equal(np.concatenate([one.epoch, other.epoch]), batch.epoch)


def test_images_move_to_the_device_where_asked() -> None:
    held = hold(opened().train.source, float("inf"), BadFiles(1437, 0))
    meta = torch.device("meta")
    moved = _on_device([held, held], DataConfig(cache="device"), meta)
    assert moved[0] is not None
    assert moved[1] is not None
    assert moved[0].images.device == meta
    assert moved[0].images is moved[1].images  # parts of one array are moved once
    for cache in ("memory", "auto"):
        assert _on_device([held, None], DataConfig(cache=cache), meta) == [held, None]
    assert_same(steps(opened(cache="device")), steps(opened(cache="memory")))
