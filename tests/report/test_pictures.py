from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchmae.errors import CheckpointError
from torchmae.report.panels import MASKED
from torchmae.report.pictures import (
    GridLayout,
    read_layout,
    reconstruction_grid,
    save_png,
    split_columns,
    strip_grid,
)


def grid_of(shape: tuple[int, ...], **options: int) -> tuple[Image.Image, GridLayout, np.ndarray]:
    """A grid whose upper left quarter (half of a signal) is hidden; its layout; its originals."""
    original = np.random.default_rng(0).random(shape, dtype=np.float32)
    masked = original.copy()
    masked[(..., *(slice(size // 2) for size in shape[2:]))] = np.nan
    grid = reconstruction_grid(masked, 1 - original, original, **options)
    layout = read_layout(grid)
    assert layout is not None
    return grid, layout, original


def panel(grid: Image.Image, layout: GridLayout, triplet: int, place: int) -> np.ndarray:
    left, top = layout.corner(triplet, place)
    width, height = layout.panel
    return np.asarray(grid.crop((left, top, left + width, top + height)).convert("RGB"))


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [(1, 1, 1), (4, 1, 4), (5, 2, 3), (8, 2, 4)],
)
def test_size_of_the_grid(count: int, columns: int, rows: int) -> None:
    grid, layout, _ = grid_of((count, 1, 8, 8), min_side=96)
    assert (layout.columns, layout.scale, layout.panel) == (columns, 12, (96, 96))
    assert layout.gutter == 4
    column = 3 * 96 + 2 * 4
    assert grid.width == columns * column + (columns - 1) * 3 * 4
    assert grid.height == layout.top + rows * 96 + (rows - 1) * 4


def test_the_number_of_columns_can_be_chosen() -> None:
    _, layout, _ = grid_of((6, 1, 8, 8), triplets_per_row=3)
    assert layout.columns == 3


def test_visible_pixels_are_the_original_and_hidden_ones_grey() -> None:
    grid, layout, original = grid_of((2, 1, 8, 8), min_side=80)
    for triplet in range(2):
        seen = panel(grid, layout, triplet, 0)
        truth = as_bytes(original[triplet, 0]).repeat(10, 0).repeat(10, 1)
        filled = as_bytes(1 - original[triplet, 0]).repeat(10, 0).repeat(10, 1)
        assert (seen[:40, :40] == MASKED).all()
        assert (seen[40:] == truth[40:, :, None]).all()
        assert (seen[:40, 40:] == truth[:40, 40:, None]).all()
        assert (panel(grid, layout, triplet, 1) == filled[..., None]).all()
        assert (panel(grid, layout, triplet, 2) == truth[..., None]).all()


def test_three_channels_are_rgb_and_more_show_their_first_three() -> None:
    for channels in (3, 5):
        grid, layout, original = grid_of((1, channels, 6, 10), min_side=1)
        assert layout.scale == 1
        left, top = layout.corner(0, 2)
        shown = np.asarray(grid.crop((left, top, left + 10, top + 6)).convert("RGB"))
        assert (shown == as_bytes(original[0, :3]).transpose(1, 2, 0)).all()


def test_two_channels_show_the_grey_of_their_mean() -> None:
    grid, layout, original = grid_of((1, 2, 64, 80), min_side=1)
    shown = panel(grid, layout, 0, 2)[:, :80]
    assert np.abs(shown[..., 0].astype(int) - original[0].mean(0) * 255).max() <= 0.51
    assert (shown == shown[..., :1]).all()


def test_a_value_hidden_in_one_channel_alone_becomes_a_half() -> None:
    original = np.ones((1, 3, 4, 4), dtype=np.float32)
    masked = original.copy()
    masked[0, 1, 0, 0] = np.nan
    grid = reconstruction_grid(masked, original, original, min_side=4)
    layout = read_layout(grid)
    assert layout is not None
    assert panel(grid, layout, 0, 0)[0, 0].tolist() == [255, 128, 255]


def test_values_outside_zero_to_one_are_clipped() -> None:
    images = np.array([-3.0, 7.0], dtype=np.float32).reshape(1, 1, 1, 2)
    grid = reconstruction_grid(images, images, images, min_side=2)
    layout = read_layout(grid)
    assert layout is not None
    assert panel(grid, layout, 0, 0)[0, :2, 0].tolist() == [0, 255]


def test_a_volume_shows_its_three_middle_planes() -> None:
    grid, layout, original = grid_of((1, 1, 5, 8, 8), min_side=16)  # three planes of 8 columns, with gaps of 1
    shown = panel(grid, layout, 0, 2)[..., 0]
    volume = as_bytes(original[0, 0])
    for left, plane in ((0, volume[2]), (9, volume[:, 4]), (18, volume[:, :, 4])):
        assert (shown[: len(plane), left : left + 8] == plane).all()


def test_a_signal_is_a_line_with_grey_where_it_is_hidden() -> None:
    grid, layout, _ = grid_of((2, 2, 32), min_side=48)
    assert layout.panel == (3 * 48, 48)
    seen, truth = panel(grid, layout, 0, 0), panel(grid, layout, 0, 2)
    assert (seen[:, :72] == MASKED).all()
    # The original's line comes in from what is hidden; past that the two are the same.
    assert (seen[:, 78:] == truth[:, 78:]).all()
    background = truth[0, 0]
    ink_per_column = (truth != background).any(axis=2).sum(axis=0)
    assert (ink_per_column[3:-3] >= 1).all()


def test_a_constant_signal_is_drawn_in_the_middle() -> None:
    signal = np.full((1, 1, 16), 7.0, dtype=np.float32)
    grid = reconstruction_grid(signal, signal, signal, min_side=41)
    layout = read_layout(grid)
    assert layout is not None
    rows = np.flatnonzero((panel(grid, layout, 0, 2) != panel(grid, layout, 0, 2)[0, 0]).any(axis=(1, 2)))
    assert abs(rows.mean() - 20) <= 1


def test_a_lone_visible_sample_is_drawn() -> None:
    signal = np.linspace(0, 1, 9, dtype=np.float32).reshape(1, 1, 9)
    masked = np.full_like(signal, np.nan)
    masked[0, 0, 4] = signal[0, 0, 4]
    grid = reconstruction_grid(masked, signal, signal, min_side=60)
    layout = read_layout(grid)
    assert layout is not None
    blue = (panel(grid, layout, 0, 0) == (11, 95, 174)).all(axis=2)
    assert blue.any()


def test_tensors_and_arrays_give_the_same_picture() -> None:
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    from_arrays = reconstruction_grid(images, images, images)
    tensor = torch.from_numpy(images).requires_grad_()
    assert reconstruction_grid(tensor, tensor, tensor).tobytes() == from_arrays.tobytes()


def test_headers_are_drawn_and_the_rest_is_transparent() -> None:
    grid, layout, _ = grid_of((5, 1, 8, 8))
    alpha = np.asarray(grid)[..., 3]
    assert layout.column_step == layout.column_width + 3 * layout.gutter
    for column in range(2):
        for place in range(3):
            left, top = layout.corner(column, place)
            assert alpha[:top, left : left + layout.panel[0]].any()
    # The sixth place of five triplets stays empty.
    left, top = layout.corner(5, 0)
    assert not alpha[top:, left:].any()


def test_narrow_images_make_room_for_their_headers() -> None:
    grid, layout, original = grid_of((1, 1, 64, 4), min_side=64)
    assert layout.panel[0] > 50
    left, top = layout.corner(0, 2)
    shown = np.asarray(grid.crop((left, top, left + 4, top + 64)))[..., 0]
    assert (shown == as_bytes(original[0, 0])).all()


def test_a_saved_grid_keeps_pixels_and_layout(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    path = tmp_path / "new" / "grid.png"
    grid = reconstruction_grid(images, images, images, path, note="as predicted")
    with Image.open(path) as saved:
        saved.load()
    assert saved.tobytes() == grid.tobytes()
    assert read_layout(saved) == read_layout(grid)
    layout = read_layout(saved)
    assert layout is not None and layout.note == "as predicted"
    assert list(path.parent.iterdir()) == [path]


def test_saving_where_a_file_is_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match="cannot write .*: Not a directory; free space, or name another folder"
    ) as raised:
        save_png(Image.new("RGB", (2, 2)), tmp_path / "file" / "x" / "grid.png")
    assert "\n" not in str(raised.value)


def test_columns_hold_every_triplet_without_headers() -> None:
    grid, layout, _ = grid_of((5, 1, 8, 8))
    columns = split_columns(grid)
    assert [column.size for column in columns] == [(layout.column_width, grid.height - layout.top)] * 2
    width, height = layout.panel
    second = np.asarray(columns[1].crop((0, 0, width, height)).convert("RGB"))
    assert (second == panel(grid, layout, 1, 0)).all()


def test_another_picture_is_one_column() -> None:
    photo = Image.new("RGB", (30, 20))
    photo.info["torchmae"] = '{"columns": 2}'
    assert read_layout(photo) is None
    assert split_columns(photo) == [photo]


def test_progress_shows_each_moment_between_masked_and_original() -> None:
    original = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    masked = original.copy()
    masked[..., :4] = np.nan
    moments = [np.full_like(original, level) for level in (0.2, 0.4, 0.6)]
    grids = [reconstruction_grid(masked, moment, original) for moment in moments]
    layout = read_layout(grids[0])
    assert layout is not None
    picture = strip_grid(grids, num_rows=4)
    assert picture is not None
    width, height, gutter = *layout.panel, layout.gutter
    assert picture.size == (5 * width + 4 * gutter, 4 * height + 3 * gutter)
    for row in range(4):
        top = row * (height + gutter)
        lefts = [i * (width + gutter) for i in range(5)]
        cells = [np.asarray(picture.crop((x, top, x + width, top + height)).convert("RGB")) for x in lefts]
        assert (cells[0] == panel(grids[0], layout, row, 0)).all()
        assert [cell.max() for cell in cells[1:4]] == [cell.min() for cell in cells[1:4]] == [51, 102, 153]
        assert (cells[4] == panel(grids[0], layout, row, 2)).all()


def test_no_progress_of_grids_that_differ() -> None:
    few, _, _ = grid_of((2, 1, 8, 8))
    many, _, _ = grid_of((3, 1, 8, 8))
    assert strip_grid([few, many]) is None
    assert strip_grid([Image.new("RGB", (4, 4))]) is None
