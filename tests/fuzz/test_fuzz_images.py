"""Image files and arrays of numbers with damage."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from damage import FUZZ, damaged, reads_or_refuses
from field_files import clip, scene, slice_file, sound, volume
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torchmae.data.formats import open_item
from torchmae.data.items import Context, Region
from torchmae.data.layouts import open_splits
from torchmae.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encoded(name: str, pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


FILES = {
    "bmp": encoded("BMP"),
    "gif": encoded("GIF"),
    "jpeg": encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"),
    "png": encoded("PNG"),
    "16-bit png": encoded("PNG", np.arange(480, dtype=np.uint16).reshape(20, 24)),
    "tiff": encoded("TIFF", compression="tiff_deflate"),
    "float tiff": encoded("TIFF", np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)),
    "webp": encoded("WEBP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_pictures(kind: str) -> None:
    @FUZZ
    @given(damaged(FILES[kind]), st.sampled_from([None, 1, 3]), st.sampled_from([1, 2, 8]))
    def check(raw: bytes, channels: int | None, reduction: int) -> None:
        try:
            pixels = open_item(raw, Context(num_channels=channels, max_megapixels=0.01)).read(reduction=reduction)
        except DataError as error:
            assert str(error)
            return
        assert pixels.dtype in (np.uint8, np.uint16, np.float32)
        assert pixels.shape[-1] == channels or (channels is None and pixels.shape[-1] > 0)  # a TIFF has any number
        assert 0 < pixels.size <= 30_000
        assert np.isfinite(pixels).all()

    check()


FIELDS = {
    "a.tif": lambda path: scene(path, PIXELS.transpose(2, 0, 1), compress="deflate"),
    "a.dcm": lambda path: slice_file(path, PIXELS[..., 0], RescaleSlope=2, PixelPaddingValue=0),
    "a.nii": lambda path: volume(path, PIXELS[..., :2]),
    "a.nii.gz": lambda path: volume(path, PIXELS[..., :2]),
    "a.wav": lambda path: sound(path, PIXELS[..., 0] / 256),
    "a.flac": lambda path: sound(path, PIXELS[..., 0].reshape(-1, 1) / 256),
    "a.ogg": lambda path: sound(path, PIXELS[..., 0].reshape(-1, 1) / 256),
    "a.mp4": lambda path: clip(path, 3, "mpeg4"),
    "a.mkv": lambda path: clip(path, 3, "mpeg4"),
    "a.mpg": lambda path: clip(path, 3, "mpeg2video"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields(folder: Path, name: str) -> None:
    path = FIELDS[name](folder / name)

    @FUZZ
    @given(damaged(path.read_bytes()), st.booleans())
    def check(raw: bytes, by_path: bool) -> None:
        path.write_bytes(raw)
        try:
            pixels = open_item(path if by_path else raw, Context(max_megapixels=0.01), lambda: name).read()
        except DataError as error:
            assert str(error).isprintable()
            return
        assert 0 < pixels.size <= 160_000

    check()


@FUZZ
@given(damaged(encoded("JPEG")), st.sampled_from([((0, 5), (0, 7)), ((8, 12), (3, 16)), ((19, 1), (0, 24))]))
def test_a_part_of_a_jpeg(raw: bytes, region: Region) -> None:
    try:
        item = open_item(raw, Context(num_channels=3, max_megapixels=0.01))
        inside = all(start + length <= have for (start, length), have in zip(region, item.size, strict=True))
        pixels = item.read(region) if inside else None
    except DataError as error:
        assert str(error)
        return
    if pixels is not None:
        assert pixels.dtype == np.uint8
        assert pixels.shape == (region[0][1], region[1][1], 3)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ARRAYS = {name: npy(np.ones((6, 8, 8, 1), name)) for name in ("uint8", "uint16", "float32", "float64", "bool")}


def read_all(path: Path) -> None:
    source = open_splits(str(path))["train"]
    for index in range(min(len(source), 6)):
        image = source.read(index)
        assert image.dtype in (np.uint8, np.uint16, np.float32)
        assert image.shape[-1] > 0
    source.fingerprint()


@pytest.mark.parametrize("dtype", ARRAYS)
def test_npy(folder: Path, dtype: str) -> None:
    @FUZZ
    @given(damaged(ARRAYS[dtype]))
    def check(raw: bytes) -> None:
        (folder / "x.npy").write_bytes(raw)
        reads_or_refuses(lambda: read_all(folder / "x.npy"))

    check()
    assert [path.name for path in folder.iterdir()] == ["x.npy"]


LABELS = npy(np.arange(6))


def zipped(images: bytes, labels: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", images)
        file.writestr("labels.npy", labels)
    return buffer.getvalue()


WHOLE = zipped(ARRAYS["uint8"], LABELS)


@pytest.mark.parametrize(
    "archives",
    [damaged(WHOLE), st.builds(zipped, damaged(ARRAYS["uint8"]), st.one_of(st.just(LABELS), damaged(LABELS)))],
    ids=["archive", "members"],
)
def test_npz(folder: Path, archives: st.SearchStrategy[bytes]) -> None:
    @FUZZ
    @given(archives)
    def check(raw: bytes) -> None:
        (folder / "x.npz").write_bytes(raw)
        reads_or_refuses(lambda: read_all(folder / "x.npz"))

    check()
    assert [path.name for path in folder.iterdir()] == ["x.npz"]
