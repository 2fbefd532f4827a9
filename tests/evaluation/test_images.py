from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.images import (
    EvaluationData,
    ModelInput,
    open_evaluation_data,
    open_parts,
    own_data,
    run_data,
)
from torchmae.training.ranks import ALONE
from torchmae.training.saved_model import read_description, write_description

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes images of 8 x 8, with these labels, to an .npz file."""

    def write(labels: list[int] | None = None, *, shape: tuple[int, ...] = (8, 8, 1), **splits: list[int]) -> str:
        arrays: dict[str, Any] = {}
        for prefix, values in {"": labels, **{f"{name}_": item for name, item in splits.items()}}.items():
            count = 20 if values is None else len(values)
            arrays[f"{prefix}images"] = np.random.default_rng(count).integers(0, 255, (count, *shape), dtype=np.uint8)
            if values is not None:
                arrays[f"{prefix}labels"] = np.array(values)
        path = tmp_path / f"data-{len(list(tmp_path.iterdir()))}.npz"
        np.savez(path, **arrays)
        return str(path)

    return write


def opened(source: str, *, labelled: bool = True, channels: int | None = 1, **options: Any) -> EvaluationData:
    return open_evaluation_data(
        EvaluateOptions(data=DataOptions(source=source, num_workers=0), **options),
        ModelInput((8, 8), channels, tiny.NORMALISATION, tiny.CPU, 32),
        labelled=labelled,
    )


def test_the_test_images_are_the_test_split_else_val_else_held_out(save: Save) -> None:
    labels = [0, 1] * 10
    data = opened(save(labels, val=[0, 1] * 3, test=[1, 0] * 2))
    assert (len(data.train), len(data.test)) == (20, 4)
    data = opened(save(labels, val=[0, 1] * 3))
    assert (len(data.train), len(data.test)) == (20, 6)
    data = opened(save(labels))
    assert (len(data.train), len(data.test)) == (16, 4)
    shown = torch.cat([batch.images for batch in data.train.batches()]).flatten(1)
    held_out = torch.cat([batch.images for batch in data.test.batches()]).flatten(1)
    assert (torch.cdist(held_out, shown) > 1e-3).all()


def test_test_data_names_a_split_or_other_data(save: Save) -> None:
    source = save([0, 1] * 10, val=[0, 1] * 3, test=[1, 0] * 2)
    assert len(opened(source, test_data="val").test) == 6
    assert len(opened(source, test_data="held-out").test) == 4
    other = save([1, 0, 1], test=[0, 0, 1, 1, 1])
    assert len(opened(source, test_data=other).test) == 5  # of other data too, the test split
    with pytest.raises(ConfigError, match="test_data is 'train'; choose .* held-out or a path"):
        opened(source, test_data="train")
    with pytest.raises(ConfigError, match="'tset' cannot be used: .*; choose from val, test, held-out, or a path"):
        opened(source, test_data="tset")


def test_limits_take_a_fixed_mixed_subset(save: Save) -> None:
    source = save([0] * 50 + [1] * 50)
    some, again = (opened(source, train_images=20, test_images=5) for _ in range(2))
    assert (len(some.train), len(some.test)) == (20, 5)
    assert some.fingerprints() == again.fingerprints()
    labels = next(iter(some.train.batches())).labels
    assert 4 <= int(labels.sum()) <= 16
    assert len(opened(source, train_images=10_000).train) == 80


def test_images_without_a_label_are_left_out_and_said(save: Save) -> None:
    data = opened(save([0, 1, -1, 0, 1, -1, 2, -1], test=[0, 1, -1]))
    assert (len(data.train), len(data.test)) == (5, 2)
    assert data.notes == (
        "3 training images without a label are left out",
        "1 test images without a label are left out",
    )
    assert data.classes == ("0", "1", "2")


def test_classes_are_those_of_the_training_images(save: Save) -> None:
    data = opened(save([0, 1, 0, 1], test=[0, 1, 2, 2, 2]))
    assert (len(data.test), data.classes) == (2, ("0", "1"))
    assert sum("3 of 5 test images" in note for note in data.notes) == 1


def test_training_images_are_no_test_images(save: Save, tmp_path: Path) -> None:
    """By the same name, by a link, as a part, and as a copy; another set with the same names is none of them."""
    source = save([0, 1] * 20)
    Path(f"{source}.link.npz").symlink_to(source)
    for other in (source, f"{source}.link.npz"):
        with pytest.raises(ConfigError, match="leads to the training images") as caught:
            opened(source, test_data=other)
        assert "held-out" in str(caught.value.fix)
    assert len(opened(source, test_data=save([0, 1] * 20 + [1])).test) == 41
    rng = np.random.default_rng(0)
    for i in range(8):
        for name in "ab":
            path = tmp_path / "all" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    part = tmp_path / "part"
    for name in ("a/1.png", "b/2.png"):
        (part / name).parent.mkdir(parents=True)
        (part / name).symlink_to(tmp_path / "all" / name)
    with pytest.raises(ConfigError, match="leads to the training images"):
        opened(str(tmp_path / "all"), test_data=str(part))
    for i in range(100, 106):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(part / "a" / f"{i}.png")
    notes = opened(str(tmp_path / "all"), test_data=str(part)).notes
    assert sum("25%" in note for note in notes) == 1


def test_labels_that_are_missing_or_all_alike(save: Save) -> None:
    with pytest.raises(DataError, match="the training images have no labels .*; put each class into a folder"):
        opened(save(None))
    with pytest.raises(DataError, match="all 16 labelled training images are of one class, '0'"):
        opened(save([0] * 20))
    assert len(opened(save(None), labelled=False).test) == 4


def test_images_of_another_kind(save: Save) -> None:
    with pytest.raises(ConfigError, match="have 5 channels .* and the model takes 1; give images with 1"):
        opened(save([0, 1] * 5, shape=(8, 8, 5)))
    with pytest.raises(ConfigError, match="model.input_size has 2 numbers"):
        opened(save([0, 1] * 5, shape=(8, 8, 8, 1)))
    measured = opened(save([0, 1] * 5, shape=(8, 8, 5)), channels=None)
    assert next(iter(measured.test.batches())).images.shape[1] == 5


def test_images_of_another_size_are_resampled_and_said(save: Save) -> None:
    data = opened(save([0, 1] * 10, shape=(12, 20, 1)))
    assert data.notes == ("images of 12x20 are cropped and resampled to the model's 8x8",)
    assert next(iter(data.test.batches())).images.shape == (4, 1, 8, 8)


def test_nothing_is_read_before_it_is_asked_for(save: Save) -> None:
    data = opened(save([0, 1] * 10))
    next(iter(data.test.batches()))
    assert "loader" in vars(data.test)
    assert "loader" not in vars(data.train)
    assert data.test.loader.held is not None


def test_some_of_the_images() -> None:
    images, chosen = tiny.digits("val", 30), np.array([*range(12, 17), *range(21, 30)])
    whole, some = (torch.cat([batch.images for batch in item.batches()]) for item in (images, images.only(chosen)))
    assert torch.equal(whole[chosen], some)
    assert images.only(np.arange(30)) is images


@pytest.mark.parametrize("memory_limit", [1.0, 0.0])
def test_an_image_that_cannot_be_read_is_left_out_of_its_batch(tmp_path: Path, memory_limit: float) -> None:
    for i in range(9):
        Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    for i in (2, 8):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    source = open_splits(str(tmp_path))["train"].with_channels(1)
    images = replace(tiny.image_set(source, batch_size=4), data=DataOptions(num_workers=0, memory_limit=memory_limit))
    batches = list(images.batches())
    assert (images.loader.held is not None) == bool(memory_limit)
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 3], [4, 5, 6, 7], []]
    assert [len(batch.images) for batch in batches] == [len(batch.labels) for batch in batches] == [3, 4, 0]
    share, shared = images.shared(ALONE, "reading")
    (features,) = share.of_all_images([batch.images for batch in shared])
    assert len(torch.unique(features, dim=0)) == 7


def test_parts_are_the_splits(save: Save) -> None:
    def sizes(split: str) -> list[int]:
        parts, notes = open_parts(
            DataOptions(source=source), split, ModelInput((8, 8), 1, tiny.NORMALISATION, tiny.CPU)
        )
        assert notes == ()
        return [len(part) for part in parts]

    source = save([0, 1, 2, 1], test=[0, 1], val=[0, 1, 0])
    assert sizes("all") == [4, 3, 2]
    assert sizes("test") == [2]
    source = save([0, 1])
    with pytest.raises(ConfigError, match="split is 'test'; choose from train"):
        sizes("test")


def test_an_exported_model_says_how_images_are_read(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", source=None)
    description = read_description(run / "model.json")
    write_description(run / "model.json", replace(description, reading={"channels": [2]}, window=(8, 8)))
    own = run_data(str(run))
    assert (own.source, own.channels, own.window) == ("", (2,), (8, 8))
    data = own_data(str(run), DataOptions(source="x", group="g", root="r"))
    assert (data.source, data.channels, data.group, data.root) == ("x", (2,), "g", "r")
    with pytest.raises(ConfigError, match="data is not given"):
        own_data(str(run), DataOptions())
    assert own_data("no/folder", DataOptions(source="x")) == DataOptions(source="x")
