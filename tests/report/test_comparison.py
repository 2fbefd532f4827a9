from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_run import environment, summary, write_run
from parsed_page import HOSTILE, Page
from PIL import Image

from torchmae.errors import CheckpointError, ConfigError
from torchmae.report.comparison import setting_rows, write_comparison
from torchmae.report.feature_pictures import pca_picture
from torchmae.report.pictures import read_layout, reconstruction_grid, save_png, strip_grid
from torchmae.report.run import flat


def change(run: Path, changes: dict[str, Any], **figures: Any) -> Path:
    """A run with other settings and other final figures."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (config[section] if section else config)[key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (run / "summary.json").write_text(json.dumps(summary(**figures)))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("base", "fast", "raw")]
    for folder in folders:
        write_run(folder)
    change(folders[1], {"optim.lr": 0.01, "out": "runs/fast"}, loss=0.4, explained_variance=0.6, knn=90.0)
    return folders


def page_of(runs: list[Path], tmp_path: Path) -> Page:
    return Page(write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8"))


def cells(page: Page, label: str) -> list[str]:
    """What the row of a table holds, of the first row with that label."""
    row = re.search(rf'<tr[^>]*><th scope="row">{re.escape(label)}</th>(.*?)</tr>', page.html, re.DOTALL)
    assert row is not None
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


def best(page: Page, label: str) -> list[bool]:
    row = re.search(rf'<tr[^>]*><th scope="row">{re.escape(label)}</th>(.*?)</tr>', page.html, re.DOTALL)
    assert row is not None
    return ["best" in cell for cell in re.findall(r"<td[^>]*>", row[1])]


def test_the_page_has_every_part_in_order(runs: list[Path], tmp_path: Path) -> None:
    page = page_of(runs, tmp_path)
    assert page.headings() == ["What differs", "Figures", "Curves", "What they reconstruct", "Make it again"]
    words = page.words()
    assert words.index("A base") < words.index("B fast") < words.index("C raw")
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert len(list(page.all("svg"))) == 8
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {section["aria-labelledby"] for section in page.all("section", "div") if "aria-labelledby" in section} <= {
        *identifiers
    }


def test_figures_stand_side_by_side_and_the_best_is_marked(runs: list[Path], tmp_path: Path) -> None:
    page = page_of(runs, tmp_path)
    assert cells(page, "Loss") == ["0.500", "0.400", "0.500"]
    assert best(page, "Loss") == best(page, "Explained variance") == [False, True, False]
    assert cells(page, "kNN accuracy") == ["80.0%", "90.0%", "80.0%"]
    assert best(page, "kNN accuracy") == [False, True, False]
    assert cells(page, "of raw pixels") == ["60.0%"] * 3
    assert cells(page, "Linear probe accuracy") == ["85.0%"] * 3
    assert not any(best(page, "Linear probe accuracy"))
    assert cells(page, "Training time") == ["1 min 15 s"] * 3
    assert not any(best(page, "of raw pixels"))


def test_what_is_within_chance_of_the_best_is_as_good(runs: list[Path], tmp_path: Path) -> None:
    # 1,000 images: two standard errors of a difference are 4.5 points.
    change(runs[2], {}, knn=86.0)
    page = page_of(runs, tmp_path)
    assert best(page, "kNN accuracy") == [False, True, True]
    assert "below about 4.5 points may be chance on 1,000 images" in page.words()


def test_losses_of_different_tasks_are_not_ranked(runs: list[Path], tmp_path: Path) -> None:
    change(runs[2], {"mask.ratio": 0.5}, target="pixels", loss=0.1)
    page = page_of(runs, tmp_path)
    assert not any(best(page, "Loss") + best(page, "Explained variance"))
    assert best(page, "kNN accuracy") == [False, True, False]
    assert "The runs differ in mask.ratio, target: their losses" in page.words()


def test_only_settings_that_differ_are_listed(runs: list[Path], tmp_path: Path) -> None:
    (runs[2] / "environment.json").write_text(json.dumps(environment(torch="2.10.0", started="2026-01-01")))
    page = page_of(runs, tmp_path)
    assert cells(page, "optim.lr") == ["null", "0.01", "null"]
    assert cells(page, "torch") == ["2.9.0", "2.9.0", "2.10.0"]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>', page.html.partition('id="figures"')[0])
    assert rows == ["optim.lr", "torch"]


def test_runs_with_the_same_settings_say_so(runs: list[Path], tmp_path: Path) -> None:
    page = page_of([runs[0], runs[2]], tmp_path)
    assert "The runs have the same settings." in page.words()
    assert "Bold" not in page.words()


def test_settings_rows() -> None:
    assert flat({"a": 1, "b": {"c": [2, 3], "d": {"e": None}}}) == {"a": 1, "b.c": [2, 3], "b.d.e": None}
    rows = setting_rows([{"x": [1, 2], "same": 1, "out": "a"}, {"x": [1, 3], "same": 1, "out": "b", "new": True}])
    assert [(row.label, tuple(cell.value for cell in row.cells)) for row in rows] == [
        ("x", ("[1, 2]", "[1, 3]")),
        ("new", ("", "true")),
    ]


def test_the_same_images_are_shown_once(runs: list[Path], tmp_path: Path) -> None:
    page = page_of(runs, tmp_path)
    (picture,) = page.all("img")
    assert "what A, B, C make of it" in picture["alt"]
    assert "A, B, C: masked patches as predicted, with their true mean put back." in page.words()


def test_different_images_are_shown_each(runs: list[Path], tmp_path: Path) -> None:
    other = np.random.default_rng(1).random((5, 1, 8, 8), dtype=np.float32)
    reconstruction_grid(other, other, other, runs[1] / "reconstructions" / "step-00000100.png", min_side=16)
    page = page_of(runs, tmp_path)
    assert len(list(page.all("img"))) == 3
    assert "were shown different images or masks" in page.words()


def test_a_comparison_grid_is_masked_each_model_original() -> None:
    images = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    masked = np.where(np.arange(8) < 4, np.nan, images)
    grids = [reconstruction_grid(masked, images * share, images, note=f"{share}") for share in (0.2, 0.8)]
    grid = strip_grid(grids, num_rows=2)
    layout = read_layout(grids[0])
    assert grid is not None and layout is not None
    width, height = layout.panel
    assert grid.size == (4 * width + 3 * layout.gutter, 2 * height + layout.gutter)
    for column, (source, place) in enumerate([(grids[0], 0), (grids[0], 1), (grids[1], 1), (grids[1], 2)]):
        left, top = layout.corner(1, place)
        truth = source.crop((left, top, left + width, top + height))
        x, y = column * (width + layout.gutter), height + layout.gutter
        assert grid.crop((x, y, x + width, y + height)).tobytes() == truth.tobytes()
    assert strip_grid([grids[0], reconstruction_grid(images, images, images)]) is None
    assert strip_grid([grids[0], Image.new("RGBA", grids[0].size)]) is None


def test_pictures_and_evaluations_of_each_run(runs: list[Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, run in enumerate(runs[:2]):
        images, colours = (rng.random(shape, dtype=np.float32) for shape in ((2, 1, 8, 8), (2, 4, 4, 3)))
        save_png(pca_picture(images, colours), run / "pictures" / "1-features.png")
        figures = {"linear_mean": 50.0 + number, "linear_mean_low": 49.0, "linear_mean_high": 52.0, "anomaly_knn": 0.9}
        options = {"out": run.name, "pool": None}
        line = {"method": "linear", "figures": figures, "options": options, "data": {"test_images": 10}}
        (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n{")
    page = page_of(runs, tmp_path)
    assert "What they learned" in page.headings()
    alts = [image["alt"] for image in page.all("img") if "Patch features" in image["alt"]]
    assert [alt.split(".")[0] for alt in alts] == [
        "Patch features as colours, run A, base",
        "Patch features as colours, run B, fast",
    ]
    words = page.words()
    accuracy, auroc = (words.index(f"By torchmae evaluate: {unit}") for unit in ("Accuracy, %", "AUROC"))
    assert accuracy < words.index("linear probe, patch mean") < auroc < words.index("kNN distance of the mean feature")
    assert [cell.partition("<")[0] for cell in cells(page, "linear probe, patch mean")] == ["50.0", "51.0", "–"]
    assert words.count("49.0 to 52.0") == 2
    assert "not to be compared" not in words


def test_figures_of_other_images_are_not_set_beside_each_other_in_silence(runs: list[Path], tmp_path: Path) -> None:
    for number, run in enumerate(runs[:2]):
        line = {"method": "knn", "figures": {"knn20": 50.0}, "data": {"test_images": 100 * (1 + number)}}
        (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    page = page_of(runs, tmp_path)
    assert [cell.partition("<")[0] for cell in cells(page, "kNN, k = 20 *")] == ["50.0", "50.0", "–"]
    assert "*: not measured on the same images with the same options in every run" in page.words()


def test_curves_go_by_images_seen_or_by_steps_where_a_batch_is_unknown(runs: list[Path], tmp_path: Path) -> None:
    assert "over images seen: A from" in page_of(runs, tmp_path).html
    change(runs[0], {"batch_size": None})
    html = page_of(runs, tmp_path).html
    assert "over steps: A from" in html and "images seen: A" not in html


def test_an_unfinished_run_and_what_looks_wrong(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "summary.json").unlink()
    lines = (runs[1] / "metrics.jsonl").read_text().replace('"data_wait": 0.01', '"data_wait": 0.4')
    (runs[1] / "metrics.jsonl").write_text(lines)
    words = page_of(runs, tmp_path).words()
    assert "This run has not finished: it stands at step 100, or was stopped there." in words
    assert words.count("Worth a look.") == 1 and "waited for data for 40.0%" in words


def test_folders_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "other" / "base"
    shutil.copytree(runs[0], twin)
    words = page_of([runs[0], twin], tmp_path).words()
    assert f"A {runs[0].as_posix()}" in words and f"B {twin.as_posix()}" in words


def test_the_page_needs_nothing_else_and_names_are_text(runs: list[Path], tmp_path: Path) -> None:
    change(runs[0], {"recipe": HOSTILE, HOSTILE: 1}, data=HOSTILE, preset=HOSTILE)
    (runs[1] / "evaluations.jsonl").write_text(json.dumps({"method": HOSTILE, "figures": {HOSTILE: 1.0}}))
    renamed = runs[2].rename(runs[2].with_name("'\"><script>alert(2)<script>"))
    page = page_of([*runs[:2], renamed], tmp_path)
    assert not {"script", "iframe", "object", "embed", "link rel=stylesheet"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert page.words().count(HOSTILE) >= 3


def test_the_same_runs_give_the_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    first = write_comparison(runs, tmp_path / "a.html").read_bytes()
    assert write_comparison(runs, tmp_path / "b.html").read_bytes() == first


def test_wrong_runs(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(ConfigError, match="1 runs cannot be compared on one page; give 2 to 16"):
        write_comparison(runs[:1], page)
    with pytest.raises(ConfigError, match="17 runs"):
        write_comparison(runs[:1] * 17, page)
    with pytest.raises(ConfigError, match="is given twice"):
        write_comparison([runs[0], runs[1], runs[0] / ".." / "base"], page)
    with pytest.raises(CheckpointError, match="does not exist"):
        write_comparison([runs[0], tmp_path / "nowhere"], page)
    assert not page.exists()
