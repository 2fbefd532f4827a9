from __future__ import annotations

import io
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import decode, encoded, opened, picture
from PIL import Image

from torchmae.data import jpeg
from torchmae.data.formats import JpegItem, open_item
from torchmae.data.items import Context
from torchmae.data.reading import BadFiles
from torchmae.data.sources import FileSource
from torchmae.errors import DataError

RGB = picture()
GREY = np.array(Image.fromarray(RGB).convert("L"))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_every_format_gives_height_width_channels(format: str) -> None:
    lossless = {"lossless": True} if format == "WEBP" else {}
    pixels = decode(encoded(Image.fromarray(RGB), format, **lossless), 3)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (12, 16, 3)
    tolerance = {"JPEG": 8, "GIF": 8}.get(format, 0)
    assert np.abs(pixels.astype(int) - RGB).mean() <= tolerance


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
def test_without_a_wish_the_file_decides(mode: str, channels: int) -> None:
    format = "TIFF" if mode == "CMYK" else "PNG"
    raw = encoded(Image.fromarray(RGB).convert(mode), format)
    assert decode(raw, None).shape == (12, 16, channels)
    assert decode(raw, 1).shape == (12, 16, 1)
    assert decode(raw, 3).shape == (12, 16, 3)


def test_a_palette_of_greys_is_greyscale() -> None:
    image = Image.fromarray(GREY).convert("P", palette=Image.Palette.ADAPTIVE)
    image.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    assert decode(encoded(image), None).shape[-1] == 1


def test_grey_keeps_its_values() -> None:
    raw = encoded(Image.fromarray(GREY))
    np.testing.assert_array_equal(decode(raw, 1)[..., 0], GREY)
    np.testing.assert_array_equal(decode(raw, 3), np.repeat(GREY[..., None], 3, axis=-1))


def test_cmyk_jpeg_has_the_colours_it_was_made_of() -> None:
    raw = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(decode(raw, 3).astype(int) - RGB).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)  # black, and invisible but for the left column
    rgba[:, 0, 3] = 255
    image = Image.fromarray(rgba)
    options = {}
    if mode == "P":
        image = Image.fromarray(np.where(rgba[..., 3] > 0, 0, 1).astype(np.uint8), "L").convert("P")
        options = {"transparency": 1}
    elif mode == "LA":
        image = image.convert("LA")
    pixels = decode(encoded(image, **options), 3)
    assert (pixels[:, 0] == image.convert("RGBA").getpixel((0, 0))[0]).all()
    assert (pixels[:, 1:] == 255).all()


def test_half_transparent_is_half_white() -> None:
    pixels = decode(encoded(Image.new("RGBA", (2, 2), (0, 100, 200, 128))), 3)
    np.testing.assert_allclose(pixels[0, 0], [127, 177, 227], atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_stay(format: str) -> None:
    values = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    raw = encoded(Image.fromarray(values), format)
    for channels in (None, 1, 3):
        pixels = decode(raw, channels)
        assert pixels.dtype == np.uint16
        assert pixels.shape == (6, 8, channels or 1)
        assert (pixels == values[..., None]).all()


def test_thirty_two_bit_tiff() -> None:
    values = (np.arange(48, dtype=np.int32).reshape(6, 8) - 9) * 100_000
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values), "TIFF"), 1)[..., 0], values)


def test_float_tiff_stays_float() -> None:
    values = np.linspace(-1, 2, 48, dtype=np.float32).reshape(6, 8)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), None)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[..., 0], values)
    values[0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        decode(encoded(Image.fromarray(values), "TIFF"), None, nodata="none")


def test_plain_tiffs_name_the_value_of_no_data(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4, (8, 9), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={42113: "3"})
    item = open_item(tmp_path / "a.tif", Context(), lambda: "a.tif")
    assert item.meta["nodata"] == 3
    valid = item.read_valid()[1]
    assert valid is not None
    np.testing.assert_array_equal(valid, values != 3)
    assert open_item(tmp_path / "a.tif", Context(nodata="nan"), lambda: "a.tif").read_valid()[1] is None
    colours = np.stack([values, values + 9, values + 99], -1)
    Image.fromarray(colours).save(tmp_path / "a.tif", tiffinfo={42113: "3"})
    grey, valid = open_item(tmp_path / "a.tif", Context(num_channels=1), lambda: "a.tif").read_valid()
    assert grey.shape == (8, 9, 1) and valid is not None
    np.testing.assert_array_equal(valid, values != 3)  # by the values that are stored
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={42113: "none"})
    assert "nodata" not in open_item(tmp_path / "a.tif", Context(), lambda: "a.tif").meta


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(3, np.rot90(RGB, 2)), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB)), (2, RGB[:, ::-1])],
)
def test_exif_rotation_is_applied(orientation: int, turned: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(RGB), exif=exif), 3), turned)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_jpeg_has_the_same_pixels_with_simplejpeg_and_without(
    orientation: int, mode: str, reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(picture(45, 67)).convert(mode), "JPEG", quality=90, exif=exif)
    for channels in (None, 1, 3):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "_import_simplejpeg", lambda: None)
            slow = opened(raw, channels).read(reduction=reduction)
        fast = opened(raw, channels)
        assert fast.size == decode(raw, channels).shape[:2]
        np.testing.assert_array_equal(fast.read(reduction=reduction), slow)
        height, width = fast.size
        assert slow.shape[:2] == (-(-height // reduction), -(-width // reduction))


def needs_nvimgcodec() -> None:
    if jpeg._import_nvimgcodec() is None:
        pytest.skip("nvImageCodec is not installed")


REGIONS = [(0, 0, 45, 67), (5, 7, 20, 30), (44, 66, 1, 1), (0, 17, 45, 3), (30, 0, 15, 67)]


@pytest.mark.parametrize("decoder", ["nvimgcodec", "simplejpeg", "pillow"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_region_is_a_part_of_the_whole(
    decoder: str, mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = encoded(Image.fromarray(picture(45, 67)).convert(mode), "JPEG", quality=90, **options)
    if decoder == "nvimgcodec":
        needs_nvimgcodec()
    else:
        monkeypatch.setattr(jpeg, "read_region", lambda data, region: None)
    if decoder == "pillow":
        monkeypatch.setattr(jpeg, "_import_simplejpeg", lambda: None)
    for channels in (None, 1, 3):
        with Image.open(io.BytesIO(raw)) as image:
            whole = np.array(image.convert("L" if channels == 1 or (channels is None and mode == "L") else "RGB"))
        whole = whole.reshape(45, 67, -1)
        for top, left, height, width in REGIONS:
            part = opened(raw, channels).read(((top, height), (left, width)))
            np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_region_is_one_of_the_upright_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(picture(45, 67)), "JPEG", quality=90, exif=exif)
    part = opened(raw, 3).read(((3, 21), (9, 11)))
    np.testing.assert_array_equal(part, decode(raw, 3)[3:24, 9:20])


def test_orientation_in_xmp_is_applied() -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    raw = encoded(Image.fromarray(picture(45, 67)), "JPEG", xmp=packet)
    assert opened(raw, 3).size == (67, 45)


def test_nvimgcodec_decodes_regions_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_nvimgcodec()
    assert "nvidia-nvimgcodec-cu" in jpeg.jpeg_decoder()
    monkeypatch.setattr(JpegItem, "_read_whole", lambda self, reduction: pytest.fail("decoded whole"))
    assert opened(JPEG, 3).read(((1, 10), (2, 20))).shape == (10, 20, 3)
    assert jpeg.read_region(b"no picture", ((0, 4), (0, 4))) is None
    assert jpeg.read_region(JPEG, ((60, 10), (60, 10))) is None
    assert capfd.readouterr() == ("", "")


def test_importing_nvimgcodec_is_silent() -> None:
    needs_nvimgcodec()
    code = "from torchmae.data import jpeg; import sys; jpeg._import_nvimgcodec(); print('heard', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "heard\n")


def test_nvimgcodec_that_cannot_start_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        NVIMGCODEC_DEVICE_CPU_ONLY = CPU_ONLY = -1

        def Backend(self, kind: int) -> None:
            pass

        def Decoder(self, **options: Any) -> None:
            raise RuntimeError("no driver")

    monkeypatch.setattr(jpeg, "_import_nvimgcodec", lambda: Broken())
    monkeypatch.setattr(jpeg, "_region_decoder", jpeg._region_decoder.__wrapped__)
    np.testing.assert_array_equal(opened(JPEG, 3).read(((1, 10), (2, 20))), decode(JPEG, 3)[1:11, 2:22])


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_jpeg_that_was_cut_short_is_refused_whatever_part_is_wanted(kept: float) -> None:
    raw = encoded(Image.fromarray(picture(200, 300)), "JPEG", quality=90)
    with pytest.raises(DataError, match="truncated"):
        opened(raw[: int(kept * len(raw))], 3).read(((0, 8), (0, 8)))


def test_simplejpeg_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    assert jpeg.jpeg_decoder().startswith("simplejpeg ")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("Pillow decoded"))
    assert decode(JPEG, 3).shape == (64, 64, 3)


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_other_formats_come_whole(format: str) -> None:
    whole = opened(encoded(Image.fromarray(RGB), format), 3)
    assert whole.size == (12, 16)
    assert whole.read(reduction=4).shape == (12, 16, 3)


@pytest.mark.parametrize("format", ["EPS", "ICO", "PCX"])
def test_formats_that_are_not_promised_are_not_opened(format: str) -> None:
    with pytest.raises(DataError, match="not an image"):
        decode(encoded(Image.fromarray(RGB), format), 3)


def test_broken_exif_does_not_make_pixels_unreadable() -> None:
    raw = encoded(Image.fromarray(RGB), exif=b"Exif\0\0not a TIFF header at all")
    np.testing.assert_array_equal(decode(raw, 3), RGB)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (5, 4), value) for value in (10, 200)]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(raw, 1) == 10).all()


def test_the_array_is_the_callers_own() -> None:
    pixels = decode(encoded(Image.fromarray(RGB)), 3)
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


PNG = encoded(Image.fromarray(picture(64, 64)))
JPEG = encoded(Image.fromarray(picture(64, 64)), "JPEG")


DAMAGED = {
    "empty": (b"", "the file is empty"),
    "page": (b"<html>not found</html>", "not an image"),
    "jpeg-header": (JPEG[:5], "not an image"),
    "jpeg": (JPEG[: len(JPEG) * 2 // 3], "truncated"),
    "png": (PNG[: len(PNG) // 2], "truncated|broken"),
    "tiff": (encoded(Image.fromarray(RGB), "TIFF")[:60], None),
    "bmp": (encoded(Image.fromarray(RGB), "BMP")[:100], "truncated"),
    "gif": (encoded(Image.fromarray(RGB), "GIF")[:40], None),
    "webp": (encoded(Image.fromarray(RGB), "WEBP")[:50], None),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_line(what: str, tmp_path: Path) -> None:
    raw, reason = DAMAGED[what]
    with pytest.raises(DataError, match=reason) as caught:
        decode(raw, 3)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert "object at" not in str(caught.value)
    path = tmp_path / "damaged.png"
    path.write_bytes(raw)
    with pytest.raises(DataError) as named:
        FileSource(Path(), [str(path)]).read(0)
    assert str(named.value) == f"{path}: {caught.value}"


@pytest.mark.parametrize("seed", range(60))
def test_noise_in_a_file_is_an_image_or_a_data_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = bytearray([PNG, JPEG, encoded(Image.fromarray(RGB), "TIFF"), encoded(Image.fromarray(RGB), "GIF")][seed % 4])
    for position in rng.integers(4, len(raw), 20):
        raw[position] = rng.integers(256)
    try:
        assert decode(bytes(raw), 3, max_megapixels=1).shape[-1] == 3
    except DataError as error:
        assert "\n" not in str(error)


def test_missing_and_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: No such file"):
        FileSource(tmp_path, ["gone.png"]).read(0)
    with pytest.raises(DataError, match="Is a directory"):
        FileSource(Path(), [str(tmp_path)]).read(0)


def test_a_bomb_is_refused_unopened() -> None:
    raw = encoded(Image.new("1", (2000, 2000)))
    with pytest.raises(DataError, match="2000 x 2000 is more than 1,000,000 pixels"):
        decode(raw, 1, max_megapixels=1)
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height, and the checksum of the block
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match="more than 100,000,000 pixels"):
        decode(bytes(header), 1)


def test_channels_that_a_picture_does_not_have() -> None:
    with pytest.raises(DataError, match="has 3 channels where 4 are wanted"):
        decode(PNG, 4)


def test_warning_filters_are_left_alone_in_threads() -> None:
    # Nested catch_warnings of several threads, left in another order than entered, would silence the process.
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(PNG, 3) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_bad_files_end_the_run_beyond_the_limit() -> None:
    bad = BadFiles(200, 0.01)
    assert bad.limit == 2
    bad.add("a.png", "empty")
    bad.add("a.png", "empty")
    bad.add("b.png", "cut short")
    assert bad.items == [("a.png", "empty"), ("b.png", "cut short")]
    with pytest.raises(DataError, match=r"3 of 200 images cannot be read, more than data.max_bad 0.01 .* c.png: odd;"):
        bad.add("c.png", "odd")


def test_one_bad_file_is_allowed_however_few_there_are_unless_none_is() -> None:
    BadFiles(5, 0.01).add("a", "b")
    with pytest.raises(DataError, match=r"1 of 5 images cannot be read, and data.max_bad is 0"):
        BadFiles(5, 0.0).add("a", "b")
