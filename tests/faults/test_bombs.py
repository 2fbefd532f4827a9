"""Small files that would unpack to more than there is: what bounds each of them (the limits in SECURITY.md)."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchmae.data import formats, shards, tables
from torchmae.data.arrays import npz_splits
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.shards import ShardSource, build_index, write_index
from torchmae.data.tables import ParquetSource
from torchmae.errors import DataError

MIB = 2**20
ZEROS = np.zeros((64 * MIB,), dtype=np.uint8)  # deflated to a thousandth


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path, png: bytes) -> Path:
    (tmp_path / "0.png").write_bytes(png)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "0.png", "0.png")
    return tmp_path / "x.tar"


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails where more than 16 MiB are taken at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_npz_that_unpacks_to_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=ZEROS.reshape(64, 1024, 1024), ignored=ZEROS)
    assert path.stat().st_size < MIB
    with little_memory(), pytest.raises(DataError) as caught:
        npz_splits(path, Context(), max_bytes=32 * MIB)
    assert str(caught.value) == (
        f"{path} unpacks to 0.1 GiB and there are 0.0 GiB of memory; "
        "save its images as .npy, of which only what is needed is read"
    )


def test_npz_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.ones((3, 8, 8), dtype=np.uint8), ignored=ZEROS)
    assert len(npz_splits(path, Context(), max_bytes=MIB)["train"]) == 3  # what is passed over does not count
    assert len(open_splits(str(path))["train"]) == 3


def test_npz_that_lies_about_what_it_holds(tmp_path: Path) -> None:
    """The header of the array promises a petabyte, the archive has 64 bytes of it."""
    array = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 100_000, 10_000)}
    np.lib.format.write_array_header_1_0(array, header)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", array.getvalue() + bytes(64))
    with pytest.raises(DataError, match="cannot read .*x.npz: (its header is damaged|EOF)"):
        npz_splits(tmp_path / "x.npz", Context())


@pytest.mark.parametrize("name", ["ends", "names", "offsets"])
def test_an_index_larger_than_its_shard_is_not_unpacked(shard: Path, name: str) -> None:
    size = shard.stat().st_size
    index = shard.with_name(f"{shard.name}{shards.INDEX_SUFFIX}")
    write_index(index, build_index(shard, size), size)
    with np.load(index) as arrays:
        whole = {**arrays, name: ZEROS.view(np.int64)}
    np.savez_compressed(index, **whole)
    with little_memory():
        assert ShardSource([shard]).name(0) == "x.tar/0.png"


def test_a_file_that_is_too_large(tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.png").write_bytes(png)
    source = open_splits(str(tmp_path))["train"]
    assert source.read(0).shape == (20, 20, 3)
    monkeypatch.setattr(formats, "MAX_BYTES", len(png) - 1)
    with pytest.raises(DataError, match="0.png: the file has more than"):
        source.read(0)


def test_a_member_of_a_shard_that_is_too_large(shard: Path, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_BYTES", len(png) - 1)
    with pytest.raises(DataError, match="0.png: the file has more than"):
        ShardSource([shard]).read(0)


def test_a_compressed_shard_is_not_unpacked(tmp_path: Path, shard: Path) -> None:
    with tarfile.open(tmp_path / "y.tar", "w:gz") as archive:
        archive.add(shard, "0.png")
    with pytest.raises(DataError, match="y.tar is no uncompressed tar file"):
        ShardSource([tmp_path / "y.tar"])


def test_a_row_of_a_table_that_is_too_large(tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table.write_table(arrow.table({"image": [png]}), tmp_path / "x.parquet")
    monkeypatch.setattr(formats, "MAX_BYTES", len(png) - 1)
    with pytest.raises(DataError, match="x.parquet/0: the file has more than"):
        ParquetSource([tmp_path / "x.parquet"]).read(0)


def test_a_value_that_a_table_repeats_fills_no_memory(
    tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a file says of itself that it holds the value once."""
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "IN_MEMORY", 100 * len(png))
    table.write_table(arrow.table({"image": [png] * 1000}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10 * len(png)
    source = ParquetSource([tmp_path / "x.parquet"])
    (unpacked,) = (tmp_path / "cache" / "parquet").glob("*.bin")
    assert unpacked.stat().st_size == 1000 * len(png)
    assert np.array_equal(source.read(0), source.read(999))


def test_pixels_that_a_header_promises(tmp_path: Path) -> None:
    """A picture of one colour: a hundred million pixels and more in a few kilobytes."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < MIB
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    source = open_splits(str(tmp_path))["train"]
    with pytest.raises(DataError, match="20000 x 20000 is more than 100,000,000 pixels; raise data.max_"):
        source.read(0)
