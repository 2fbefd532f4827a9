"""What is normal, by the names of folders and classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.transforms import resample
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.anomaly_data import AnomalyData, open_anomaly_data
from torchmae.evaluation.images import ImageSet, ModelInput


def write(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(path)


def opened_data(source: Path | None = None, **options: Any) -> AnomalyData:
    data = DataOptions(num_workers=0, source=None if source is None else str(source), group=options.pop("group", None))
    model = ModelInput((8, 8), 1, tiny.NORMALISATION, tiny.CPU)
    return open_anomaly_data(EvaluateOptions(method="anomaly", data=data, **options), model)


def opened(normal: Path, test: Path, normal_classes: list[str] | None = None) -> tuple[ImageSet, ImageSet]:
    classes = None if normal_classes is None else ",".join(normal_classes)
    data = opened_data(normal=str(normal), test=str(test), normal_classes=classes)
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
    data = opened_data(tmp_path)
    assert (len(data.train), truth(data.test)) == (2, truth(test))
    assert data.masks == {} and "there are no masks" in data.notes[-1]
    fewer = opened_data(tmp_path, train_images=1, test_images=2)
    assert (len(fewer.train), len(fewer.test), len(fewer.kinds)) == (1, 2, 2)


def mask(path: Path, value: int = 255, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[1:3, 1:3], pixels[5, 5] = value, value // 3
    Image.fromarray(pixels).save(path)


def test_masks_of_mvtec_ad(tmp_path: Path) -> None:
    write(tmp_path, "train/good/0", "train/good/1", "test/good/0", "test/crack/0", "test/crack/1", "test/hole/0")
    for name in ("crack/0", "crack/1", "hole/0"):
        mask(tmp_path / "ground_truth" / f"{name}_mask.png")
    data = opened_data(tmp_path)
    assert truth(data.test) == {"crack/0.png": 1, "crack/1.png": 1, "good/0.png": 0, "hole/0.png": 1}
    assert data.kinds == ("crack", "crack", "good", "hole")
    assert {row: path.relative_to(tmp_path).as_posix() for row, path in data.masks.items()} == {
        0: "ground_truth/crack/0_mask.png",
        1: "ground_truth/crack/1_mask.png",
        3: "ground_truth/hole/0_mask.png",
    }
    assert [int(data.defect(row, (8, 8)).sum()) for row in range(4)] == [4, 4, 0, 4]  # a third is a soft edge
    assert data.unscored == frozenset()
    before = data.fingerprints()
    mask(tmp_path / "ground_truth" / "hole" / "0_mask.png", 254)
    after = opened_data(tmp_path).fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"masks"}
    # A kind without masks.
    (tmp_path / "ground_truth" / "hole" / "0_mask.png").unlink()
    data = opened_data(tmp_path)
    assert data.unscored == {3} and "no masks of hole" in data.notes[-1]
    mask(tmp_path / "ground_truth" / "crack" / "9_mask.png")
    with pytest.raises(DataError, match=r"1 masks are of no picture, such as .*9_mask.png; name"):
        opened_data(tmp_path)
    (tmp_path / "ground_truth" / "crack" / "9_mask.png").unlink()
    mask(tmp_path / "ground_truth" / "crack" / "1_mask.png", size=(8, 9))
    with pytest.raises(DataError, match=r"1_mask.png is 9 x 8 pixels and its picture 8 x 8; save it"):
        opened_data(tmp_path)
    (tmp_path / "ground_truth" / "crack" / "1_mask.png").unlink()
    with pytest.raises(DataError, match=r"1 pictures of crack have no mask, such as .*1.png, and 1 have; add"):
        opened_data(tmp_path)


def test_a_folder_of_classes_is_divided(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path, f"images/free/{i // 2}_{i}")
        mask(tmp_path / "masks" / "free" / f"{i // 2}_{i}.png", 0)
    for name in ("crack/1_a", "hole/b"):
        write(tmp_path, f"images/{name}")
        mask(tmp_path / "masks" / f"{name}.png", 1)
    with pytest.raises(DataError, match=r"which of its classes are normal is not known \(crack, free, hole\); give"):
        opened_data(tmp_path)
    data = opened_data(tmp_path, normal_classes="free", group=r"(?:free|crack|hole)/(\w)")
    assert (len(data.train), len(data.test), sorted(set(data.kinds))) == (16, 6, ["crack", "free", "hole"])
    known, tested = (
        {item.source.name(i).rpartition("/")[2].partition("_")[0] for i in range(len(item))}
        for item in (data.train, data.test)
    )
    assert "4 of 20 normal images are held out" in data.notes[0]
    assert [int(data.defect(row, (8, 8)).any()) for row in range(6)] == data.test.source.labels.tolist()
    assert data.threshold == 0 and len(data.masks) == 6
    assert len(known & tested) <= 1  # the crack's


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


def test_records_are_cut_into_clips_once(tmp_path: Path) -> None:
    records = np.random.default_rng(0).integers(0, 255, (24, 10, 16, 32, 1)).astype(np.uint8)
    for number, record in enumerate(records):
        path = tmp_path / ("good" if number < 20 else "odd") / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, record)
    options = EvaluateOptions(method="anomaly", data=DataOptions(source=str(tmp_path), clip=4, num_workers=0))
    opened = open_anomaly_data(options, ModelInput((4, 8, 8), 1, tiny.NORMALISATION, tiny.CPU))
    assert (len(opened.train) + len(opened.test), len(opened.kinds)) == (24, len(opened.test))
    windows = opened.test_windows
    assert windows.images is not None
    assert windows.images.tolist() == [row for row in range(len(opened.test)) for _ in range(6)]  # left and right
    batch = next(iter(windows.batches()))
    first = opened.test.source.read(0)[..., 0]
    wanted = torch.from_numpy(np.stack([first[t : t + 4, :, x : x + 16] for t in (0, 3, 6) for x in (0, 16)]))[:, None]
    boxes = np.tile([[0, 4], [0, 16], [0, 16]], (6, 1, 1))
    whole = resample(wanted, boxes, (4, 8, 8), np.zeros(6, np.bool_))
    torch.testing.assert_close(batch.images[:6], tiny.NORMALISATION.apply(whole, torch.uint8))
