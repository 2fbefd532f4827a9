"""Held-out images: others than those trained on, and of the classes that training has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchmae.config import DataConfig
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.opening import choose_splits
from torchmae.errors import ConfigError


def val_labels(folder: Path) -> list[int]:
    config = DataConfig(source=str(folder))
    _, val, notes = choose_splits(config, open_splits(config.source), Context(spatial_dims=2))
    assert val is not None and val.labels is not None
    assert len(notes) == 1 and "1 of 3 val images" in notes[0]
    return val.labels.tolist()


def write_arrays(path: Path, seed: int = 0) -> str:
    np.save(path, np.random.default_rng(seed).integers(0, 255, (20, 8, 8), dtype=np.uint8))
    return str(path)


def test_the_training_images_are_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_arrays(tmp_path / "a.npy")
    (tmp_path / "link.npy").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    context = Context(spatial_dims=2)
    splits = open_splits(source, context)
    for val in (source, "a.npy", "link.npy"):
        with pytest.raises(ConfigError, match="leads to the training images"):
            choose_splits(DataConfig(source=source, val=val), splits, context)
    _, val_images, _ = choose_splits(
        DataConfig(source=source, val=write_arrays(tmp_path / "b.npy", 1)), splits, context
    )
    assert val_images is not None and len(val_images) == 20


def test_classes_that_training_lacks_are_unknown_in_folders_lists_and_tables(write_pictures, tmp_path: Path) -> None:
    names = [f"folder/{name}/1.png" for name in ("train/a", "train/b", "train/c", "val/b", "val/c", "val/d")]
    write_pictures(*names)
    assert val_labels(tmp_path / "folder") == [1, 2, -1]
    rows = [f"{name.removeprefix('folder/')},{name.split('/')[2]},{name.split('/')[1]}" for name in names]
    (tmp_path / "folder" / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    assert val_labels(tmp_path / "folder" / "list.csv") == [1, 2, -1]
    images = np.zeros((3, 8, 8), np.uint8)
    np.savez(
        tmp_path / "x.npz", train_images=images, train_labels=[0, 1, 2], val_images=images + 1, val_labels=[1, 2, 3]
    )
    assert val_labels(tmp_path / "x.npz") == [1, 2, -1]
