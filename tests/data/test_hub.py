from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from picture_files import picture, rows_of, write_parquet
from PIL import Image

from torchmae.data.formats import Context
from torchmae.data.hub import HubSource
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
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


def test_a_table_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.fromarray(picture()).save(tmp_path / "secret.png")
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    source = HubSource(rows, "image", None, "x", tmp_path / "set", None)
    with pytest.raises(DataError, match=r"^x/0: the table names .*secret.png, which lies outside of its folder"):
        source.read(0)


def test_bytes_that_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    cells = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": f"{tmp_path}/a.png"}]
    rows = datasets.Dataset.from_dict(
        {"image": cells}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    source = HubSource(rows, "image", None, "x", tmp_path, Context())
    np.testing.assert_array_equal(source.read(0), source.read(1))
    monkeypatch.setattr("torchmae.data.sources.MAX_BYTES", 100)
    for index in (0, 1):
        with pytest.raises(DataError, match=f"^x/{index}: the file has more than"):
            source.read(index)


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^hf:no/such:thing cannot be loaded: .*; check the name") as caught:
        open_splits("hf:no/such:thing")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hf: needs the datasets library; pip install 'torchmae\[datasets\]'"):
        open_splits("hf:no/such")
