from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchmae.report.feature_pictures import attention_picture, neighbours_picture, pca_picture, ratios_picture
from torchmae.report.panels import MASKED, Look, heat, map_panel
from torchmae.report.pictures import save_png

SIDE = 112  # 8 x 8 pixels, 14 times as large
GUTTER = 4


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def panel(picture: Image.Image, left: int, top: int) -> np.ndarray:
    return np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)).convert("RGB"))


def first_row(picture: Image.Image, rows: int, extra: int = 0) -> int:
    """Where the panels begin below the headers."""
    return picture.height - rows * (SIDE + GUTTER) + GUTTER - extra


def as_bytes(values: np.ndarray, factor: int) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)


def test_colours_stand_beside_their_images() -> None:
    images, colours = random(6, 3, 8, 8), random(6, 4, 4, 3)
    picture = pca_picture(images, colours)
    assert picture.width == 8 * SIDE + 7 * GUTTER + 3 * 2 * GUTTER  # four pairs in a row
    top = first_row(picture, 2)
    step = 2 * (SIDE + GUTTER) + 2 * GUTTER
    for number in (0, 3):
        left = number * step
        assert (panel(picture, left, top) == as_bytes(images[number].transpose(1, 2, 0), 14)).all()
        assert (panel(picture, left + SIDE + GUTTER, top) == as_bytes(colours[number], 28)).all()
    second = top + SIDE + GUTTER
    assert (panel(picture, SIDE + GUTTER, second) == as_bytes(colours[4], 28)).all()


def test_attention_has_its_mean_and_each_head_on_its_own_scale() -> None:
    attention = random(2, 3, 4, 4)
    picture = attention_picture(random(2, 1, 8, 8), attention)
    assert picture.width == 5 * SIDE + 4 * GUTTER + 2 * GUTTER
    top = first_row(picture, 2)
    for column, values in enumerate([attention[0].mean(0), *attention[0]], 1):
        left = column * (SIDE + GUTTER) + 2 * GUTTER
        assert (panel(picture, left, top) == as_bytes(heat(values / values.max()), 28)).all()


def test_one_head_needs_no_mean_and_no_attention_is_dark() -> None:
    picture = attention_picture(random(1, 1, 8, 8), np.zeros((1, 1, 2, 2), dtype=np.float32))
    assert picture.width == 2 * SIDE + 3 * GUTTER
    dark = np.round(heat(np.zeros(1, dtype=np.float32))[0] * 255)
    assert (panel(picture, SIDE + 3 * GUTTER, first_row(picture, 1)) == dark).all()


def test_neighbours_stand_in_the_order_given_with_captions_below() -> None:
    queries, neighbours = random(2, 1, 8, 8), random(2, 3, 1, 8, 8)
    plain = neighbours_picture(queries, neighbours, [[""] * 3] * 2, ["", ""])
    captions = [["0.98 ship", "0.71 dog", "0.70 " + "x" * 99], ["a", "b", "c"]]
    picture = neighbours_picture(queries, neighbours, captions, ["ship", ""])
    line = (picture.height - plain.height) // 2
    assert line > 10 and picture.width == plain.width == 4 * SIDE + 5 * GUTTER
    top = first_row(plain, 2)
    for column in range(3):
        left = (column + 1) * (SIDE + GUTTER) + 2 * GUTTER
        truth = as_bytes(neighbours[0, column, 0], 14)[..., None]
        assert (panel(picture, left, top) == truth).all()
        written = np.asarray(picture.crop((left, top + SIDE, left + SIDE, top + SIDE + line)))[..., 3]
        assert written.any()
    gap = np.asarray(picture.crop((left - GUTTER, top + SIDE, left, top + SIDE + line)))
    assert not gap[..., 3].any()


def test_ratios_show_what_is_seen_above_what_is_made_of_it() -> None:
    originals = random(2, 1, 8, 8)
    masked = [np.where(np.arange(8) < hidden, np.nan, originals) for hidden in (2, 6)]
    filled = [1 - originals, originals / 2]
    picture = ratios_picture(originals, masked, filled, [0.25, 0.75], "as predicted")
    top = picture.height - 4 * (SIDE + GUTTER) + GUTTER - 2 * GUTTER
    for column, hidden in ((1, 2), (2, 6)):
        left = column * (SIDE + GUTTER) + 2 * GUTTER
        seen = panel(picture, left, top)
        assert (seen[:, : 14 * hidden] == MASKED).all()
        assert (seen[:, 14 * hidden :] == as_bytes(originals[0, 0], 14)[:, 14 * hidden :, None]).all()
        made = panel(picture, left, top + SIDE + GUTTER)
        assert (made == as_bytes(filled[column - 1][0, 0], 14)[..., None]).all()
    assert (panel(picture, 0, top) == as_bytes(originals[0, 0], 14)[..., None]).all()
    below = picture.crop((0, top + SIDE + GUTTER, SIDE, top + 2 * SIDE))
    assert not np.asarray(below)[..., 3].any()  # the original is not shown twice
    assert "as predicted" in picture.info["Description"]


@pytest.mark.parametrize("size", [(40,), (6, 10), (4, 6, 6)])
def test_signals_images_and_volumes_have_every_kind(size: tuple[int, ...]) -> None:
    images = random(2, 2, *size)
    grid = tuple(side // 2 for side in size)
    masked = images.copy()
    masked[..., : size[-1] // 2] = np.nan
    look = Look("volume")
    length = int(np.prod(grid))
    images, masked = look.flat(images), look.flat(masked)
    attention = np.moveaxis(look.spread(random(2, length, 2), grid, size), -1, 1)
    pictures = [
        pca_picture(images, look.spread(random(2, length, 3), grid, size)),
        attention_picture(images, attention),
        neighbours_picture(images, np.stack([images, images], 1), [["a", "b"]] * 2, ["c", "d"]),
        ratios_picture(images, [masked], [images], [0.5], "note"),
    ]
    for picture in pictures:
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 4


def test_a_map_of_one_axis() -> None:
    strip = random(5, 3)
    assert (np.asarray(map_panel(strip, (50, 20))) == as_bytes(strip[None], 1).repeat(20, 0).repeat(10, 1)).all()


def test_a_saved_picture_says_what_it_shows(tmp_path: Path) -> None:
    save_png(pca_picture(random(1, 1, 8, 8), random(1, 4, 4, 3)), tmp_path / "a" / "b.png")
    with Image.open(tmp_path / "a" / "b.png") as saved:
        saved.load()
        assert saved.mode == "RGBA"
        assert saved.info["Title"] == "Patch features as colours"
        assert saved.info["Description"].endswith(".")
