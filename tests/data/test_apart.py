"""Held-out images that are training images, or look like them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torchmae.cli import main
from torchmae.data import apart
from torchmae.data.apart import check_apart, thumbnails_of
from torchmae.data.arrays import ArraySource
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError


def noise(seed: int, size: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def smooth(seed: int) -> Image.Image:
    return Image.fromarray(noise(seed, 12)).resize((48, 48), Image.Resampling.BICUBIC)


def folder(place: Path, seeds: range, prefix: str = "") -> Path:
    """Pictures of two classes."""
    for seed in seeds:
        path = place / "ab"[seed % 2] / f"{prefix}{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(seed).save(path)
    return place


def source(place: Path) -> Any:
    return open_splits(str(place), Context())["train"]


def test_the_same_pictures_under_other_names_and_behind_links_are_found(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", range(20))
    copies = tmp_path / "copies"
    links = tmp_path / "links"
    for place in (copies, links):
        (place / "a").mkdir(parents=True)
    for i in range(0, 20, 2):
        shutil.copy(train / "a" / f"{i}.png", copies / "a" / f"other{i + 7}.png")
        (links / "a" / f"x{i}.png").symlink_to(train / "a" / f"{i}.png")
    for place in (copies, links, train):
        with pytest.raises(ConfigError, match="test leads to the training images; choose others"):
            check_apart(source(place), source(train), "test", "others")


def test_twins_of_other_size_compression_and_brightness_are_counted(tmp_path: Path) -> None:
    train = source(folder(tmp_path / "train", range(30)))
    place = folder(tmp_path / "test", range(100, 112))
    smooth(3).resize((32, 32)).save(place / "a" / "small.png")
    smooth(4).save(place / "a" / "poor.jpg", quality=40)
    smooth(5).point(lambda value: min(value + 12, 255)).save(place / "b" / "dark.png")
    Image.new("RGB", (48, 48), (9, 9, 9)).save(place / "b" / "blank.png")
    found = check_apart(source(place), train, "test", "others")
    assert (found.twins.number, found.twins.held_out, found.twins.train) == (3, 16, 30)
    assert {Path(one).stem: Path(other).stem for one, other in found.twins.examples}.items() <= {
        ("small", "3"),
        ("poor", "4"),
        ("dark", "5"),
    }
    (note,) = found.notes
    assert "3 of 16" in note and all(name in note for pair in found.twins.examples for name in pair)
    assert check_apart(source(folder(tmp_path / "other", range(50, 60))), train, "test", "others").notes == ()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("length", [9, 40])
def test_thumbnails_are_means_of_places(axes: int, length: int) -> None:
    images = np.random.default_rng(0).random((5, *[length] * axes), dtype=np.float32)
    rows, thumbnails = thumbnails_of(ArraySource(images, context=Context(spatial_dims=axes)))
    assert rows.tolist() == [0, 1, 2, 3, 4]
    side = apart._SIDE[axes]
    assert thumbnails.shape == (5, side**axes)
    first = [slice(0, max(1, length // side))] * axes
    np.testing.assert_allclose(thumbnails[:, 0], images[(slice(None), *first)].reshape(5, -1).mean(1), rtol=1e-5)
    copy = ArraySource(images[[3, 1]] + 0.3, context=Context(spatial_dims=axes))
    assert check_apart(copy, ArraySource(images, context=Context(spatial_dims=axes)), "x", "y").twins.number == 2


def test_looking_ends_in_time_and_at_a_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = source(folder(tmp_path, range(40)))
    monkeypatch.setattr(apart, "MOST", 8)
    assert thumbnails_of(slow)[1].shape == (8, 256)
    read = type(slow).open
    monkeypatch.setattr(apart, "MOST", 40)
    monkeypatch.setattr(apart, "MOST_S", 0.2)
    monkeypatch.setattr(type(slow), "open", lambda self, index: (time.sleep(0.05), read(self, index))[1])
    begun = time.monotonic()
    assert 1 <= len(thumbnails_of(slow)[0]) < 40
    assert time.monotonic() - begun < 1.5


def test_every_command_with_two_sets_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, again = folder(tmp_path / "data", range(20)), tmp_path / "again"
    shutil.copytree(data, again)
    masks = tmp_path / "pairs"
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (masks / split / kind).mkdir(parents=True)
        for i in range(6):
            smooth(i).save(masks / split / "images" / f"{split}{i}.png")
            Image.fromarray((noise(i)[..., 0] > 99).astype(np.uint8)).save(masks / split / "masks" / f"{split}{i}.png")
    pixels = ["evaluate", "pixels", "--preset", "vit_tiny_32_p4", "--progress", "none"]
    random = ["evaluate", "random", *pixels[2:], "--out", str(tmp_path / "out")]
    commands = [
        ["pretrain", "--data", str(data), "--data.val", str(again), "--out", str(tmp_path / "run")],
        [*pixels, "--method", "knn", "--data", str(data), "--test-data", str(again)],
        [*random, "--method", "finetune", "--data", str(data), "--test-data", str(again)],
        [*random, "--method", "segmentation", "--data", str(masks)],
    ]
    for words in commands:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "training images" in line, words


def test_twins_are_in_the_table_the_json_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, test = folder(tmp_path / "data", range(30)), folder(tmp_path / "test", range(100, 110))
    smooth(3).resize((40, 40)).save(test / "b" / "again.png")
    words = ["evaluate", "pixels", "--preset", "vit_tiny_32_p4", "--method", "knn", "--json", "--progress", "none"]
    assert main([*words, "--data", str(data), "--test-data", str(test)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("note: 1 of 11 ") and "again.png" in line for line in lines)
    twins = json.loads(lines[-1])["twins"]
    assert (twins["number"], twins["held_out"], twins["train"]) == (1, 11, 30)
    assert [Path(name).name for name in twins["examples"][0]] == ["again.png", "3.png"]
