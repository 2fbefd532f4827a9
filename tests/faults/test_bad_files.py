"""What becomes of every malformed input we could think of: read all the same, replaced and named, or refused."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchmae.config import DataConfig
from torchmae.data.loader import Batch, Plan
from torchmae.data.opening import Data, open_data
from torchmae.errors import ConfigError, DataError, TorchmaeError


def noise(height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, pixels: bytes = zlib.compress(b"\0" * 100)) -> bytes:
    """A PNG whose header promises any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return PNG[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header promises any size."""
    start = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:start] + struct.pack(">HH", height, width) + JPEG[start + 4 :]


PNG, JPEG, GIF, BMP, TIFF, WEBP = (encoded(noise(), name) for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"))
FLOATS = np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)
NO_IMAGE = "not an image, or cut short before its first pixel"

# Content of a file named bad.jpg among good ones, and why it cannot be read.
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"\xff", NO_IMAGE),
    "null bytes": (bytes(5000), NO_IMAGE),
    "text": ("ein Bild, 我的照片".encode(), NO_IMAGE),
    "error page": (b"<!doctype html><html><body>404</body></html>", NO_IMAGE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NO_IMAGE),
    "postscript, which would start an interpreter": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", NO_IMAGE),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", "No 'data' chunk marker|soundfile"),
    "gzipped picture": (gzip.compress(PNG), "holds no NIfTI volume|nibabel"),
    "array": (b"\x93NUMPY\x01\x00v\x00", "EOF"),
    "pickle": (b"\x80\x04cposix\nsystem\n(S'true'\ntR.", NO_IMAGE),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", NO_IMAGE),
    "jpeg, signature only": (JPEG[:4], NO_IMAGE),
    "jpeg without scan": (JPEG[: JPEG.index(b"\xff\xda")], "cannot load this image|cut short before its first pixel"),
    "jpeg cut in half": (JPEG[: len(JPEG) // 2], "(?i)truncated"),
    "jpeg cut in its last row": (JPEG[:-30], "truncated"),
    "jpeg of height 0": (jpeg_of(24, 0), "."),
    "jpeg that promises 65500 x 65500": (jpeg_of(65500, 65500), "more than 100,000,000 pixels"),
    "png, signature only": (PNG[:8], NO_IMAGE),
    "png cut in half": (PNG[: len(PNG) // 2], "truncated|broken"),
    "png, header damaged": (PNG[:18] + b"\xff" + PNG[19:], "."),
    "png without pixels": (PNG[:33] + png_chunk(b"IEND", b""), "."),
    "png, pixels no zlib stream": (png_of(9, 9, b"rubbish"), "broken"),
    "png of width 0": (png_of(0, 9), "."),
    "png that promises 30000 x 30000": (png_of(30000, 30000), "more than 100,000,000 pixels"),
    "png that promises 11000 x 11000": (png_of(11000, 11000), "11000 x 11000 is more than 100,000,000 pixels"),
    "gif cut short": (GIF[:60], "."),
    "gif that promises 65535 x 65535": (GIF[:6] + b"\xff" * 4 + GIF[10:], "more than 100,000,000 pixels"),
    "bmp cut short": (BMP[:100], "truncated"),
    "bmp that promises 2**30 columns": (BMP[:18] + struct.pack("<i", 2**30) + BMP[22:], "."),
    "tiff cut short": (TIFF[:60], "."),
    "tiff, directory beyond its end": (TIFF[:4] + struct.pack("<I", 10**9) + TIFF[8:], "."),
    "webp cut short": (WEBP[: len(WEBP) // 2], "."),
    "floats with nan": (encoded(np.where(FLOATS > 0.9, np.nan, FLOATS), "TIFF"), "values that are not finite"),
    "floats with infinity": (encoded(np.where(FLOATS > 0.9, np.inf, FLOATS), "TIFF"), "values that are not finite"),
}

# Content of a file named odd.jpg that reads, and its size after the EXIF rotation.
READABLE: dict[str, bytes] = {
    "png called jpg": PNG,
    "webp called jpg": WEBP,
    "progressive": encoded(noise(), "JPEG", progressive=True),
    "cmyk jpeg": encoded(Image.fromarray(noise()).convert("CMYK"), "JPEG"),
    "jpeg with rubbish at its end": JPEG + b"rubbish" * 100,
    "jpeg, metadata damaged": encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "jpeg, orientation 99": encoded(
        noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"
    ),
    "jpeg, comment of 60 kB": JPEG[:2] + b"\xff\xfe" + struct.pack(">H", 60002) + b"c" * 60000 + JPEG[2:],
    "jpeg that promises more rows than it has": jpeg_of(24, 400),
    "jpeg of 1 x 1": encoded(noise(1, 1), "JPEG"),
    "png of one column": encoded(noise(300, 1), "PNG"),
    "16-bit png": encoded(np.full((20, 24), 40000, np.uint16), "PNG"),
    "1-bit png": encoded(Image.new("1", (24, 20)), "PNG"),
    "transparent palette": encoded(Image.new("P", (24, 20)), "PNG", transparency=0),
    "grey with alpha": encoded(Image.new("LA", (24, 20)), "PNG"),
    "animation": encoded(Image.new("L", (24, 20)), "GIF", save_all=True, append_images=[Image.new("L", (24, 20), 99)]),
    "animated webp": encoded(
        Image.new("RGB", (24, 20)), "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 20), "red")]
    ),
    "float tiff": encoded(FLOATS, "TIFF"),
    "lab tiff": encoded(Image.new("LAB", (24, 20)), "TIFF"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six good pictures: a.png to c.png and x.png to z.png."""
    for i, name in enumerate("abcxyz"):
        Image.fromarray(noise(seed=i)).save(tmp_path / f"{name}.png")
    return tmp_path


def opened(source: Path, input_size: tuple[int, ...] = (8, 8), **settings: object) -> Data:
    given = {"val": "none", "cache": "none", "num_workers": 0, "max_bad": 0.5, **settings}
    return open_data(
        DataConfig(source=str(source), **given), input_size=input_size, channels=None, device=torch.device("cpu")
    )


def one_epoch(data: Data) -> list[Batch]:
    return list(data.train.train_batches(Plan(len(data.train), 4, 0), 0, 2))


def in_order(data: Data) -> torch.Tensor:
    (batch,) = data.train.eval_batches(np.arange(len(data.train)), 100)
    return batch.images


def assert_one_line(error: TorchmaeError) -> None:
    text = str(error)
    assert text.isprintable(), text
    assert 10 < len(text) < 500
    assert "object at 0x" not in text
    assert "Traceback" not in text
    assert error.exit_status == 2


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("what", UNREADABLE)
def test_a_bad_file_is_replaced_by_the_next_counted_and_named(folder: Path, what: str, cache: str) -> None:
    raw, reason = UNREADABLE[what]
    (folder / "bad.jpg").write_bytes(raw)  # third in order, before c.png
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = opened(folder, cache=cache, mean=(0.5,) * 3, std=(0.25,) * 3, nodata="none", window="none")
        batches = one_epoch(data)
    assert sum(len(batch.images) for batch in batches) == 7
    assert all(torch.isfinite(batch.images).all() for batch in batches)
    ((name, said),) = data.bad.items
    assert name == str(folder / "bad.jpg")
    assert re.search(reason, said), said
    assert said.isprintable()
    images = in_order(data)
    assert torch.equal(images[2], images[3])  # c.png stands in
    assert not torch.equal(images[2], images[1])


@pytest.mark.parametrize("what", READABLE)
def test_an_odd_file_is_read_all_the_same(folder: Path, what: str) -> None:
    (folder / "odd.jpg").write_bytes(READABLE[what])
    data = opened(folder, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = in_order(data)
    assert images.shape == (7, 3, 8, 8)
    assert torch.isfinite(images).all()
    assert data.bad.items == []


def vanish(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.png")


def lead_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def be_cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (vanish, "No such file or directory"),
        (become_a_folder, "Is a directory"),
        (lead_nowhere, "No such file or directory"),
        (lead_to_itself, "Too many levels of symbolic links"),
        (be_cut, "truncated|broken"),
    ],
)
def test_a_file_that_changes_after_indexing(folder: Path, change: Callable[[Path], None], reason: str) -> None:
    data = opened(folder, mean=(0.5,) * 3, std=(0.25,) * 3)
    change(folder / "b.png")
    assert sum(len(batch.images) for batch in one_epoch(data)) == 6
    ((name, said),) = data.bad.items
    assert name == str(folder / "b.png")
    assert re.search(reason, said), said


def test_a_pipe_with_an_images_name_is_no_image(folder: Path) -> None:
    os.mkfifo(folder / "bad.jpg")  # to open it would wait for a writer, for ever
    data = opened(folder, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert sum(len(batch.images) for batch in one_epoch(data)) == 7
    assert data.bad.items == [(str(folder / "bad.jpg"), "no regular file")]


def test_a_folder_with_an_images_name_is_a_folder(folder: Path) -> None:
    (folder / "album.jpg").mkdir()
    Image.fromarray(noise()).save(folder / "album.jpg" / "1.png")
    data = opened(folder)
    assert len(data.train) == 7
    assert data.bad.items == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"line\nend.png", b"bell\x07\x1b[2J.png", b"\xff\xfe not utf-8.png"])
def test_names_that_are_no_text_are_named_as_one_line(folder: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"")
    data = opened(folder, mean=(0.5,) * 3, std=(0.25,) * 3)
    one_epoch(data)
    ((shown, _),) = data.bad.items
    assert shown.isprintable()


def test_more_bad_files_than_allowed_end_the_run(folder: Path) -> None:
    for i in range(2):
        (folder / f"bad{i}.png").touch()
    with pytest.raises(DataError, match=r"2 of 8 images cannot be read, more than data.max_bad 0.1 allows") as caught:
        one_epoch(opened(folder, max_bad=0.1, mean=(0.5,) * 3, std=(0.25,) * 3))
    assert_one_line(caught.value)


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="none of 5 images can be read; the last: .*4.jpg: not an image") as caught:
        opened(tmp_path)
    assert_one_line(caught.value)


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(array) for name, array in arrays.items()})
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


IMAGES = np.zeros((6, 8, 8, 1), np.uint8)
OBJECTS = np.array([None] * 6, dtype=object)
NANS = np.full((6, 8, 8, 1), np.nan, np.float32)

# Name and content of a whole data set that is refused, and what is said.
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "npy, empty": ("x.npy", b"", "cannot read .*x.npy"),
    "npy, text": ("x.npy", b"1 2 3", "cannot read .*x.npy"),
    "npy, header cut": ("x.npy", npy(IMAGES)[:20], "cannot read .*x.npy"),
    "npy, header no dictionary": ("x.npy", npy(IMAGES).replace(b"{'descr'", b"['descr'"), "cannot read .*x.npy"),
    "npy, header of version 9": ("x.npy", b"\x93NUMPY\x09\x00" + npy(IMAGES)[8:], "cannot read .*x.npy"),
    "npy, header that divides by 0": (
        "x.npy",
        npy(IMAGES).replace(b"False", b"1/0  "),
        "x.npy: its header is damaged; save one numeric array with numpy.save",
    ),
    "npy, negative shape": ("x.npy", npy(IMAGES).replace(b"(6, 8,", b"(-6,8,"), "cannot read .*x.npy"),
    "npy, pixels cut": ("x.npy", npy(IMAGES)[:-10], "cannot read .*x.npy"),
    "npy, pickled objects": ("x.npy", npy(OBJECTS), "cannot read .*x.npy"),
    "npy, texts": ("x.npy", npy(["a"] * 6), "x.npy holds <U1"),
    "npy, complex": ("x.npy", npy(IMAGES * 1j), "x.npy holds complex128"),
    "npy, dates": ("x.npy", npy(IMAGES.astype("datetime64[s]")), "x.npy holds datetime64"),
    "npy, records": ("x.npy", npy(np.zeros((6, 8, 8), [("r", "u1"), ("g", "u1")])), "x.npy holds "),
    "npy, one number": ("x.npy", npy(np.uint8(3)), r"x.npy has shape \(\)"),
    "npy, seven axes": ("x.npy", npy(np.zeros((1,) * 7, np.uint8)), "x.npy has samples of shape 1 x 1"),
    "npy, no images": ("x.npy", npy(IMAGES[:0]), r"x.npy has shape \(0"),
    "npy, nan": ("x.npy", npy(NANS), "none of 6 images holds data"),
    "npz, empty": ("x.npz", b"", "cannot read .*x.npz"),
    "npz, no zip": ("x.npz", npy(IMAGES), "x.npz"),
    "npz, cut": ("x.npz", npz(images=IMAGES)[:200], "cannot read .*x.npz"),
    "npz without images": (
        "x.npz",
        npz(pictures=IMAGES, others=IMAGES),
        "x.npz holds pictures, others; it needs an array named images",
    ),
    "npz, images no array": ("x.npz", zipped(**{"images.npy": b"rubbish"}), "it needs an array named images"),
    "npz, pickled labels": ("x.npz", npz(images=IMAGES, labels=OBJECTS), "cannot read .*x.npz"),
    "parquet, empty": ("x.parquet", b"", "cannot read .*x.parquet"),
    "parquet, text": ("x.parquet", b"PAR1 no PAR1", "cannot read .*x.parquet"),
    "picture alone": ("x.png", PNG, "x.png is a single file of type .png; give its folder"),
    "archive": ("x.zip", zipped(a=b""), "x.zip is a single file of type .zip; unpack archives first"),
    "no suffix": ("x", PNG, r"x is a single file of type \(none\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_data_set_that_is_none_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    name, content, said = REFUSED[what]
    (tmp_path / name).write_bytes(content)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((DataError, ConfigError), match=said) as caught:
            opened(tmp_path / name)
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}], "holds images"),
        ([{"image": 1.5}], "holds images"),
        ([{"image": {"path": "a.png"}}], "holds images"),
        ([{"image": {"bytes": None, "path": "a.png"}, "label": 1}] * 3, "none of 3 images can be read"),
        ([{"image": b"rubbish"}] * 3, "none of 3 images can be read"),
    ],
)
def test_parquet_without_pictures(tmp_path: Path, rows: list[dict], said: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=said) as caught:
        opened(tmp_path / "x.parquet")
    assert_one_line(caught.value)


def test_a_row_without_bytes_is_one_bad_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": encoded(noise(seed=i), "PNG"), "path": ""}} for i in range(4)]
    rows[1]["image"]["bytes"] = None
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    data = opened(tmp_path / "x.parquet", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert len(in_order(data)) == 4
    assert [name for name, _ in data.bad.items] == ["x.parquet/1"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path.mkdir(), (path / "notes.txt").touch()), r"holds no images, only 1 other files \(1 .txt\)"),
        (lambda path: None, "is neither a path nor|no such file or folder"),
    ],
)
def test_folders_without_images(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(DataError, match=said) as caught:
        opened(tmp_path / "data")
    assert_one_line(caught.value)
