from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_files import picture, rows_of, write_parquet

from torchmae.data import tables
from torchmae.data.items import Context
from torchmae.data.tables import ParquetSource
from torchmae.errors import ConfigError, DataError


def test_parquet_in_the_datasets_schema(tmp_path: Path) -> None:
    metadata = b'{"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}'
    write_parquet(tmp_path / "a.parquet", rows_of(4), metadata)
    write_parquet(tmp_path / "b.parquet", [*rows_of(2, seed=4), {"image": {"bytes": None, "path": "x"}, "label": None}])
    source = ParquetSource([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert len(source) == 7
    np.testing.assert_array_equal(source.read(5), picture(seed=5))
    assert source.with_channels(1).read(5).shape == (12, 16, 1)
    assert source.labels.tolist() == [0, 1, 2, 0, 0, 1, -1]
    assert source.classes == ("cat", "dog", "eel")
    assert [source.name(i) for i in (0, 3, 4)] == ["a.parquet/0", "a.parquet/3", "b.parquet/0"]
    with pytest.raises(DataError, match=r"^b.parquet/2: the table holds no bytes for it"):
        source.read(6)
    assert source.fingerprint() != ParquetSource([tmp_path / "a.parquet"]).fingerprint()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(5), source.read(5))


def test_large_tables_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "IN_MEMORY", 0)
    write_parquet(tmp_path / "a.parquet", [*rows_of(3), {"image": {"bytes": None, "path": "x"}, "label": None}])
    unpacked: list[tuple[int, int]] = []

    def opened() -> ParquetSource:
        return ParquetSource(
            [tmp_path / "a.parquet"], Context(progress=lambda what, done, total: unpacked.append((done, total)))
        )

    source = opened()
    sent = pickle.dumps(source)
    assert len(sent) < 3000
    for item in (source, pickle.loads(sent), opened()):
        np.testing.assert_array_equal(item.read(2), picture(seed=2))
        with pytest.raises(DataError, match="the table holds no bytes"):
            item.read(3)
    assert unpacked == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (content,) = (tmp_path / "cache" / "parquet").glob("*.bin")
    content.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.bin is damaged; remove it"):
        opened()
    write_parquet(tmp_path / "a.parquet", rows_of(3, seed=5))
    np.testing.assert_array_equal(opened().read(0), picture(seed=5))


def files_of(cache: Path, *kinds: str) -> list[Path]:
    return sorted(path for path in (cache / "parquet").iterdir() if path.suffix in kinds)


def test_of_a_table_only_the_newest_copy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "IN_MEMORY", 0)
    for seed in range(3):
        write_parquet(tmp_path / "a.parquet", rows_of(3, seed=seed))
        os.utime(tmp_path / "a.parquet", (seed, seed))
        np.testing.assert_array_equal(ParquetSource([tmp_path / "a.parquet"]).read(0), picture(seed=seed))
        gc.collect()
        assert len(files_of(tmp_path / "cache", ".bin", ".npy", ".lock")) == 2


def test_the_limit_of_the_cache_covers_tables_and_spares_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "IN_MEMORY", 0)
    for i in range(3):
        write_parquet(tmp_path / f"{i}.parquet", rows_of(3, seed=i))
    read = ParquetSource([tmp_path / "0.parquet"])
    ParquetSource([tmp_path / "1.parquet"])
    (tmp_path / "cache" / "parquet" / "notes.txt").write_text("not ours")
    monkeypatch.setenv("TORCHMAE_CACHE_GIB", str(2**-20))  # 1 KiB
    latest = ParquetSource([tmp_path / "2.parquet"])
    gc.collect()
    assert len(files_of(tmp_path / "cache", ".bin")) == 2
    assert (tmp_path / "cache" / "parquet" / "notes.txt").exists()
    again = pickle.loads(pickle.dumps(read))
    for seed, source in ((0, read), (0, again), (2, latest)):
        np.testing.assert_array_equal(source.read(0), picture(seed=seed))


def _open_at_once(folder: Path, ready: Any, found: Any) -> None:
    unpacked: list[int] = []
    ready.wait()
    source = ParquetSource([folder / "a.parquet"], Context(progress=lambda what, done, total: unpacked.append(done)))
    np.testing.assert_array_equal(source.read(2), picture(seed=2))
    found.put(len(unpacked))


def test_one_of_several_processes_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "IN_MEMORY", 0)
    write_parquet(tmp_path / "a.parquet", rows_of(3))
    unpack = tables._unpack
    monkeypatch.setattr(tables, "_unpack", lambda *args: (time.sleep(0.3), unpack(*args))[1])
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_open_at_once, args=(tmp_path, ready, found)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(found.get(timeout=60) for _ in processes) == [0, 0, 3]
    for process in processes:
        process.join()


def test_parquet_of_plain_bytes_without_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": 1, "img": b"rubbish"}])
    source = ParquetSource([tmp_path / "a.parquet"])
    assert source.labels is None
    with pytest.raises(DataError, match=r"^a.parquet/0: not an image"):
        source.read(0)


def test_parquet_without_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "a", "label": 1}])
    with pytest.raises(DataError, match="none of the columns text, label holds images"):
        ParquetSource([tmp_path / "a.parquet"])
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"cannot read .*b.parquet"):
        ParquetSource([tmp_path / "b.parquet"])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow is not installed, .*; pip install 'torchmae\[parquet\]'"):
        ParquetSource([tmp_path / "a.parquet"])
