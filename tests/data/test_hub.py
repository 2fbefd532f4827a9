from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from picture_files import picture, rows_of, write_parquet
from PIL import Image

from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.tables import HubSource
from torchmae.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "hf" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "hf" / "downloads" / "extracted")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_local_parquet(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    metadata = json.dumps({"info": {"features": features}}).encode()
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", rows_of(4), metadata)
    write_parquet(folder / "validation-0.parquet", rows_of(2, seed=4), metadata)
    splits = open_splits(f"hf:{folder}")
    assert {split: len(source) for split, source in splits.items()} == {"train": 4, "val": 2}
    train = splits["train"]
    np.testing.assert_array_equal(train.read(3), picture(seed=3))
    assert train.labels.tolist() == [0, 1, 2, 0]
    assert train.classes == ("a", "b", "c")
    assert train.with_channels(1).read(0).shape == (12, 16, 1)
    assert train.fingerprint() == open_splits(f"hf:{folder}")["train"].fingerprint()
    assert train.fingerprint() != splits["val"].fingerprint()


def test_an_image_folder(write_pictures, tmp_path: Path) -> None:
    write_pictures("set/train/ant/1.png", "set/train/bee/1.png", "set/train/bee/2.png")
    source = open_splits(f"hf:{tmp_path}/set")["train"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.classes == ("ant", "bee")
    np.testing.assert_array_equal(source.read(2), picture(seed=2))


def test_image_folders_whose_files_lie_elsewhere(
    write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind links, and in the hub's cache, where names are links to the content."""
    write_pictures("plain/train/ant/1.png", "plain/train/bee/2.png", "elsewhere/bee/2.png")
    for name, target in (("ant/1", "plain/train/ant/1"), ("bee/2", "elsewhere/bee/2")):
        link = tmp_path / "linked" / "train" / f"{name}.png"
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / f"{target}.png")
    source = open_splits(f"hf:{tmp_path}/linked")["train"]
    assert [source.read(i).tobytes() for i in range(2)] == [picture(seed=i).tobytes() for i in (0, 2)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--me--set"
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (tmp_path / "plain" / "train" / "ant" / "1.png").rename(repository / "blobs" / "abc")
    (repository / "snapshots" / "1" / "1.png").symlink_to("../../blobs/abc")
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": None, "path": str(repository / "snapshots" / "1" / "1.png")}]
    rows = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image(decode=False))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: {"train": rows})
    np.testing.assert_array_equal(open_splits("hf:me/set")["train"].read(0), picture(seed=0))
    with pytest.raises(DataError, match="outside of its folder"):
        open_splits("hf:me/other")["train"].read(0)


def test_a_table_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.fromarray(picture()).save(tmp_path / "secret.png")
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    source = HubSource(rows, "x", [tmp_path / "set"], Context())
    with pytest.raises(DataError, match=r"^x/0: the table names .*secret.png, which lies outside of its folder"):
        source.read(0)


def test_bytes_that_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    cells = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": f"{tmp_path}/a.png"}]
    rows = datasets.Dataset.from_dict(
        {"image": cells}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    source = HubSource(rows, "x", [tmp_path], Context())
    np.testing.assert_array_equal(source.read(0), source.read(1))
    monkeypatch.setattr("torchmae.data.formats.MAX_BYTES", 100)
    for index in (0, 1):
        with pytest.raises(DataError, match=f"^x/{index}: the file has more than"):
            source.read(index)


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^hf:no/such:thing cannot be loaded: .*; check the name") as caught:
        open_splits("hf:no/such:thing")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"datasets is not installed, .*; pip install 'torchmae\[datasets\]'"):
        open_splits("hf:no/such")
