"""Tables, tar shards and their indexes, and lists of files with damage."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from damage import FUZZ, damaged, reads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from torchmae.data.layouts import open_splits
from torchmae.data.reading import first_readable
from torchmae.data.remote import cache_folder
from torchmae.data.shards import INDEX_SUFFIX, build_index, write_index
from torchmae.errors import TorchmaeError


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read_all(path: Path) -> None:
    """Opens a data set and reads it as a run does: past images that cannot be read."""
    for source in open_splits(str(path)).values():
        source.fingerprint()
        for index in range(min(len(source), 4)):
            bad: list[tuple[str, str]] = []
            try:
                first_readable(source, index, bad, source.read)
            finally:
                assert all(name.isprintable() for name, _ in bad)


# Parquet


def table(folder: Path, **columns: object) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), folder / "made.parquet", compression="snappy")
    return (folder / "made.parquet").read_bytes()


def test_parquet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    images = [{"bytes": png(i), "path": "../../../etc/passwd"} for i in range(4)]
    valid = table(tmp_path_factory.mktemp("table"), image=images, label=[0, 1, None, 3])

    @FUZZ
    @given(damaged(valid))
    def check(raw: bytes) -> None:
        (folder / "x.parquet").write_bytes(raw)
        reads_or_refuses(lambda: read_all(folder / "x.parquet"))

    check()
    assert [path.name for path in folder.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [{"bytes": 1}] * 3},
        {"image": [{"bytes": "text"}] * 3},
        {"image": [{"bytes": [b"1"]}] * 3},
        {"a.b": [png(0)] * 3},
        {"image": [png(0)] * 3, "label": np.full(3, 2**64 - 1, np.uint64)},
        {"image": [png(0)] * 3, "\x1b[2J": [1] * 3},
    ],
    ids=["number", "text", "list", "dot", "label", "name"],
)
def test_columns_of_other_types(folder: Path, columns: dict[str, object]) -> None:
    table(folder, **columns)
    reads_or_refuses(lambda: read_all(folder / "made.parquet"))


# Tar shards


def shard() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (
            *((f"{i:04d}.png", png(i)) for i in range(2)),
            ("0001.cls", b"7"),
            ("long" * 40 + "ü.png", png(2)),
            ("../../outside.png", png(3)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()[: -tarfile.BLOCKSIZE]  # most of what stands behind the end is padding


SHARD = shard()
HEADERS = [at for at in range(0, len(SHARD), tarfile.BLOCKSIZE) if SHARD[at + 257 : at + 262] == b"ustar"]
# Where a header's numbers, its type and its names are.
FIELDS = [(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
NUMBERS = [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 10 + b"\x7f", b"77777777777\0", b"-1\0", b"8" * 12]


def with_field(header: int, field: tuple[int, int], value: bytes) -> bytes:
    """The shard with one field of a header replaced and the header's checksum set right."""
    block = bytearray(SHARD[header : header + tarfile.BLOCKSIZE])
    start, length = field
    block[start : start + length] = value[:length].ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return SHARD[:header] + bytes(block) + SHARD[header + tarfile.BLOCKSIZE :]


SHARDS = st.one_of(
    damaged(SHARD),
    st.builds(
        with_field,
        st.sampled_from(HEADERS),
        st.sampled_from(FIELDS),
        st.one_of(st.sampled_from(NUMBERS), st.binary(min_size=1, max_size=12), st.sampled_from([b"x", b"S", b"L"])),
    ),
)


def test_shards(folder: Path) -> None:
    @FUZZ
    @given(SHARDS)
    def check(raw: bytes) -> None:
        (folder / "x.tar").write_bytes(raw)
        shutil.rmtree(cache_folder(), ignore_errors=True)
        reads_or_refuses(lambda: read_all(folder / "x.tar"))

    check()
    assert [path.name for path in folder.iterdir()] == ["x.tar"]


def test_a_member_of_negative_size_comes_once(folder: Path) -> None:
    (folder / "x.tar").write_bytes(with_field(HEADERS[0], (124, 12), b"\xff" * 10 + b"\xfc\x00"))
    with pytest.raises(TorchmaeError, match="no uncompressed tar file|is damaged at byte 0"):
        read_all(folder / "x.tar")


def test_indexes(folder: Path) -> None:
    path, beside = folder / "x.tar", folder / f"x.tar{INDEX_SUFFIX}"
    path.write_bytes(SHARD)
    write_index(beside, build_index(path, len(SHARD)), len(SHARD))
    expected = open_splits(str(path))["train"].fingerprint()

    @FUZZ
    @given(damaged(beside.read_bytes()))
    def check(raw: bytes) -> None:
        beside.write_bytes(raw)
        shutil.rmtree(cache_folder(), ignore_errors=True)
        source = open_splits(str(path))["train"]  # a damaged index is made anew
        assert len(source) == 4
        assert [len(source.read(index)) for index in range(4)] == [8] * 4
        assert source.fingerprint() == expected

    check()
    assert sorted(path.name for path in folder.iterdir()) == ["x.tar", f"x.tar{INDEX_SUFFIX}"]


# Lists


LISTS = {
    "x.csv": b'path,label,split\r\n0.png,cat,train\r\n1.png,dog,train\r\n"a,""b.png",,val\r\n',
    "x.tsv": b"0.png\t3\n1.png\t0\n",
    "x.txt": "0.png\n1.png\n\nü.png\n".encode(),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(folder: Path, name: str) -> None:
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    os.mkfifo(folder / "pipe.png")

    @FUZZ
    @given(st.one_of(damaged(LISTS[name]), st.just(LISTS[name].replace(b"1.png", b"pipe.png"))))
    def check(raw: bytes) -> None:
        (folder / name).write_bytes(raw)
        reads_or_refuses(lambda: read_all(folder / name))

    check()
    assert sorted(path.name for path in folder.iterdir()) == sorted(["0.png", "1.png", "pipe.png", name])
