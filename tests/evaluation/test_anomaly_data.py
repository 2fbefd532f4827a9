"""What is normal, by the names of folders and classes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import EvaluateOptions
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.anomaly_data import open_anomaly_data
from torchmae.evaluation.images import ImageSet, ModelInput


def write(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(path)


def opened(normal: Path, test: Path, normal_classes: list[str] | None = None) -> tuple[ImageSet, ImageSet]:
    model = ModelInput((8, 8), 1, tiny.NORMALISATION, tiny.CPU)
    options = EvaluateOptions(
        method="anomaly",
        normal=str(normal),
        test=str(test),
        normal_classes=None if normal_classes is None else ",".join(normal_classes),
        data=DataOptions(num_workers=0),
    )
    data = open_anomaly_data(options, model)
    return data.train, data.test


def truth(images: ImageSet) -> dict[str, int]:
    assert images.source.labels is not None
    names = ["/".join(Path(images.source.name(i)).parts[-2:]) for i in range(len(images))]
    return dict(zip(names, images.source.labels.tolist(), strict=True))


def test_good_is_normal(tmp_path: Path) -> None:
    write(tmp_path, "train/good/a", "train/good/b", "test/good/c", "test/crack/d", "test/hole/e")
    normal, test = opened(tmp_path / "train", tmp_path / "test")
    assert len(normal) == 2
    assert truth(test) == {"good/c.png": 0, "crack/d.png": 1, "hole/e.png": 1}
    assert [batch.labels.tolist() for batch in test.batches()] == [test.source.labels.tolist()]
    # The whole set in one folder: its own training and test splits.
    again = opened(tmp_path, tmp_path)
    assert (len(again[0]), truth(again[1])) == (2, truth(test))


def test_classes_of_the_normal_images_are_normal(tmp_path: Path) -> None:
    write(tmp_path, "n/cat/a", "n/dog/b", "t/cat/c", "t/dog/d", "t/ship/e")
    assert truth(opened(tmp_path / "n", tmp_path / "t")[1]) == {"cat/c.png": 0, "dog/d.png": 0, "ship/e.png": 1}
    # One class's own folder.
    assert truth(opened(tmp_path / "n" / "cat", tmp_path / "t")[1]) == {"cat/c.png": 0, "dog/d.png": 1, "ship/e.png": 1}
    # By name.
    normal, test = opened(tmp_path / "n", tmp_path / "t", ["dog"])
    assert truth(normal).keys() == {"dog/b.png"}
    assert truth(test) == {"cat/c.png": 1, "dog/d.png": 0, "ship/e.png": 1}


def test_data_that_cannot_work(tmp_path: Path) -> None:
    write(tmp_path, "n/cat/a", "n/dog/b", "t/ship/e", "t/plane/f", "flat/g")
    with pytest.raises(
        DataError, match="are all anomalous: their classes are plane, ship; normal is what is named cat"
    ):
        opened(tmp_path / "n", tmp_path / "t")
    with pytest.raises(DataError, match="are all normal: their classes are plane, ship"):
        shutil.copytree(tmp_path / "t", tmp_path / "u")
        (tmp_path / "u" / "ship" / "e.png").rename(tmp_path / "u" / "ship" / "new.png")
        opened(tmp_path / "t", tmp_path / "u")
    with pytest.raises(DataError, match=r"the test images have no classes .*; put normal ones in a folder named good"):
        opened(tmp_path / "n", tmp_path / "flat")
    with pytest.raises(ConfigError, match="is called 'cow'; choose from cat, dog"):
        opened(tmp_path / "n", tmp_path / "t", ["cow"])
    with pytest.raises(ConfigError, match="leads to the training images; choose other images to test"):
        opened(tmp_path / "n", tmp_path / "t" / ".." / "n")
