from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, picture
from PIL import Image

from torchmae.data.arrays import ArraySource, FileArray, map_array
from torchmae.data.items import Context
from torchmae.data.sources import FileSource, Subset, evenly_spaced
from torchmae.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("shape", "spatial_dims", "image"),
    [
        ((5, 7), None, (7, 1)),
        ((5, 7, 9), None, (7, 9, 1)),
        ((5, 7, 9, 2), None, (7, 9, 2)),
        ((5, 7, 8, 9, 2), None, (7, 8, 9, 2)),
        ((5, 9, 7), 1, (9, 7)),
        ((5, 7, 8, 9), 3, (7, 8, 9, 1)),
        ((5, 8, 8, 64), 2, (8, 8, 64)),
        ((5, 32, 64, 64), 2, (64, 64, 32)),
        ((5, 2, 64, 64, 64), None, (64, 64, 64, 2)),
        ((5, 64, 64, 64), None, (64, 64, 64, 1)),
    ],
)
def test_axes_of_an_array(shape: tuple[int, ...], spatial_dims: int | None, image: tuple[int, ...]) -> None:
    source = ArraySource(np.zeros(shape, np.uint8), context=Context(spatial_dims=spatial_dims))
    assert len(source) == 5
    assert source.read(4).shape == image


@pytest.mark.parametrize(
    ("shape", "spatial_dims", "axes"),
    [
        ((5, 3, 32, 32), None, "CHW"),
        ((5, 16, 17, 17), None, "ZYX"),
        ((5, 64, 64, 200), None, "HWC"),
        ((5, 8, 8, 8), None, "HWC"),
        ((5, 128, 500), None, "CL"),
        ((5, 256, 3), None, "LC"),
        ((5, 128, 500), 1, "CL"),
        ((5, 64, 64), 1, "LC"),
        ((5, 20, 20, 20, 20), None, "CZYX"),
    ],
)
def test_shapes_with_several_readings_are_refused_until_one_is_chosen(
    shape: tuple[int, ...], spatial_dims: int | None, axes: str
) -> None:
    images = np.zeros(shape, np.uint8)
    with pytest.raises(DataError, match="--data.axes"):
        ArraySource(images, context=Context(spatial_dims=spatial_dims))
    source = ArraySource(images, context=Context(spatial_dims=spatial_dims, axes=axes))
    lengths = dict(zip(axes, shape[1:], strict=True))
    channels = lengths.pop("C", 1)
    assert source.read(0).shape == (*lengths.values(), channels)
    assert (source.open(0).size, source.open(0).channels) == (tuple(lengths.values()), channels)


def test_a_guess_about_axes_is_said_and_choices_are_not() -> None:
    assert ArraySource(np.zeros((5, 9, 9, 6), np.uint8)).remarks == ("9 x 9 x 6 read as HWC (pictures, channels last)",)
    assert ArraySource(np.zeros((5, 9, 9), np.uint8)).remarks == ("9 x 9 read as HW (pictures, one channel)",)
    assert ArraySource(np.zeros((5, 9, 9, 3), np.uint8)).remarks == ()
    assert ArraySource(np.zeros((5, 99), np.uint8)).remarks == ()
    assert ArraySource(np.zeros((5, 9, 9, 6), np.uint8), context=Context(axes="HWC")).remarks == ()


def test_parts_of_a_sample_with_channels_first() -> None:
    images = np.random.default_rng(0).random((3, 2, 50), np.float32)
    item = ArraySource(images, context=Context(axes="CL")).open(1)
    np.testing.assert_array_equal(item.read(((10, 20),)), images[1, :, 10:30].T)


def test_arrays_that_are_no_images() -> None:
    with pytest.raises(DataError, match=r"x.npy has shape \(5,\); it should be \(samples, \*size\)"):
        ArraySource(np.zeros(5, np.uint8), title="x.npy")
    with pytest.raises(DataError, match="has shape"):
        ArraySource(np.zeros((0, 8, 8), np.uint8))
    with pytest.raises(DataError, match="holds complex128; save integers or floats"):
        ArraySource(np.zeros((2, 8, 8), np.complex128))
    with pytest.raises(ConfigError, match=r"samples of shape 7 and model.input_size has 2 numbers"):
        ArraySource(np.zeros((5, 7), np.uint8), context=Context(spatial_dims=2))


@pytest.mark.parametrize(
    ("dtype", "read"),
    [
        ("bool", "uint8"),
        ("uint8", "uint8"),
        ("uint16", "uint16"),
        ("int16", "float32"),
        ("float16", "float32"),
        ("float64", "float32"),
    ],
)
def test_types_that_are_read(dtype: str, read: str) -> None:
    images = np.eye(4, dtype=dtype)[None]
    image = ArraySource(images).read(0)
    assert image.dtype == read
    assert image[1, 1, 0] == (255 if dtype == "bool" else 1)
    image[:] = 7
    assert images.max() == 1  # a copy


def test_labels_that_are_none_of_classes_are_left_out_and_said() -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    assert ArraySource(images, np.array([[1], [2], [-1]], np.int8)).labels.tolist() == [1, 2, -1]
    source = ArraySource(images, ["b", "a", ""])
    assert (source.labels.tolist(), source.classes) == ([1, 0, -1], ("a", "b"))
    for labels in ([1, 2], [0.5, 1.0, 2.0], np.full((3, 14), 7, np.uint8)):
        source = ArraySource(images, labels, classes=["x"])
        assert (source.labels, source.classes) == (None, None)
        assert "not used" in source.remarks[-1]


def test_array_channels_are_what_they_are() -> None:
    source = ArraySource(np.zeros((3, 4, 4, 2), np.uint8), title="x.npy")
    assert source.with_channels(2) is source
    with pytest.raises(ConfigError, match=r"x.npy has 2 channels and the model takes 3; set model.in_chans to 2"):
        source.with_channels(3)


def test_fingerprints_tell_changed_arrays() -> None:
    images = np.arange(200 * 16, dtype=np.uint16).reshape(200, 4, 4)
    changed = images.copy()
    changed[-1] += 1
    prints = [
        ArraySource(item).fingerprint() for item in (images, changed, images[:-1], images.astype(np.float32), images)
    ]
    assert len(set(prints)) == 4
    assert prints[0] == prints[4]
    assert len(prints[0]) == 32


def test_mapped_arrays_are_mapped_again_in_another_process(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 40, 40), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    source = ArraySource(FileArray(tmp_path / "x.npy"))
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    np.testing.assert_array_equal(pickle.loads(sent).read(33), images[33][..., None])


def test_writing_to_a_mapped_array_leaves_the_file_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.uint8))
    map_array(tmp_path / "x.npy")[:] = 1
    assert map_array(tmp_path / "x.npy").max() == 0


def test_arrays_that_cannot_be_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects, such as samples of unequal length; save each sample"):
        map_array(tmp_path / "objects.npy")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(DataError, match=r"cannot read .*cut.npy"):
        map_array(tmp_path / "cut.npy")


@pytest.mark.parametrize(("old", "new"), [(b"False", b"1/0  "), (b"(2, 4", b"(-2,4")])
def test_damaged_headers(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 4, 4), np.uint8))
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(
        DataError, match=r"cannot read .*x.npy: (its header is damaged|negative dimensions.*); save one numeric array"
    ):
        map_array(path)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    source = FileSource(tmp_path, ["pipe.png", "folder.png", "gone.png", "nul\0l.png"])
    for index, reason in enumerate(["no regular file", "Is a directory", "No such file or directory", "null byte"]):
        with pytest.raises(DataError, match=reason):
            source.read(index)


def test_files_are_read_with_fixed_channels(write_pictures, tmp_path: Path) -> None:
    write_pictures("a.png", "b/c.png")
    Image.fromarray(picture()).convert("L").save(tmp_path / "grey.png")
    source = FileSource(tmp_path, ["a.png", "b/c.png", "grey.png"])
    assert [source.read(i).shape[-1] for i in range(3)] == [3, 3, 1]
    assert [source.with_channels(3).read(i).shape[-1] for i in range(3)] == [3, 3, 3]
    assert [source.with_channels(1).read(i).shape[-1] for i in range(3)] == [1, 1, 1]
    assert source.name(1) == str(tmp_path / "b" / "c.png")
    with pytest.raises(DataError, match="has 3 channels where 4 are wanted"):
        source.with_channels(4).read(0)


def test_fingerprint_of_files_tells_names_and_sizes(write_pictures, tmp_path: Path) -> None:
    paths = write_pictures("a.png", "b.png")
    names = ["a.png", "b.png"]
    first = FileSource(tmp_path, names).fingerprint()
    assert FileSource(tmp_path, names, [0, 1]).fingerprint() == first
    assert FileSource(tmp_path, names[:1]).fingerprint() != first
    paths[0].write_bytes(paths[0].read_bytes() + b"more")
    changed = FileSource(tmp_path, names).fingerprint()
    paths[0].unlink()
    assert len({first, changed, FileSource(tmp_path, names).fingerprint()}) == 3


def test_names_of_any_bytes(tmp_path: Path) -> None:
    name = "caf\udce9.png"  # how Python shows a Latin-1 name on a UTF-8 system
    try:
        (tmp_path / name).write_bytes(encoded(Image.fromarray(picture())))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = FileSource(tmp_path, [name, "größe.png"])
    assert source.read(0).shape == (12, 16, 3)
    assert source.name(0).encode()
    assert source.name(1).endswith("größe.png")
    assert source.fingerprint()


def test_subset() -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    source = ArraySource(images, np.arange(10), [str(i) for i in range(10)], title="x")
    subset = Subset(source, np.array([7, 2]))
    assert len(subset) == 2
    assert subset.read(0).max() == 7
    assert subset.name(1) == "x/2"
    assert subset.labels.tolist() == [7, 2]
    assert subset.classes == source.classes
    assert subset.fingerprint() != Subset(source, np.array([2, 7])).fingerprint()
    with pytest.raises(ConfigError):
        subset.with_channels(3)


@pytest.mark.parametrize(("length", "count"), [(1, 5), (5, 5), (100, 7), (3, 64)])
def test_spread_reaches_both_ends(length: int, count: int) -> None:
    indices = evenly_spaced(length, count)
    assert len(indices) == min(length, count)
    assert indices[0] == 0
    assert indices[-1] == length - 1 or count == 1
    assert len(set(indices.tolist())) == len(indices)
