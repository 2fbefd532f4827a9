from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from picture_files import picture, rows_of, write_parquet
from tar_files import samples, write_tar

from torchmae.data import remote
from torchmae.data.layouts import open_splits
from torchmae.data.remote import (
    BLOCK,
    RemoteBytes,
    cache_folder,
    cache_limit,
    expand_braces,
    expand_url,
    place_version,
    shown,
    trim,
)
from torchmae.data.shards import INDEX_SUFFIX, build_index, write_index
from torchmae.data.sources import Subset
from torchmae.errors import ConfigError, DataError

pytest.importorskip("aiohttp")


class Server:
    """Serves a folder over HTTP, by ranges; notes what was asked for; fails when told to.

    Attributes:
        url: of the folder.
        ranges: (name, first byte, last byte) of every range that was asked for.
        failures: how many of the next requests fail.
        whole: ignore ranges, as simple servers do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: list[tuple[str, int, int]] = []
        self.failures = 0
        self.whole = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = server.folder / self.path.strip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if match and server.failures:
                    server.failures -= 1
                    self.send_error(503)
                    return
                first, last = (int(match[1]), int(match[2])) if match else (0, len(content) - 1)
                if match:
                    server.ranges.append((path.name, first, last))
                part = content if server.whole else content[first : last + 1]
                self.send_response(206 if match else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(part)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    served = Server(folder)
    yield served
    served.close()


def remote_bytes(server: Server, name: str, waits: list[float] | None = None) -> RemoteBytes:
    url = f"{server.url}/{name}"
    return RemoteBytes(url, *place_version(url), wait=(waits if waits is not None else []).append)


def test_shards_over_http(server: Server) -> None:
    for i in range(3):
        write_tar(server.folder / f"train-{i:02d}.tar", samples(3, start=3 * i))
    splits = open_splits(f"{server.url}/train-{{00..02}}.tar")
    train = splits["train"]
    assert len(train) == 9
    assert train.labels.tolist() == [i % 3 for i in range(9)]
    np.testing.assert_array_equal(train.read(7), picture(seed=7))
    assert train.name(7) == "train-02.tar/0007.png"
    asked = len(server.ranges)
    again = pickle.loads(pickle.dumps(open_splits(f"{server.url}/train-{{00..02}}.tar")["train"]))
    for index in (8, 0):
        np.testing.assert_array_equal(again.read(index), picture(seed=index))
    assert len(server.ranges) == asked  # the index and the images are in the cache
    assert again.fingerprint() == train.fingerprint()
    write_tar(server.folder / "train-00.tar", samples(3, start=20))
    changed = open_splits(f"{server.url}/train-{{00..02}}.tar")["train"]
    np.testing.assert_array_equal(changed.read(0), picture(seed=20))


def test_with_an_index_beside_it_only_what_is_read_is_fetched(server: Server) -> None:
    path = server.folder / "x.tar"
    write_tar(path, {f"{i:03d}.png": bytes(200_000) for i in range(20)} | samples(1))
    size = path.stat().st_size
    write_index(path.with_name(path.name + INDEX_SUFFIX), build_index(path, size), size)
    source = open_splits(f"{server.url}/x.tar")["train"]
    server.ranges.clear()
    np.testing.assert_array_equal(source.read(20), picture(seed=0))
    assert sum(last + 1 - first for _, first, last in server.ranges) <= 2 * BLOCK


def test_read_ahead_fetches_what_is_read_next(server: Server) -> None:
    write_tar(server.folder / "x.tar", {f"{i:03d}.png": bytes(BLOCK) for i in range(12)} | samples(3))
    path = server.folder / "x.tar"
    write_index(path.with_name(path.name + INDEX_SUFFIX), build_index(path, path.stat().st_size), path.stat().st_size)
    source = open_splits(f"{server.url}/x.tar")["train"]
    Subset(source, np.array([14, 13])).read_ahead(np.array([1, 0]))
    for future in list(source._coming.values()):
        future.result()
    asked = len(server.ranges)
    np.testing.assert_array_equal(source.read(14), picture(seed=2))
    np.testing.assert_array_equal(source.read(13), picture(seed=1))
    assert len(server.ranges) == asked


def test_failed_requests_are_made_again_with_longer_and_longer_waits(server: Server) -> None:
    content = np.random.default_rng(0).bytes(3 * BLOCK + 5)
    (server.folder / "x.bin").write_bytes(content)
    waits: list[float] = []
    file = remote_bytes(server, "x.bin", waits)
    server.failures = 3
    assert file.read(BLOCK - 1, 3 * BLOCK + 5) == content[BLOCK - 1 :]
    assert waits == [0.5, 1.0, 2.0]
    server.failures = 100
    assert file.read(BLOCK, 2 * BLOCK) == content[BLOCK : 2 * BLOCK]  # it is in the cache
    (server.folder / "y.bin").write_bytes(content)
    waits.clear()
    with pytest.raises(DataError, match=r"y.bin cannot be fetched after 6 attempts: .*503.*; check the network"):
        remote_bytes(server, "y.bin", waits).read(0, 1)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_what_does_not_exist_is_not_asked_for_twice(server: Server) -> None:
    with pytest.raises(DataError, match=r"^http://.*/gone.tar does not exist; check the address"):
        open_splits(f"{server.url}/gone.tar?key=secret")


def test_a_server_without_ranges_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.folder / "x.bin").write_bytes(bytes(3 * BLOCK))
    server.whole = True
    with pytest.raises(DataError, match="does the server support ranges"):
        remote_bytes(server, "x.bin").read(0, 10)


def test_a_damaged_cache_is_fetched_anew(server: Server) -> None:
    content = np.random.default_rng(0).bytes(2 * BLOCK)
    (server.folder / "x.bin").write_bytes(content)
    file = remote_bytes(server, "x.bin")
    assert file.read(0, 2 * BLOCK) == content
    (data,) = (cache_folder() / "remote").glob("*.data")
    data.write_bytes(content[: BLOCK + 7] + b"?" + content[BLOCK + 8 :])
    server.ranges.clear()
    assert file.read(0, 2 * BLOCK) == content
    assert server.ranges == [("x.bin", BLOCK, 2 * BLOCK - 1)]
    data.unlink()
    assert file.read(5, 6) == content[5:6]


def test_the_cache_is_bounded_and_a_full_disk_does_no_harm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        (server.folder / f"{i}.bin").write_bytes(bytes([i + 1]) * (4 * BLOCK))
        assert remote_bytes(server, f"{i}.bin").read(0, 4 * BLOCK) == bytes([i + 1]) * (4 * BLOCK)
    trim(9 * BLOCK)
    kept = sum(path.stat().st_blocks * 512 for path in (cache_folder() / "remote").glob("*.data"))
    assert 4 * BLOCK <= kept <= 9 * BLOCK
    monkeypatch.setattr(remote, "_write_at", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert remote_bytes(server, "0.bin").read(3, 5) == b"\x01\x01"


def test_the_cache_is_looked_at_once_in_a_while_however_many_shards_there_are(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    monkeypatch.setattr(remote, "trim", looks.append)
    for i in range(6):
        (server.folder / f"{i}.bin").write_bytes(bytes(BLOCK))
        remote_bytes(server, f"{i}.bin").read(0, BLOCK)
    assert len(looks) == 1


def test_a_question_mark_is_a_character_in_a_bucket_and_a_query_at_http(server: Server, tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"x{i}.tar", samples(1, start=i))
    found = expand_url(f"file://{tmp_path}/x?.tar")
    assert [Path(url).name for url in found] == ["x0.tar", "x1.tar", "x2.tar"]
    assert len(open_splits(f"file://{tmp_path}/x[01].tar")["train"]) == 2
    assert shown("s3://bucket/x?.tar") == "s3://bucket/x?.tar"
    assert shown("s3://bucket/x.tar?versionId=secret") == "s3://bucket/x.tar"
    signed = f"{server.url}/x.tar?sig=a*b[c]"
    assert expand_url(signed) == [signed]


def test_parquet_over_http(server: Server) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(server.folder / "train-0.parquet", rows_of(4))
    source = open_splits(f"{server.url}/train-0.parquet")["train"]
    assert source.labels.tolist() == [0, 1, 2, 0]
    np.testing.assert_array_equal(source.read(3), picture(seed=3))


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("TORCHMAE_CACHE", str(tmp_path / "cache"))
    stand_in = moto_server.ThreadedMotoServer(port=0)
    stand_in.start()
    try:
        host, port = stand_in.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        bucket = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="pictures")
        for i in range(2):
            write_tar(tmp_path / "x.tar", samples(3, start=3 * i))
            bucket.upload_file(str(tmp_path / "x.tar"), f"train-{i}.tar")
        source = open_splits("s3://pictures/train-*.tar")["train"]
        assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
        np.testing.assert_array_equal(source.read(4), picture(seed=4))
        with pytest.raises(DataError, match=r"s3://pictures/gone.tar does not exist"):
            open_splits("s3://pictures/gone.tar")
    finally:
        stand_in.stop()


def test_braces() -> None:
    assert expand_braces("a-{08..10}{x,y}.tar") == [f"a-{n}{c}.tar" for n in ("08", "09", "10") for c in "xy"]
    assert expand_braces("plain") == ["plain"]


def test_secrets_are_not_shown() -> None:
    assert shown("https://me:word@host/a.tar?token=abc") == "https://host/a.tar"


def test_unknown_protocols(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch://x/y.tar: Protocol not known"):
        open_splits("nosuch://x/y.tar")
    with pytest.raises(DataError, match=r"file://x.png names .png files; give .tar or .parquet files"):
        open_splits("file://x.png")


def test_the_limit_of_the_cache_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE_GIB", "0.5")
    assert cache_limit() == 2**29
    monkeypatch.setenv("TORCHMAE_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match="TORCHMAE_CACHE_GIB is 'much'; set it to a number of GiB above 0"):
        cache_limit()
