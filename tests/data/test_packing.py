from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, picture
from PIL import Image

from torchmae.config import PackOptions
from torchmae.data import packing
from torchmae.data.arrays import ArraySource
from torchmae.data.items import Context
from torchmae.data.layouts import folder_splits, open_splits
from torchmae.data.packing import encode, pack, reduce
from torchmae.errors import ConfigError, DataError

FORMATS = ("parquet", "wds", "npy")


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("pyarrow")


@pytest.fixture
def folder(write_pictures, tmp_path: Path) -> Path:
    write_pictures(*(f"in/train/{'ant' if i % 2 else 'bee'}/{i:02d}.bmp" for i in range(20)))
    write_pictures(*(f"in/val/ant/{i}.bmp" for i in range(3)))
    return tmp_path / "in"


@pytest.mark.parametrize("form", FORMATS)
def test_packed_images_are_the_same_in_the_same_order(folder: Path, tmp_path: Path, form: str) -> None:
    splits, seen = folder_splits(folder), []
    packed = pack(
        splits, tmp_path / "out", PackOptions(format=form), lambda what, done, total: seen.append((done, total))
    )
    assert (packed.images, packed.resumed, packed.bad) == (23, 0, [])
    assert seen == [(i + 1, 23) for i in range(23)]
    again = open_splits(str(tmp_path / "out"))
    assert {split: len(source) for split, source in again.items()} == {"train": 20, "val": 3}
    for split, source in splits.items():
        for i in range(len(source)):
            np.testing.assert_array_equal(again[split].read(i), source.read(i))
        assert again[split].labels.tolist() == source.labels.tolist()
        assert again[split].classes == ("ant", "bee")
    if form != "npy":
        assert again["train"].encoded(5) == splits["train"].encoded(5)  # byte for byte
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize("form", FORMATS)
def test_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, form: str) -> None:
    splits, out, whole, options = folder_splits(folder), tmp_path / "out", tmp_path / "whole", in_fives(form)
    pack(splits, whole, options)

    def stop(what: str, done: int, total: int) -> None:
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(splits, out, options, stop)
    packed = pack(splits, out, options)
    assert packed.resumed == 10  # two parts of five
    assert pack(splits, out, options).resumed == 23
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".npz"} == {
        file.name: file.read_bytes() for file in whole.iterdir() if file.suffix != ".npz"
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("form", FORMATS)
def test_goes_on_after_it_was_killed(folder: Path, tmp_path: Path, form: str, number: int) -> None:
    splits, out, whole, options = folder_splits(folder), tmp_path / "out", tmp_path / "whole", in_fives(form)
    pack(splits, whole, options)

    def die(what: str, done: int, total: int) -> None:
        if done == 14:
            os.kill(os.getpid(), number)

    process = multiprocessing.get_context("fork").Process(target=pack, args=(splits, out, options, die))
    process.start()
    process.join()
    assert process.exitcode == -number
    (out / "pack.json.1.partial").write_text("{")  # as it is when the end comes while the manifest is written
    assert json.loads((out / "pack.json").read_text())["complete"] is False
    again = pack(splits, out, options)
    assert (again.images, again.resumed) == (23, 10)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".npz"} == {
        file.name: file.read_bytes() for file in whole.iterdir() if file.suffix != ".npz"
    }


def in_fives(form: str) -> PackOptions:
    """Options that close a part after five pictures of 12 x 16, whose files and values have 600 bytes or so each."""
    options = PackOptions(format=form)
    object.__setattr__(options, "shard_mib", 5 * 12 * 16 * 3 / 2**20)  # less than is allowed
    return options


def test_the_name_is_given_last(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array whose parts are all whole, but which was not renamed, is renamed when packing goes on."""
    splits, out = folder_splits(folder), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(packing.WRITERS["npy"], "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(splits, out, PackOptions(format="npy"))
    assert pack(splits, out, PackOptions(format="npy")).resumed == 20
    assert len(open_splits(str(out))["train"]) == 20


def test_a_file_that_does_not_hold_what_was_written_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = packing.WRITERS["wds"]
    read = writer.read
    monkeypatch.setattr(writer, "read", lambda self: ((raw[:-1] + b"?", n) for raw, n in read(self)))
    with pytest.raises(DataError, match="train-000000.tar does not hold what was written; check the disk"):
        pack(folder_splits(folder), tmp_path / "out", PackOptions(format="wds"))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_unreadable_images_are_left_out_up_to_a_limit(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "ant" / "03.bmp").write_bytes(b"no image")
    splits = folder_splits(folder)
    with pytest.raises(DataError, match=r"1 of 23 .* cannot be read, and max_bad is 0; .* raise max_bad$"):
        pack(splits, tmp_path / "none", PackOptions(max_bad=0))
    packed = pack(splits, tmp_path / "out", PackOptions(max_bad=0.1))
    assert packed.images == 22
    ((name, reason),) = packed.bad
    assert name.endswith("03.bmp")
    assert "not an image" in reason
    manifest = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert manifest["bad"] == [[name, reason]]
    assert manifest["complete"] is True


def test_max_size(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(picture(90, 120)).save(folder / "a.jpg", quality=90)
    Image.fromarray(picture(40, 30)).save(folder / "b.jpg", quality=90)
    Image.fromarray(picture(120, 90)).save(folder / "c.png")
    pack(folder_splits(folder), tmp_path / "out", PackOptions(format="wds", max_size=60))
    packed = open_splits(str(tmp_path / "out"))["train"]
    assert [packed.read(i).shape for i in range(3)] == [(45, 60, 3), (40, 30, 3), (60, 45, 3)]
    assert [packed.name(i)[-3:] for i in range(3)] == ["jpg", "jpg", "png"]
    assert packed.encoded(1) == (folder / "b.jpg").read_bytes()
    reduced = np.asarray(Image.fromarray(picture(120, 90)).resize((45, 60), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(packed.read(2), reduced)


def test_folders_that_hold_something_else(folder: Path, tmp_path: Path) -> None:
    splits, out = folder_splits(folder), tmp_path / "out"
    with pytest.raises(ConfigError, match="in exists and is not an empty folder; choose another"):
        pack(splits, folder, PackOptions())
    pack(splits, out, PackOptions())
    with pytest.raises(ConfigError, match="was packed from other data or options"):
        pack(splits, out, PackOptions(max_size=10))
    (out / "pack.json").write_text("{")
    with pytest.raises(DataError, match="pack.json is damaged"):
        pack(splits, out, PackOptions())


def test_images_that_do_not_fit_the_format(write_pictures, tmp_path: Path) -> None:
    write_pictures("in/a.png")
    write_pictures("in/b.png", size=(5, 5))
    with pytest.raises(ConfigError, match=r"one array cannot hold them: 12x16x3 uint8 before, .*b.png is 5x5x3"):
        pack(folder_splits(tmp_path / "in"), tmp_path / "out", PackOptions(format="npy"))
    spectra = {"train": ArraySource(np.zeros((3, 4, 4, 5), np.uint8), context=Context(axes="HWC"))}
    pack(spectra, tmp_path / "wds", PackOptions(format="wds"))
    assert open_splits(str(tmp_path / "wds"))["train"].read(2).shape == (4, 4, 5)
    pack(spectra, tmp_path / "npy", PackOptions(format="npy"))
    assert open_splits(str(tmp_path / "npy"), Context(axes="HWC"))["train"].read(2).shape == (4, 4, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_lossless_files(dtype: type, tmp_path: Path) -> None:
    images = (np.random.default_rng(0).random((3, 6, 5, 1)) * 200).astype(dtype)
    pack({"train": ArraySource(images)}, tmp_path / "out", PackOptions(format="wds"))
    packed = open_splits(str(tmp_path / "out"))["train"]
    np.testing.assert_array_equal(packed.read(2), images[2])
    assert packed.read(2).dtype == dtype


def test_reducing_keeps_the_type() -> None:
    image = np.full((10, 20, 2), 40000, np.uint16)
    assert (reduce(image, 5) == 40000).all()
    assert (reduce(image, 5).dtype, reduce(image, 5).shape) == (np.uint16, (2, 5, 2))
    assert reduce(np.ones((10, 20, 1), np.float32), 40).shape == (20, 40, 1)
    with pytest.raises(ConfigError, match="images with 3 dimensions cannot be reduced"):
        reduce(np.zeros((4, 4, 4, 1), np.uint8), 2)
    assert (
        len(encode(picture(64, 64), 50))
        < len(encode(picture(64, 64), 95))
        < len(encoded(Image.fromarray(picture(64, 64))))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, "format is 'zip'"),
        ({"max_size": 0}, "max_size is 0; it must be 8 or more"),
        ({"quality": 101}, "quality is 101"),
        ({"max_bad": 2.0}, "max_bad is 2"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackOptions(**options)


@pytest.mark.parametrize(("form", "gone"), [("wds", "train-000000.tar"), ("parquet", "train-000000.parquet")])
def test_what_was_packed_and_is_gone_or_changed_is_noticed(folder: Path, tmp_path: Path, form: str, gone: str) -> None:
    out, splits = tmp_path / "packed", open_splits(str(folder))
    pack(splits, out, PackOptions(format=form))
    assert pack(splits, out, PackOptions(format=form)).resumed == sum(map(len, splits.values()))
    (out / gone).write_bytes(b"xx")
    with pytest.raises(DataError, match=rf"{gone} has 2 bytes and had .*; remove the folder, and pack again"):
        pack(splits, out, PackOptions(format=form))
    (out / gone).unlink()
    with pytest.raises(DataError, match=rf"{gone} is gone, though it was packed before"):
        pack(splits, out, PackOptions(format=form))


@pytest.mark.parametrize("gone", ["train_images.npy", "train_labels.npy"])
def test_an_array_that_is_gone_is_noticed(tmp_path: Path, gone: str) -> None:
    splits = {"train": ArraySource(np.zeros((6, 4, 4, 1), dtype=np.uint8), np.arange(6))}
    pack(splits, tmp_path / "packed", PackOptions(format="npy"))
    (tmp_path / "packed" / gone).unlink()
    with pytest.raises(DataError, match=f"{gone} is gone"):
        pack(splits, tmp_path / "packed", PackOptions(format="npy"))


def test_one_process_packs_into_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(path: Path) -> None:
        raise BlockingIOError

    monkeypatch.setattr("torchmae.files.lock_file", taken)
    with pytest.raises(ConfigError, match="^another process is packing into .*packed; wait for it"):
        pack(open_splits(str(folder)), tmp_path / "packed", PackOptions())


@pytest.mark.parametrize("form", ["wds", "npy"])
def test_a_class_of_two_lines_needs_parquet(tmp_path: Path, form: str) -> None:
    splits = {"train": ArraySource(np.zeros((6, 4, 4, 1), dtype=np.uint8), np.arange(6) % 2, ["a", "b\nc"])}
    with pytest.raises(ConfigError, match=r"class 'b\\nc' has a line end in its name; .*the format parquet"):
        pack(splits, tmp_path / "packed", PackOptions(format=form))
    assert not (tmp_path / "packed").exists()
    pack(splits, tmp_path / "packed", PackOptions())
    assert open_splits(str(tmp_path / "packed"))["train"].classes == ("a", "b\nc")


def test_what_does_not_fit_leaves_nothing_behind(write_pictures, tmp_path: Path) -> None:
    write_pictures("p/a.png", size=(8, 8))
    write_pictures("p/b.png", size=(8, 9))
    splits = open_splits(str(tmp_path / "p"))
    with pytest.raises(ConfigError, match="choose the format parquet or wds"):
        pack(splits, tmp_path / "packed", PackOptions(format="npy"))
    assert not (tmp_path / "packed").exists()
    assert pack(splits, tmp_path / "packed", PackOptions(format="wds")).images == 2


@pytest.mark.parametrize("change", ["labels", "content"])
def test_data_that_changed_is_no_reason_to_go_on(folder: Path, tmp_path: Path, change: str) -> None:
    """Labels that were mended, and a file replaced by one of the same size, whose names and sizes are as before."""
    pack(folder_splits(folder), tmp_path / "out", PackOptions("parquet"))
    assert pack(folder_splits(folder), tmp_path / "out", PackOptions("parquet")).resumed == 23
    splits = folder_splits(folder)
    if change == "labels":
        splits["train"].labels = 1 - splits["train"].labels
    else:
        path = folder / "val" / "ant" / "1.bmp"
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ConfigError, match="was packed from other data"):
        pack(splits, tmp_path / "out", PackOptions("parquet"))


@pytest.mark.parametrize("form", FORMATS)
def test_packed_files_that_changed_are_noticed_when_packed_again(folder: Path, tmp_path: Path, form: str) -> None:
    """Tables, shards and arrays too, replaced by others of the same names, sizes and labels."""
    pack({"train": folder_splits(folder)["train"]}, tmp_path / "one", PackOptions(form))
    pack(open_splits(str(tmp_path / "one")), tmp_path / "two", PackOptions(form))
    for path in (tmp_path / "one").iterdir():
        os.utime(path, (1, 1))
    with pytest.raises(ConfigError, match="was packed from other data"):
        pack(open_splits(str(tmp_path / "one")), tmp_path / "two", PackOptions(form))


def test_groups_are_not_lost_in_silence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="group"):
        pack(open_splits(str(folder)), tmp_path / "out", PackOptions(group="(.)"))
    assert not (tmp_path / "out").exists()
