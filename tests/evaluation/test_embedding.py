from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from torchmae.config.data import DataOptions
from torchmae.data.layouts import open_splits
from torchmae.errors import CheckpointError, ConfigError, DataError
from torchmae.evaluation import embedding
from torchmae.evaluation.embedding import Block, embed, plan_blocks, read_features
from torchmae.evaluation.images import ImageSet
from torchmae.evaluation.subject import extract
from torchmae.training.runtime import Runtime


def parts() -> list[ImageSet]:
    return [tiny.image_set(tiny.some(open_splits("digits")[name], 70), batch_size=10) for name in ("train", "val")]


def write(out: Path, pool: str = "mean", **options: int) -> embedding.Written:
    return embed(tiny.subject(), parts(), out, pool=pool, runtime=tiny.RUNTIME, **options)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize(("pool", "shape"), [("mean", (16,)), ("both", (32,)), ("tokens", (16, 16))])
def test_the_file_holds_what_the_model_gives(tmp_path: Path, suffix: str, pool: str, shape: tuple[int, ...]) -> None:
    out = tmp_path / f"features{suffix}"
    written = write(out, pool, block_images=20)
    assert (written.count, written.shape, written.left_out, written.resumed) == (140, shape, 0, 0)
    content = read_features(out)
    assert content.features.dtype == np.float32
    assert content.labels.dtype == np.int64
    pairs = [extract(tiny.subject(), part.batches(), tiny.RUNTIME, pool) for part in parts()]
    np.testing.assert_array_equal(content.features, np.concatenate([item.features.numpy() for item in pairs]))
    np.testing.assert_array_equal(content.labels, np.concatenate([item.labels.numpy() for item in pairs]))
    assert content.paths.tolist() == [part.source.name(i) for part in parts() for i in range(70)]
    assert content.about == {"weights": tiny.subject().fingerprint(), "pool": pool, "layer": ""}
    assert list(tmp_path.iterdir()) == [out]


def test_the_files_are_readable_without_torchmae(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "a.parquet")
    write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["features", "labels", "paths"]
        features = arrays["features"]
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["path", "label", "features"]
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[16]"
    np.testing.assert_array_equal(np.array(table.column("features").to_pylist(), dtype=np.float32), features)


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import test_embedding as tests
from pathlib import Path
from torchmae.evaluation import embedding

replace_file = embedding.replace_file

def killed_in_the_third_block(path, content):
    if path.name == "block-000002.npz":
        path.with_name("unfinished").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    replace_file(path, content)

embedding.replace_file = killed_in_the_third_block
tests.write(Path({out!r}), block_images=20)
"""


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    out, whole = tmp_path / "features.npz", tmp_path / "whole.npz"
    code = KILLED.format(here=str(Path(__file__).parent), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(DataError, match=r"features.npz is half written; give the same `torchmae embed` command again"):
        read_features(out)
    written = write(out, block_images=20)
    assert (written.count, written.resumed) == (140, 40)
    write(whole, block_images=20)
    for one, other in zip(read_features(out), read_features(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npz", "whole.npz"]


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "features.npz"

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_write_npz", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*features.npz: No space left on device; free space"):
            write(out, block_images=50)
    blocks = sorted((tmp_path / "features.npz.partial").glob("block-*"))
    assert [path.name for path in blocks] == [f"block-00000{i}.npz" for i in range(4)]
    blocks[2].write_bytes(blocks[2].read_bytes()[:-100])  # cut short: it alone is done anew
    told: list[tuple[int, int]] = []
    written = embed(
        tiny.subject(),
        parts(),
        out,
        pool="mean",
        runtime=tiny.RUNTIME,
        block_images=50,
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert written.resumed == 90
    assert told == [(140, 140)]
    write(tmp_path / "whole.npz", block_images=50)
    np.testing.assert_array_equal(read_features(out).features, read_features(tmp_path / "whole.npz").features)


def test_another_embedding_is_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    embedding.open_partial(out, embedding._identity(tiny.subject(), parts(), "mean", tiny.RUNTIME, 140))
    with pytest.raises(ConfigError, match=r"features.npz.partial holds part of another embedding .*; remove it, or"):
        write(out, "cls", block_images=140)
    same, bf16 = (
        embedding._identity(tiny.subject(), parts(), "mean", Runtime(tiny.CPU, precision, 1), 140)
        for precision in ("fp32", "bf16")
    )
    assert embedding.open_partial(out, same).name == "features.npz.partial"
    assert same != bf16
    assert same != embedding._identity(tiny.subject(class_token=False), parts(), "mean", tiny.RUNTIME, 140)
    assert same != embedding._identity(tiny.subject(), parts()[:1], "mean", tiny.RUNTIME, 140)
    for change in (
        {"data": DataOptions(num_workers=0, nodata=0.0)},
        {"data": DataOptions(num_workers=0, window=(4, 4))},
        {"normalisation": replace(tiny.NORMALISATION, scale={"uint8": 16.0})},
    ):
        read_otherwise = [replace(part, **change) for part in parts()]
        assert same != embedding._identity(tiny.subject(), read_otherwise, "mean", tiny.RUNTIME, 140)


def test_two_commands_do_not_write_into_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(path: Path) -> None:
        assert path.parent == tmp_path / "features.npz.partial"
        raise BlockingIOError

    monkeypatch.setattr("torchmae.files.lock_file", taken)
    with pytest.raises(ConfigError, match=r"another process is writing .*features.npz; wait for it, or choose another"):
        write(tmp_path / "features.npz")
    monkeypatch.undo()
    assert write(tmp_path / "features.npz").count == 140
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


def test_an_unreadable_image_is_left_out(tmp_path: Path) -> None:
    for i in range(12):
        path = tmp_path / "images" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(path)
    (tmp_path / "images" / "05.png").write_bytes(b"nothing")
    source = open_splits(str(tmp_path / "images"))["train"].with_channels(1)
    out = tmp_path / "features.npz"
    images = tiny.image_set(source, batch_size=4)
    written = embed(tiny.subject(), [images], out, pool="mean", runtime=tiny.RUNTIME, block_images=4)
    assert (written.count, written.left_out) == (11, 1)
    content = read_features(out)
    assert [Path(path).stem for path in content.paths] == [f"{i:02d}" for i in range(12) if i != 5]
    assert len(np.unique(content.features, axis=0)) == 11
    assert content.labels.tolist() == [-1] * 11
    with pytest.raises(DataError, match="1 of 12 images cannot be read"):
        embed(
            tiny.subject(),
            [tiny.image_set(source, max_bad=0)],
            tmp_path / "strict.npz",
            pool="mean",
            runtime=tiny.RUNTIME,
        )


def test_where_it_cannot_write(tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    out.touch()
    with pytest.raises(ConfigError, match=r"features.npz exists already; remove it, or choose another --out"):
        write(out)
    with pytest.raises(ConfigError, match=r"cannot write .*features.npz/a.npz.partial: Not a directory; choose"):
        write(out / "a.npz")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_that_was_cut_short(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"features{suffix}"
    write(out)
    out.write_bytes(out.read_bytes()[: out.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"features\{suffix} is damaged: "):
        read_features(out)
    with pytest.raises(DataError, match=r"no such file: .*none.npz"):
        read_features(tmp_path / "none.npz")


def test_blocks_cover_every_image_once() -> None:
    assert plan_blocks([5, 2], 3) == [Block(0, 0, 0, 3), Block(1, 0, 3, 5), Block(2, 1, 0, 2)]


def test_a_block_of_large_features_is_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BLOCK_BYTES", 4 * 16 * 16 * 25)  # 25 images' tokens; a batch is 10
    sizes: list[int] = []
    embed(
        tiny.subject(),
        parts(),
        tmp_path / "a.npz",
        pool="tokens",
        runtime=tiny.RUNTIME,
        progress=lambda what, done, total: sizes.append(done),
    )
    assert np.diff([0, *sizes]).tolist() == [20, 20, 20, 10] * 2


def test_nothing_is_masked(tmp_path: Path) -> None:
    """Whoever embeds twice, or embeds a part only, gets the same features of an image."""
    write(tmp_path / "all.npz")
    embed(tiny.subject(), parts()[1:], tmp_path / "val.npz", pool="mean", runtime=tiny.RUNTIME)
    everything, val = read_features(tmp_path / "all.npz"), read_features(tmp_path / "val.npz")
    np.testing.assert_array_equal(everything.features[70:], val.features)
