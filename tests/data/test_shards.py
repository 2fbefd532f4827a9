from __future__ import annotations

import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from picture_files import picture
from tar_files import png, samples, write_tar

from torchmae.data import formats, shards
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.shards import ShardSource, build_index, open_index, write_index
from torchmae.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_webdataset_shards(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"train-{i}.tar", samples(4, start=4 * i))
    write_tar(tmp_path / "val-0.tar", samples(2, start=12))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    splits = open_splits(str(tmp_path))
    assert {split: len(item) for split, item in splits.items()} == {"train": 12, "val": 2}
    train = splits["train"]
    assert train.labels.tolist() == [i % 3 for i in range(12)]
    assert train.classes == ("ant", "bee", "cat")
    assert [train.name(i) for i in (0, 11)] == ["train-0.tar/0000.png", "train-2.tar/0011.png"]
    for index in (11, 0, 7):
        np.testing.assert_array_equal(train.read(index), picture(seed=index))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(train)).read(index), picture(seed=index))
    assert train.with_channels(1).read(5).shape == (12, 16, 1)
    by_pattern = open_splits(f"{tmp_path}/train-{{2..1}}.tar")["train"]
    assert [by_pattern.name(i) for i in (0, 7)] == ["train-1.tar/0004.png", "train-2.tar/0011.png"]  # sorted


def test_other_members_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {
            "._a.png": b"mac",
            "../../up.png": png(0),
            "a" * 150 + ".JPG": png(1),
            "b.txt": b"",
        }.items():
            (tmp_path / "member").write_bytes(content)
            archive.add(tmp_path / "member", name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = ShardSource([tmp_path / "x.tar"])
    assert source.labels is None
    assert [source.name(i) for i in range(len(source))] == ["x.tar/../../up.png", f"x.tar/{'a' * 150}.JPG"]
    np.testing.assert_array_equal(source.read(1), picture(seed=1))


def test_libraries_are_looked_for_once_and_not_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(formats, "find_spec", lambda name: searched.append(name) or True)
    searches = []
    for count in (3, 40):
        photographs, tars = tmp_path / f"photographs-{count}", tmp_path / f"tars-{count}"
        for folder in (photographs, tars):
            folder.mkdir()
        write_tar(tars / "a.tar", samples(count))
        for i in range(count):
            (photographs / f"{i}.png").write_bytes(png(i))
        (photographs / "a clip.avi").write_bytes(b"RIFF")  # beside it, the files of each kind are counted
        for folder in (photographs, tars):
            assert len(open_splits(str(folder))["train"]) == count
            searches.append(len(searched))
            searched.clear()
    assert searches[:2] == searches[2:]


def test_labels_lie_anywhere_in_the_shard(tmp_path: Path) -> None:
    """Packed by kind of file, or with dots in the names; text is no label."""
    pictures = {f"{i:02d}.png": png(i) for i in range(3)}
    write_tar(tmp_path / "a.tar", pictures | {f"{i:02d}.cls": str(i).encode() for i in range(3)})
    assert ShardSource([tmp_path / "a.tar"]).labels.tolist() == [0, 1, 2]
    write_tar(
        tmp_path / "b.tar",
        {f"scan.{i}.{kind}": data for i in range(3) for kind, data in (("png", png(i)), ("cls", b"%d" % i))},
    )
    assert ShardSource([tmp_path / "b.tar"]).labels.tolist() == [0, 1, 2]
    write_tar(tmp_path / "c.tar", pictures | {"00.cls": b"cat", "01.cls": b"-1", "02.cls": b"5"})
    assert build_index(tmp_path / "c.tar", (tmp_path / "c.tar").stat().st_size).labels.tolist() == [-2, -1, 5]


def test_several_pictures_in_a_sample_need_a_choice(tmp_path: Path) -> None:
    members = {f"{i:02d}.{part}": png(10 * i + j) for i in range(3) for j, part in enumerate(("png", "seg.PNG"))}
    write_tar(tmp_path / "x.tar", members | {f"{i:02d}.cls": str(i).encode() for i in range(3)})
    with pytest.raises(DataError, match=r"3 samples of x.tar have several pictures: 00 has png, seg.png") as caught:
        ShardSource([tmp_path / "x.tar"])
    assert caught.value.fix == "choose one with --data.member png, or --data.member all"
    masks = ShardSource([tmp_path / "x.tar"], Context(member="seg.png"))
    assert masks.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(masks.read(2), picture(seed=21))
    assert len(ShardSource([tmp_path / "x.tar"], Context(member="all"))) == 6
    with pytest.raises(DataError, match=r"no sample of x.tar has a picture 'jpg'; choose from png, seg.png"):
        ShardSource([tmp_path / "x.tar"], Context(member="jpg"))
    (tmp_path / "again.png").write_bytes(png(5))
    with tarfile.open(tmp_path / "x.tar", "a") as archive:  # a second picture of that name
        archive.add(tmp_path / "again.png", "01.png")
    with pytest.raises(DataError, match=r"1 samples of x.tar have several pictures: 01 has png, seg.png, png"):
        ShardSource([tmp_path / "x.tar"], Context(member="png"))


def test_names_cannot_forge_lines(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a\n\x1b[31mb.png": b"no image"})
    source = ShardSource([tmp_path / "x.tar"])
    assert source.name(0) == "x.tar/a\\n\\x1b[31mb.png"
    with pytest.raises(DataError, match=r"^x.tar/a\\n\\x1b\[31mb.png: not an image"):
        source.read(0)


def test_the_index_is_made_once_and_anew_when_the_tar_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, samples(3))
    first = ShardSource([path])
    scan = shards._scan
    scanned: list[str] = []
    monkeypatch.setattr(shards, "_scan", lambda file, size, name: scanned.append(name) or scan(file, size, name))
    again = ShardSource([path])
    assert scanned == []
    assert again.fingerprint() == first.fingerprint()
    write_tar(path, samples(3, start=3))
    os.utime(path, (1, 1))
    changed = ShardSource([path])
    assert scanned == [str(path)]
    np.testing.assert_array_equal(changed.read(0), picture(seed=3))
    for damaged in (cache / "index").iterdir():
        damaged.write_bytes(damaged.read_bytes()[:100])
    assert ShardSource([path]).labels.tolist() == [0, 1, 2]
    assert len(scanned) == 2


def test_an_index_beside_the_shard_is_used_if_it_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, beside = tmp_path / "x.tar", tmp_path / "x.tar.index.npz"
    write_tar(path, samples(3))
    size = path.stat().st_size
    index = build_index(path, size)
    write_index(beside, index, size)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "build_index", lambda shard, size: pytest.fail("made anew"))
        assert list(open_index(path, size, "1").names) == list(index.names)
    wrong = replace(index, offsets=index.offsets - 512)
    write_index(beside, wrong, size)
    assert open_index(path, size, "2").offsets.tolist() == index.offsets.tolist()
    write_index(beside, replace(index, offsets=index.offsets + size), size)
    assert open_index(path, size, "3").offsets.tolist() == index.offsets.tolist()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "is no uncompressed tar file"),
        (lambda raw: b"rubbish" * 1000, "is no uncompressed tar file"),
        (lambda raw: raw[:1300], "is cut short in 0000.png|is no uncompressed tar file"),
        (lambda raw: raw[:1536] + b"\xff" * 512 + raw[2048:], "is damaged at byte"),
    ],
)
def test_damaged_tars(tmp_path: Path, damage, message: str) -> None:
    write_tar(tmp_path / "x.tar", {f"{i:04d}.png": bytes([i]) * 900 for i in range(4)})
    (tmp_path / "x.tar").write_bytes(damage((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(DataError, match=message):
        ShardSource([tmp_path / "x.tar"])


def test_tars_that_cannot_be_used(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(2), "w:gz")
    with pytest.raises(DataError, match="is no uncompressed tar file .*; unpack it if it is compressed"):
        open_splits(str(tmp_path / "x.tar"))
    write_tar(tmp_path / "y.tar", {"a.txt": b"text"})
    with pytest.raises(DataError, match=r"y.tar holds no images; accepted are .jpg"):
        open_splits(str(tmp_path / "y.tar"))


def test_a_shard_that_vanished_is_an_unreadable_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(2))
    source = ShardSource([tmp_path / "x.tar"])
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DataError, match=r"^x.tar/0001.png: No such file or directory"):
        source.read(1)
