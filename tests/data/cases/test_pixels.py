"""Sound files that are not plain 8-bit RGB: the right pixels, or one line that says what was left out."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torchmae.config import PackOptions
from torchmae.data.formats import FORMATS, open_item
from torchmae.data.items import Context, Item
from torchmae.data.layouts import open_splits
from torchmae.data.packing import pack
from torchmae.data.reading import inspect_splits
from torchmae.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def opened(data: bytes, **options: Any) -> Item:
    return open_item(data, Context(**options))


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    library = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    file = io.BytesIO()
    library.imwrite(file, pixels, **options)
    return file.getvalue()


def png(depth: int, colour: int, rows: np.ndarray, extra: bytes = b"") -> bytes:
    """A PNG made by hand: `rows` are (height, values in a row) of the depth's type; `extra` chunks follow IHDR."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    height, width = len(rows), rows.shape[1] // channels
    raw = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_any_type_and_any_number_of_bands(dtype: str, compression: str | None, planar: str) -> None:
    values = RNG.integers(0, 100, (20, 24, 5)).astype(dtype)
    values[0, 0] = [0, 1, 2, 3, 4]
    if np.dtype(dtype).kind != "u":
        values -= 50
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    item = opened(tiff(stored, photometric="minisblack", planarconfig=planar, compression=compression))
    assert (item.size, item.channels, item.dtype) == ((20, 24), 5, dtype if dtype in FULL else "float32")
    np.testing.assert_array_equal(item.read(), values)
    np.testing.assert_array_equal(item.read(((3, 5), (7, 11))), values[3:8, 7:18])


FULL = ("uint8", "uint16")


@pytest.mark.parametrize("top", [255, 4095, 10000])
def test_sixteen_bits_in_colour_stay(top: int) -> None:
    values = RNG.integers(0, top + 1, (20, 24, 3)).astype(np.uint16)
    np.testing.assert_array_equal(opened(tiff(values, photometric="rgb", compression="lzw")).read(), values)
    np.testing.assert_array_equal(opened(png(16, 2, values.reshape(20, -1))).read(), values)
    pnm = b"P6\n# a comment\n24 20\n%d\n" % max(top, 256) + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(opened(pnm).read(), values)


@pytest.mark.parametrize(("extra", "channels"), [("unassalpha", 3), ("assocalpha", 3), ("unspecified", 4)])
def test_a_fourth_band_is_opacity_only_where_the_file_says_so(extra: str, channels: int) -> None:
    four = np.dstack([RGB, np.full((20, 24), 128, np.uint8)])
    item = opened(tiff(four, photometric="rgb", extrasamples=[extra]))
    assert item.channels == channels
    if channels == 4:
        np.testing.assert_array_equal(item.read(), four)
        assert item.notes == ()
    else:
        assert item.notes == ("transparency laid on white",)
        share = 1 if extra == "assocalpha" else 128 / 255
        expected = np.clip(np.rint(RGB * share + 255 * (1 - 128 / 255)), 0, 255)
        np.testing.assert_array_equal(item.read(), expected)


def test_grey_with_opacity_of_sixteen_bits() -> None:
    values = np.dstack([np.full((4, 4), 1000, np.uint16), np.full((4, 4), 65535, np.uint16)])
    values[0, 0, 1] = 0
    for data in (
        tiff(values, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
        png(16, 4, values.reshape(4, -1)),
    ):
        pixels = opened(data).read()
        assert (pixels.shape, pixels.dtype) == ((4, 4, 1), np.uint16)
        assert (pixels[0, 0, 0], pixels[1, 1, 0]) == (65535, 1000)


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
def test_white_may_be_zero(photometric: str) -> None:
    values = np.arange(480, dtype=np.uint16).reshape(20, 24)
    expected = 65535 - values if photometric == "miniswhite" else values
    np.testing.assert_array_equal(opened(tiff(values, photometric=photometric)).read()[..., 0], expected)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_a_tiff_that_ends_early_is_cut_short_and_a_bomb_is_refused(compression: str | None) -> None:
    data = tiff(
        RNG.integers(0, 9, (20, 24, 60)).astype(np.uint16),
        photometric="minisblack",
        planarconfig="contig",
        compression=compression,
    )
    for kept in (0.5, 0.95):
        with pytest.raises(DataError):
            opened(data[: int(kept * len(data))]).read()
    with pytest.raises(DataError, match="60 bands of uint16 take more than 16 bytes .* raise data.max_megapixels"):
        opened(data, max_megapixels=0.0005)


def test_pages_are_the_first_all_or_a_stack(tmp_path: Path) -> None:
    stack = RNG.integers(0, 60000, (6, 20, 24)).astype(np.uint16)
    data = tiff(stack, photometric="minisblack")
    first = opened(data)
    np.testing.assert_array_equal(first.read()[..., 0], stack[0])
    assert first.notes == ("page 1 of 6",)
    whole = opened(data, pages="stack")
    assert (whole.size, whole.channels, whole.notes) == ((6, 20, 24), 1, ())
    np.testing.assert_array_equal(whole.read()[..., 0], stack)
    for i in range(2):
        (tmp_path / f"{i}.tif").write_bytes(data)
    source = open_splits(str(tmp_path), Context(pages="all"))["train"]
    assert len(source) == 12
    np.testing.assert_array_equal(source.read(8)[..., 0], stack[2])
    assert source.name(8) == f"{tmp_path / '1.tif'}, page 3"


@pytest.mark.parametrize("kind", [{"ome": True}, {"imagej": True}])
def test_axes_of_microscopes(kind: dict[str, bool]) -> None:
    values = RNG.integers(0, 60000, (3, 4, 20, 24)).astype(np.uint16)
    data = tiff(values, metadata={"axes": "ZCYX"}, photometric="minisblack", **kind)
    first = opened(data)
    assert (first.size, first.channels, first.notes) == ((20, 24), 4, ("page 1 of 3",))
    np.testing.assert_array_equal(first.read(), np.moveaxis(values[0], 0, -1))
    whole = opened(data, pages="stack")
    assert (whole.size, whole.channels) == ((3, 20, 24), 4)
    np.testing.assert_array_equal(whole.read(), np.moveaxis(values, 1, -1))


def test_a_stack_that_was_cut_short_is_no_smaller_stack() -> None:
    data = tiff(RNG.integers(0, 9, (6, 20, 24)).astype(np.uint16), photometric="minisblack", metadata=None)
    cut = data[: len(data) * 2 // 3]
    assert opened(cut).read().shape == (20, 24, 1)
    for pages in ("stack", "all"):
        with pytest.raises(DataError, match="^cut short"):
            opened(cut, pages=pages).read()


def test_previews_are_no_pages() -> None:
    library = pytest.importorskip("tifffile")
    file = io.BytesIO()
    with library.TiffWriter(file) as writer:
        writer.write(GREY[::4, ::4].astype(np.uint16), subfiletype=1, photometric="minisblack")
        writer.write(GREY.astype(np.uint16), photometric="minisblack")
    item = opened(file.getvalue())
    np.testing.assert_array_equal(item.read()[..., 0], GREY)
    assert item.notes == ("reduced copies passed over",)


def test_values_that_the_file_declares_to_be_none() -> None:
    values = np.where(np.eye(8, dtype=bool), -9999, RNG.random((8, 8))).astype(np.float32)
    data = tiff(values, photometric="minisblack", extratags=[(42113, "s", 0, "-9999", True)])
    item = opened(data)
    pixels = item.read()[..., 0]
    assert pixels.min() >= 0
    np.testing.assert_allclose(pixels[0, 0], values[values > 0].mean(), rtol=1e-5)
    assert item.notes == ("-9999 means no data, as the file says",)


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_without_the_extra_nothing_is_read_in_part(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    plain, words = tiff(RGB, photometric="rgb"), tiff(np.zeros((3, 20, 24, 5), np.uint16), planarconfig="contig")
    monkeypatch.setitem(sys.modules, missing, None)
    np.testing.assert_array_equal(opened(plain).read(), RGB)
    with pytest.raises(DataError, match=r"5 bands, uint16, 3 pages needs tifffile.*pip install 'torchmae\[tiff\]'"):
        opened(words)


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.pgm", "a.pnm", "a.heic", "a.avif"])
def test_suffixes_of_pictures(tmp_path: Path, name: str) -> None:
    suffix = name.rpartition(".")[2].lower()
    if suffix in ("heic", "avif"):
        pytest.importorskip("pillow_heif").register_heif_opener()
        if FORMATS[{"heic": "heif"}.get(suffix, suffix)].missing():
            pytest.skip("not read by this Pillow")
    form = {"jfif": "JPEG", "jpe": "JPEG", "heic": "HEIF", "avif": "AVIF"}.get(suffix, "PPM")
    picture = Image.fromarray(GREY if suffix == "pgm" else RGB)
    picture.save(tmp_path / name, form)
    pixels = open_splits(str(tmp_path))["train"].read(0)
    assert pixels.shape == (20, 24, 1 if suffix == "pgm" else 3)
    if form == "PPM":
        np.testing.assert_array_equal(pixels.squeeze(), np.asarray(picture))


def test_an_avif_of_more_than_8_bits_is_said() -> None:
    codecs = pytest.importorskip("imagecodecs")
    if FORMATS["avif"].missing():
        pytest.skip("not read by this Pillow")
    deep = codecs.avif_encode(RGB.astype(np.uint16) * 4, bitspersample=10)
    assert opened(deep).notes == ("10 or 12 bits read as 8",)
    assert opened(codecs.avif_encode(RGB)).notes == ()


def test_metadata_is_not_pixels() -> None:
    rows = RGB.reshape(20, -1)
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000)))
    broken = chunk(b"iCCP", b"icc\0\0no stream") + b"\0\0\0\4tIMEabcd\0\0\0\0"  # a wrong checksum
    for extra in (bomb, broken):
        np.testing.assert_array_equal(opened(png(8, 2, rows, extra)).read(), RGB)


def test_a_jpeg_without_its_last_rows(tmp_path: Path) -> None:
    file = io.BytesIO()
    smooth = np.add.outer(np.arange(96), np.arange(96)).astype(np.uint8)
    Image.fromarray(smooth).convert("RGB").save(file, "JPEG", quality=95)
    whole, cut = file.getvalue(), file.getvalue()[:-200]
    with pytest.raises(DataError, match="^cut short"):
        opened(cut).read()
    kept = opened(cut, truncated="keep").read()
    np.testing.assert_array_equal(kept[:48], opened(whole).read()[:48])
    for name, data in (("a", whole), ("b", cut), ("c", b"<html>")):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    facts = inspect_splits(open_splits(str(tmp_path))).splits["train"]
    assert (len(facts.corrupt), facts.cut_short) == (2, 1)


def test_a_genuine_large_jpeg_is_read_at_a_fraction_and_a_bomb_is_not() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).resize((640, 400)).save(file, "JPEG", progressive=False)
    item = opened(file.getvalue(), max_megapixels=0.1)
    assert item.size == item.read().shape[:2] == (200, 320)
    assert item.notes == ("above 0.1 megapixels: read at 1/2 of its size",)
    assert opened(file.getvalue(), max_megapixels=1).size == (400, 640)
    progressive = io.BytesIO()
    Image.fromarray(RGB).resize((640, 400)).save(progressive, "JPEG", progressive=True)
    for data in (progressive.getvalue(), png(8, 2, np.zeros((400, 1920), np.uint8))):
        with pytest.raises(DataError, match="640 x 400 is more than 100,000 pixels; raise data.max_megapixels"):
            opened(data, max_megapixels=0.1)


def test_cmyk_without_its_mark_is_said() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(file, "JPEG")
    assert opened(file.getvalue()).notes == ("CMYK as RGB",)


def test_pages_and_values_survive_packing(tmp_path: Path) -> None:
    stack = RNG.integers(0, 60000, (3, 20, 24, 5)).astype(np.uint16)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(tiff(stack, photometric="minisblack", planarconfig="contig"))
    pytest.importorskip("pyarrow")
    for form in ("parquet", "wds", "npy"):
        for pages, expected in (("all", stack), ("stack", stack[None])):
            out = tmp_path / f"{form}-{pages}"
            options = PackOptions(format=form, pages=pages)
            pack(open_splits(str(tmp_path / "in"), Context.of(options)), out, options)
            axes = ("HWC" if pages == "all" else "ZYXC") if form == "npy" else None
            packed = open_splits(str(out), Context(axes=axes))["train"]
            np.testing.assert_array_equal(np.stack([packed.read(i) for i in range(len(packed))]), expected)


def test_a_pack_of_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 1 images can be read: nothing to pack"):
        pack(open_splits(str(tmp_path / "in")), tmp_path / "out", PackOptions())
    assert not (tmp_path / "out").exists()


def test_pages_that_lead_in_a_circle_are_refused_at_once() -> None:
    header, first = b"II*\0", (8).to_bytes(4, "little")
    tag = struct.pack("<HHII", 256, 3, 1, 4)
    page = struct.pack("<H", 1) + tag + first  # the next page is this one
    with pytest.raises(DataError, match="circle"):
        open_item(header + first + page, Context())


@pytest.mark.parametrize("axes", ["YX", "YXS", "SYX", "ZYX"])
@pytest.mark.parametrize("layout", [{"tile": (32, 48)}, {"rowsperstrip": 7, "compression": "zlib"}, {}])
def test_a_window_of_a_tiff_reads_the_strips_or_tiles_that_hold_it(
    tmp_path: Path, axes: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile")
    lengths = {"Y": 90, "X": 110, "S": 4, "Z": 5}
    rng = np.random.default_rng(0)
    values = rng.integers(0, 60000, [lengths[axis] for axis in axes]).astype(np.uint16)
    kind = {"planarconfig": "separate" if axes[0] == "S" else "contig", "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", values, **layout, **(kind if "S" in axes else {"photometric": "minisblack"}))
    context = Context(pages="stack" if "Z" in axes else "first")
    item = open_item(tmp_path / "a.tif", context)
    whole = np.moveaxis(values, 0, -1) if axes[0] == "S" else values if "S" in axes else values[..., None]
    np.testing.assert_array_equal(item.read(), whole)
    read: list[int] = []
    handle = tifffile.FileHandle.read
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1: read.append(size) or handle(self, size))
    region = (*(((2, 1),) if "Z" in axes else ()), (40, 20), (50, 30))
    part = whole[tuple(slice(start, start + length) for start, length in region)]
    np.testing.assert_array_equal(item.read(region), part)
    assert not layout or 0 < sum(read) < values.nbytes / (2 if "Z" not in axes else 8)
