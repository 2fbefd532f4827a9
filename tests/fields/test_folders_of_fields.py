"""Folders as practitioners have them, given to `pretrain --data` with nothing else: recipe, what is read and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from field_files import clip, scene, slice_file, sound, volume
from PIL import Image

from torchmae import presets
from torchmae.api import configure
from torchmae.building import overrides
from torchmae.config import PretrainConfig
from torchmae.data.opening import open_data
from torchmae.settings import read_words

RNG = np.random.default_rng(0)


def slices_without_suffix(folder: Path) -> None:
    for number in range(6):
        slice_file(folder / f"IM{number:04}", RNG.integers(0, 4096, (96, 80)).astype(np.uint16))


def packed_volumes(folder: Path) -> None:
    for number in range(6):
        volume(folder / f"{number}.nii.gz", RNG.normal(size=(64, 70, 20)).astype(np.float32))


def tiles_with_no_data(folder: Path) -> None:
    for number in range(6):
        values = RNG.integers(1, 9000, (12, 64, 64)).astype(np.uint16)
        values[:, :20, : 10 * number] = 0
        scene(folder / f"{number}.tif", values, [f"B{band}" for band in range(12)], nodata=0)


def one_scene(folder: Path) -> None:
    scene(folder / "scene.tif", RNG.integers(1, 9000, (4, 400, 4000)).astype(np.uint16))


def one_picture(folder: Path) -> None:
    Image.fromarray(RNG.integers(0, 255, (2000, 2400, 3)).astype(np.uint8)).save(folder / "scan.jpg")


def stacks(folder: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for number in range(4):
        pages = RNG.integers(0, 60_000, (8, 5, 64, 64)).astype(np.uint16)
        tifffile.imwrite(folder / f"{number}.ome.tif", pages, ome=True, metadata={"axes": "ZCYX"})


def recordings(folder: Path) -> None:
    for number in range(6):
        sound(folder / f"{number}.wav", RNG.uniform(-0.5, 0.5, (6000 + 3000 * number, 1)), 8000)


def clips(folder: Path) -> None:
    for number in range(6):
        clip(folder / f"{number}.mp4", 20 + number, "mpeg4")


def mixed(folder: Path) -> None:
    clips(folder)
    for number in range(9):
        Image.fromarray(RNG.integers(0, 255, (80, 90, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("of the day")


@pytest.mark.parametrize(
    ("make", "recipe", "size", "channels", "window", "said"),
    [
        (slices_without_suffix, "photos-64-cpu", (64, 64), 1, None, "12-bit values in uint16"),
        (packed_volumes, "volumes", (64, 64, 16), 1, None, ""),
        (tiles_with_no_data, "satellite", (32, 32), 12, (32, 32), "hold no data"),
        (one_scene, "satellite", (32, 32), 4, (32, 32), "windows of 32x32"),
        (one_picture, "photos-64-cpu", (64, 64), 3, (64, 64), "windows of 64x64"),
        (stacks, "photos-64-cpu", (64, 64), 5, None, "page 1 of 8"),
        (recordings, "sound", (64, 64), 1, (64, 64), "windows of 64x64"),
        (clips, "video", (8, 64, 64), 3, (8, 0, 0), "one in 2 along time"),
        (mixed, "photos-64-cpu", (64, 64), 3, None, "6 .mp4, 1 .txt not used"),
    ],
)
def test_a_folder_and_nothing_else(
    make: Callable[[Path], None],
    recipe: str,
    size: tuple[int, ...],
    channels: int,
    window: tuple[int, ...] | None,
    said: str,
    tmp_path: Path,
) -> None:
    make(tmp_path)
    config = configure(read_words(["--data", str(tmp_path), "--progress", "none"], PretrainConfig))
    shape = presets.arguments(config.model.preset, **overrides(config))["input_size"]
    data = open_data(config.data, input_size=shape, channels=None, device=torch.device("cpu"))
    notes = "; ".join(data.notes)
    assert (config.recipe, shape, data.channels, data.window) == (recipe, size, channels, window), notes
    assert said in notes
    assert "share name" not in notes
    batch = next(iter(data.train.eval_batches(np.arange(2), 2)))
    assert batch.images.shape == (2, channels, *size)
    assert bool(batch.images.isfinite().all())
