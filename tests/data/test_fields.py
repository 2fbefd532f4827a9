"""Scenes, medical images, sound and video: the values that their own libraries read, whole or in parts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from field_files import clip, scene, slice_file, sound, volume

from torchmae.cli import main
from torchmae.data import formats
from torchmae.data.formats import FORMATS, open_item
from torchmae.data.items import Context, FileItem, Item
from torchmae.data.layouts import open_splits
from torchmae.errors import DataError

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 4096, (40, 30)).astype(np.uint16)


def check_parts(path: Path, **options: Any) -> tuple[Item, np.ndarray]:
    """Opens a file by its path and by its content, and compares parts of it with the whole."""
    item = open_item(path, Context(**options), lambda: path.name)
    whole = item.read()
    assert whole.shape == (*item.size, item.channels)
    assert whole.dtype == item.dtype
    by_content = open_item(path.read_bytes(), Context(**options), lambda: path.name)
    for _ in range(3):
        starts = [int(RNG.integers(0, length)) for length in item.size]
        region = tuple((s, int(RNG.integers(1, n - s + 1))) for s, n in zip(starts, item.size, strict=True))
        part = whole[tuple(slice(start, start + length) for start, length in region)]
        np.testing.assert_array_equal(item.read(region), part)
        np.testing.assert_array_equal(by_content.read(region), part)
    return item, whole


# Scenes


def test_a_scene(tmp_path: Path) -> None:
    values = RNG.integers(0, 9000, (12, 70, 50)).astype(np.int16)
    names = [f"B{i}" for i in range(12)]
    path = scene(tmp_path / "a.tif", values, descriptions=names, nodata=-9999, tiled=True, blockxsize=16, blockysize=16)
    item, whole = check_parts(path)
    np.testing.assert_array_equal(whole, np.moveaxis(values, 0, -1).astype(np.float32))
    assert item.bands == tuple(names)
    assert item.meta["nodata"] == -9999
    assert item.meta["crs"] == "EPSG:32633"
    assert item.meta["transform"] == (10, 0, 5e5, 0, -10, 4e6)
    assert item.meta["spacing"] == (10, 10)
    assert "int16 as float32" in item.notes


def test_a_window_of_a_large_scene_is_read_without_the_rest(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "width": 4000, "height": 4000, "count": 12, "dtype": "uint16", "crs": "EPSG:32633"}
    grid = rasterio.Affine(10, 0, 0, 0, -10, 0)
    with rasterio.open(
        path, "w", **profile, transform=grid, tiled=True, blockxsize=256, blockysize=256, sparse_ok=True
    ) as file:
        file.write(np.full((12, 256, 256), 7, np.uint16), window=((0, 256), (0, 256)))
    size = path.stat().st_size
    with path.open("r+b") as raw:  # the values beyond the first block are damaged; nobody sees it
        raw.seek(size - 64)
        raw.write(b"\xff" * 64)
    item = open_item(path, Context(max_megapixels=1))
    assert item.size == (4000, 4000)
    assert (item.read(((10, 200), (10, 200)))[..., :6] == 7).all()
    with pytest.raises(DataError, match="raise data.max_megapixels"):
        item.read()


def test_a_scene_in_colour_with_opacity_lies_on_white(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (4, 20, 30)).astype(np.uint8)
    values[3, :10], values[3, 10:] = 0, 255
    item, whole = check_parts(scene(tmp_path / "a.tif", values, photometric="RGB", alpha="YES"))
    assert item.channels == 3
    assert (whole[:10] == 255).all()
    np.testing.assert_array_equal(whole[10:], np.moveaxis(values[:3, 10:], 0, -1))


def test_without_rasterio_a_scene_is_a_tiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tifffile")
    path = scene(tmp_path / "a.tif", VALUES[None])
    assert open_item(path, Context()).form == "GeoTIFF"
    monkeypatch.setattr("torchmae.data.tiff.find_spec", lambda name: None)
    plain = open_item(path, Context())
    assert plain.form == "TIFF"
    np.testing.assert_array_equal(plain.read()[..., 0], VALUES)


def test_the_shared_scenes(shared_data: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = sorted((shared_data / "s2-wildfire" / "images").iterdir())[0]
    item, whole = check_parts(path)
    assert item.bands == ("B2", "B3", "B4", "B8", "B12")
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(whole, np.moveaxis(file.read(), 0, -1))


# DICOM


def test_values_are_in_the_unit_of_the_modality(tmp_path: Path) -> None:
    path = slice_file(tmp_path / "a", VALUES, RescaleSlope=2, RescaleIntercept=-1024, PixelPaddingValue=0)
    item, whole = check_parts(path)
    np.testing.assert_array_equal(whole[..., 0], VALUES * np.float32(2) - 1024)
    assert item.meta["nodata"] == -1024
    assert item.meta["spacing"] == (0.5, 0.25)


def test_a_range_of_padding_is_one_value(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    path = slice_file(tmp_path / "a", values, PixelPaddingValue=0, PixelPaddingRangeLimit=3)
    item, whole = check_parts(path, nodata="none")
    assert whole.ravel().tolist() == [0, 0, 0, 0, *range(4, 12)]
    assert item.meta["nodata"] == 0
    filled, valid = open_item(path, Context(), lambda: path.name).read_valid()
    assert valid is not None
    assert valid.ravel().tolist() == [False] * 4 + [True] * 8
    np.testing.assert_array_equal(filled[valid], whole[valid])


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = slice_file(tmp_path / "a", VALUES, PhotometricInterpretation="MONOCHROME1", BitsStored=12)
    item, whole = check_parts(path)
    assert item.dtype == np.uint16
    np.testing.assert_array_equal(whole[..., 0], 4095 - VALUES)


@pytest.mark.parametrize("dims", [2, 3])
def test_frames(tmp_path: Path, dims: int) -> None:
    frames = RNG.integers(0, 256, (5, 8, 9)).astype(np.uint8)
    item, whole = check_parts(slice_file(tmp_path / "a.dcm", frames, NumberOfFrames=5), spatial_dims=dims)
    np.testing.assert_array_equal(whole[..., 0], frames if dims == 3 else frames[0])
    assert dims == 3 or "page 1 of 5" in item.notes
    if dims == 2:
        assert len(open_splits(str(tmp_path), Context(pages="all"))["train"]) == 5


def test_each_frame_has_its_own_scale(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    frames = RNG.integers(0, 4096, (3, 8, 9)).astype(np.uint16)
    frames[:, 0, 0] = 7
    slopes, each = (0.5, 2.0, 1.0), []
    for slope in slopes:
        scale, frame = pydicom.Dataset(), pydicom.Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = slope, -10
        frame.PixelValueTransformationSequence = [scale]
        each.append(frame)
    elements = {"NumberOfFrames": 3, "PerFrameFunctionalGroupsSequence": each, "PixelPaddingValue": 7}
    path = slice_file(tmp_path / "a.dcm", frames, **elements)
    _, whole = check_parts(path, spatial_dims=3, nodata="none")
    wanted = frames * np.array(slopes, np.float32)[:, None, None] - 10
    wanted[frames == 7] = 7 * slopes[0] - 10  # padding has one value
    np.testing.assert_array_equal(whole[..., 0], wanted)
    second = open_splits(str(tmp_path), Context(pages="all", nodata="none"))["train"].read(1)
    np.testing.assert_array_equal(second[..., 0], wanted[1])
    valid = open_item(path, Context(spatial_dims=3), lambda: path.name).read_valid()[1]
    assert valid is not None and (valid == (frames != 7)).all()


def test_compressed_and_odd_files_of_pydicom() -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("openjpeg")
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    for name in ("CT_small", "MR_small_jp2klossless", "MR_small_RLE", "examples_palette", "SC_rgb_jpeg_dcmtk"):
        item, whole = check_parts(folder / f"{name}.dcm")
        data = pydicom.dcmread(folder / f"{name}.dcm")
        if item.channels == 1:
            values = pydicom.pixels.apply_modality_lut(data.pixel_array, data)
            np.testing.assert_array_equal(whole[..., 0], values.astype(np.float32))


def test_deflated_files_are_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom")
    path = Path(pydicom.__file__).parent / "data" / "test_files" / "image_dfl.dcm"
    np.testing.assert_array_equal(check_parts(path)[1][..., 0], pydicom.dcmread(path).pixel_array)
    (tmp_path / "a.dcm").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="cut short"):
        open_item(tmp_path / "a.dcm", Context())
    monkeypatch.setattr("torchmae.data.dicom.MAX_BYTES", path.stat().st_size)
    with pytest.raises(DataError, match="unpacked"):
        open_item(path, Context())


def series(folder: Path, count: int, uid: str, suffix: str = "") -> list[np.ndarray]:
    """Writes the slices of a series in another order than that of their names."""
    slices = [RNG.integers(0, 4096, (8, 10)).astype(np.uint16) for _ in range(count)]
    for z, values in enumerate(slices):
        name = f"IM{(z * 7 + 3) % count:04}{suffix}"
        slice_file(folder / name, values, SeriesInstanceUID=uid, ImagePositionPatient=[0, 0, -20 + 2.5 * z])
    return slices


def test_slices_become_volumes_where_the_model_takes_three_axes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = series(tmp_path / "a", 5, "1.2.3"), series(tmp_path / "b", 4, "1.2.4", ".dcm")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "README").write_text("no picture")
    assert len(open_splits(str(tmp_path))["train"]) == 9
    source = open_splits(str(tmp_path), Context(spatial_dims=3))["train"]
    assert len(source) == 2
    assert source.labels.tolist() == [0, 1]
    assert any("9 DICOM files are 2 volumes" in remark for remark in source.remarks)
    for index, slices in enumerate((first, second)):
        item = source.open(index)
        assert item.meta["spacing"] == (2.5, 0.5, 0.25)
        np.testing.assert_array_equal(item.read()[..., 0], np.stack(slices))
        np.testing.assert_array_equal(item.read(((1, 2), (3, 4), (0, 5)))[..., 0], np.stack(slices)[1:3, 3:7, :5])
    assert source.with_channels(3).read(0).shape == (5, 8, 10, 3)
    files = [f"a/IM{number:04},one,x" for number in range(5)] + [f"b/IM{number:04}.dcm,two,x|y" for number in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["path,patient,label", *files]))
    listed = open_splits(str(tmp_path / "list.csv"), Context(spatial_dims=3, group="patient"))["train"]
    assert listed.groups is not None and listed.groups.tolist() == ["one", "two"]
    assert listed.tags is not None and listed.tags.tolist() == [[1, 0], [1, 1]]


def test_the_shared_slices(shared_data: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    source = open_splits(str(shared_data / "ct-dicom"), Context(nodata="none"))["train"]
    assert len(source) == 30
    data = pydicom.dcmread(source.name(0))
    expected = data.pixel_array.astype(np.float32) * float(data.RescaleSlope) + float(data.RescaleIntercept)
    np.testing.assert_array_equal(source.read(0)[..., 0], expected)


# NIfTI


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volumes_are_turned_to_canonical_axes(tmp_path: Path, axes: str, suffix: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    path = volume(tmp_path / f"a{suffix}", RNG.normal(size=(7, 8, 9)).astype(np.float32), axes)
    item, whole = check_parts(path)
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_array_equal(whole[..., 0], canonical.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(item.meta["spacing"], canonical.header.get_zooms())


def test_slope_and_intercept(tmp_path: Path) -> None:
    values = RNG.integers(0, 200, (5, 6, 7)).astype(np.uint8)
    stored = check_parts(volume(tmp_path / "a.nii", values))[0]
    item, whole = check_parts(volume(tmp_path / "b.nii", values, slope=0.5, intercept=-3))
    assert (stored.dtype, item.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(whole[..., 0], values * np.float32(0.5) - 3)


def test_a_fourth_axis_is_pages_or_channels(tmp_path: Path) -> None:
    values = RNG.integers(0, 200, (5, 6, 7, 3)).astype(np.uint8)
    path = volume(tmp_path / "a.nii.gz", values)
    first, whole = check_parts(path)
    np.testing.assert_array_equal(whole, values[..., :1])
    assert "page 1 of 3" in first.notes
    np.testing.assert_array_equal(check_parts(path, page=2, pages="all")[1], values[..., 2:])
    np.testing.assert_array_equal(check_parts(path, pages="stack")[1], values)
    assert len(open_splits(str(tmp_path), Context(pages="all"))["train"]) == 3


def test_a_flat_volume_is_a_picture(tmp_path: Path) -> None:
    values = RNG.integers(0, 200, (5, 6, 1)).astype(np.uint8)
    path = volume(tmp_path / "a.nii", values)
    np.testing.assert_array_equal(check_parts(path, spatial_dims=2)[1], values)
    assert check_parts(path)[0].size == (5, 6, 1)


def test_the_shared_volumes(shared_data: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    source = open_splits(str(shared_data / "spine-nifti"))["train"]
    assert len(source) == 19  # label volumes are masks
    for index in range(19):
        canonical = nibabel.as_closest_canonical(nibabel.load(source.name(index)))
        expected = canonical.get_fdata()
        expected = expected[..., 0] if expected.ndim == 4 else expected
        np.testing.assert_array_equal(source.read(index)[..., 0], expected.astype(np.float32))


# Sound


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
def test_sound(tmp_path: Path, form: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = sound(tmp_path / f"a.{form}", RNG.normal(size=(9000, 2)) * 0.1)
    item, whole = check_parts(path)
    assert (item.size, item.channels, item.meta["rate"]) == ((9000,), 2, 16000)
    np.testing.assert_array_equal(whole, soundfile.read(path, dtype="float32")[0])


def test_a_spectrogram_shows_a_tone_where_it_is(tmp_path: Path) -> None:
    rate, bands = 16000, 40
    time = np.arange(rate) / rate
    tone = np.where(time < 0.5, np.sin(2 * np.pi * 1000 * time), 0.0)
    path = sound(tmp_path / "a.wav", np.stack([tone, np.zeros(rate)], axis=1) * 0.5)
    item = open_item(path, Context(spectrogram=bands))
    whole = item.read()
    assert whole.shape == (bands, 98, 2)  # 1 + (16000 - 400) // 160 frames
    centres = 700 * (10 ** (np.linspace(0, np.log10(1 + rate / 2 / 700), bands + 2)) - 1)[1:-1]
    assert whole[:, 20, 0].argmax() == np.abs(centres - 1000).argmin()
    assert whole[:, 60:, 0].max() == whole[..., 1].max() == pytest.approx(np.log(1e-10))
    assert item.meta["spacing"] == (1, 0.01)
    np.testing.assert_allclose(item.read(((5, 20), (30, 11))), whole[5:25, 30:41], atol=1e-4)
    short = sound(tmp_path / "b.wav", np.zeros((100, 1)))
    assert open_item(short, Context(spectrogram=bands)).read().shape == (bands, 1, 1)


def test_the_shared_recordings(shared_data: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    source = open_splits(str(shared_data / "fsdd"))["train"]
    assert len(source) == 1500
    item = source.open(0)
    assert item.meta["rate"] == 8000
    np.testing.assert_array_equal(item.read()[:, 0], soundfile.read(source.name(0), dtype="float32")[0])


# Video


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mjpeg"), ("mpg", "mpeg2video")]
)
def test_a_clip(tmp_path: Path, suffix: str, codec: str) -> None:
    av = pytest.importorskip("av")
    path = clip(tmp_path / f"a.{suffix}", 40, codec)
    item, whole = check_parts(path)
    assert item.size == (40, 48, 64)
    assert item.meta["fps"] == pytest.approx(25)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(whole, np.stack(frames))


def test_a_gif_is_a_clip_where_the_model_takes_three_axes(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(np.full((8, 12, 3), 60 * i, np.uint8)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    clip(tmp_path / "b.mp4", 6, "mpeg4")
    source = open_splits(str(tmp_path))["train"]
    assert [source.open(i).size for i in range(2)] == [(4, 8, 12), (6, 48, 64)]
    assert source.read(0)[:, 0, 0, 0].tolist() == [0, 60, 120, 180]


def test_the_shared_clips(shared_data: Path) -> None:
    pytest.importorskip("av")
    source = open_splits(str(shared_data / "lung-ultrasound"))["train"]
    assert len(source) == 45
    named = {Path(source.name(i)).name: i for i in range(45)}
    for name in ("regular_036.mpeg", "viral_004.mp4", "pneumonia_025.avi"):
        check_parts(Path(source.name(named[name])))


# What they share


def test_of_mixed_files_those_that_fit_the_model_are_read(tmp_path: Path, write_pictures: Callable[..., Any]) -> None:
    write_pictures("a.png", "b.png", "c.png")
    clip(tmp_path / "d.mp4", 6, "mpeg4")
    sound(tmp_path / "e.wav", np.zeros((500, 1)))
    for dims, count, left in ((None, 3, "1 .mp4, 1 .wav"), (2, 3, "1 .mp4, 1 .wav"), (3, 1, "3 .png, 1 .wav")):
        source = open_splits(str(tmp_path), Context(spatial_dims=dims))["train"]
        assert len(source) == count
        assert any(f"{left} not used" in remark for remark in source.remarks)


FIRST_BYTES = {
    "jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "dicom": b"\0" * 128 + b"DICM",
    "nifti.gz": gzip.compress(b"x"),
    "audio": b"fLaC",
    "video": b"\0\0\0 ftypisom",
}


@pytest.mark.parametrize("name", FIRST_BYTES)
def test_without_the_library_the_extra_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, content = FORMATS[name], FIRST_BYTES[name]
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    (tmp_path / f"a{'' if name == 'dicom' else form.suffixes[0]}").write_bytes(content)
    for read in (lambda: open_splits(str(tmp_path)), lambda: open_item(content, Context())):
        with pytest.raises(DataError) as caught:
            read()
        assert f"pip install '{form.needs[1]}'" in str(caught.value)


def test_limits_hold_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        scene(tmp_path / "a.tif", VALUES[None]),
        slice_file(tmp_path / "b.dcm", VALUES),
        volume(tmp_path / "c.nii.gz", VALUES[..., None]),
        sound(tmp_path / "d.wav", np.zeros((1200, 1))),
        clip(tmp_path / "e.mp4", 4, "mpeg4"),
    ]
    monkeypatch.setattr(FileItem, "_take", None)
    for path in paths:
        with pytest.raises(DataError, match="raise data.max_megapixels") as caught:
            open_item(path, Context(max_megapixels=0.001)).read()
        assert "\n" not in str(caught.value)


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    paths = [
        scene(tmp_path / "a.tif", VALUES[None]),
        slice_file(tmp_path / "b.dcm", VALUES),
        volume(tmp_path / "c.nii.gz", RNG.normal(size=(9, 9, 9)).astype(np.float32)),
        volume(tmp_path / "d.nii", RNG.normal(size=(9, 9, 9)).astype(np.float32)),
        sound(tmp_path / "e.wav", RNG.normal(size=(1200, 1))),
        sound(tmp_path / "f.flac", RNG.normal(size=(1200, 1)) * 0.1),
        clip(tmp_path / "g.mp4", 4, "mpeg4"),
    ]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        for content in (path, path.read_bytes()):
            with pytest.raises(DataError) as caught:
                open_item(content, Context(), lambda path=path: path.name).read()
            assert str(caught.value).isprintable()


def write_tiles(folder: Path) -> str:
    for i in range(6):
        scene(folder / f"{i}.tif", RNG.integers(0, 3000, (5, 16, 16)).astype(np.uint16))
    return "[16, 16]"


def write_slices(folder: Path) -> str:
    for i in range(6):
        slice_file(folder / f"IM{i}", RNG.integers(0, 4096, (16, 16)).astype(np.uint16), RescaleIntercept=-1024)
    return "[16, 16]"


def write_volumes(folder: Path) -> str:
    for i in range(6):
        volume(folder / f"{i}.nii.gz", RNG.normal(size=(8, 8, 8 + i)).astype(np.float32))
    return "[8, 8, 8]"


def write_series(folder: Path) -> str:
    for i in range(6):
        (folder / str(i)).mkdir()
        series(folder / str(i), 8, f"1.2.{i}")
    return "[8, 8, 8]"


def write_sounds(folder: Path) -> str:
    for i in range(6):
        sound(folder / f"{i}.wav", RNG.normal(size=(300 + 10 * i, 2)) * 0.1)
    return "[128]"


def write_clips(folder: Path) -> str:
    for i in range(6):
        clip(folder / f"{i}.mp4", 10 + i, "mpeg4")
    return "[8, 16, 16]"


@pytest.mark.parametrize("write", [write_tiles, write_slices, write_volumes, write_series, write_sounds, write_clips])
def test_pretraining(tmp_path: Path, write: Callable[[Path], str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    size = write(folder)
    patch = json.dumps([8 if len(json.loads(size)) == 1 else 4] * len(json.loads(size)))
    tiny = ["embed_dim=16", "depth=1", "num_heads=2", "decoder_embed_dim=16", "decoder_depth=1", "decoder_num_heads=2"]
    words = ["--recipe", "digits", "--data", str(folder), "--model.input_size", size, "--model.patch_size", patch]
    words += [f"--model.{setting}" for setting in tiny]
    words += ["--epochs=1", "--batch=4", "--progress=none", "--data.num_workers=1", "--data.cache=none"]
    assert main(["pretrain", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0, capsys.readouterr()
    assert main(["data", "inspect", str(folder)]) == 0
