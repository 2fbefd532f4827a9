from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_run import NOTE, environment, summary, train_records, val_records, write_metrics, write_pictures
from parsed_page import HOSTILE, Page
from PIL import Image

from torchmae.errors import CheckpointError
from torchmae.report.feature_pictures import pca_picture
from torchmae.report.html import load_reconstructions, settings, write_report
from torchmae.report.pictures import reconstruction_grid, save_png, split_columns
from torchmae.report.run import load_run

FETCHING = {"src", "srcset", "poster", "data", "action", "background", "ping"}


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_answers_in_order(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert page.headings() == [
        "Is my loss good?",
        "What it reconstructs",
        "Curves",
        "Configuration",
        "Environment",
        "Use it",
    ]
    assert "1,500 images from digits" in page.words().split("Is my loss good?")[0]
    assert next(tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")) == "h1"
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_every_final_figure_stands_on_the_page(run_folder: Path) -> None:
    words = page_of(run_folder).words()
    for figure in ("This model 0.500 50.0%", "Interpolation from visible patches 0.600 40.0%"):
        assert figure in words
    # Variance is 0.5 / (1 - 0.5) = 1, which the mean patch's loss equals.
    assert "Mean of visible patches 1.000 0.0%" in words
    assert "Features of kNN Linear probe This model 80.0% 85.0% Raw pixels 60.0% 65.0%" in words
    assert "The same network, untrained 40.0% 55.0%" in words
    assert "Accuracies are of 1,000 held-out images; the model itself saw no label." in words
    assert "from at most 2,000 labelled training images" in words
    assert "predicting zero scores about 1" in words
    assert "last at step 100." in words


def test_a_raw_target_gets_no_remark_on_normalisation(run_folder: Path) -> None:
    (run_folder / "summary.json").write_text(json.dumps(summary(target="pixels")))
    assert "predicting zero" not in page_of(run_folder).words()


def test_the_page_needs_nothing_else(run_folder: Path) -> None:
    page = page_of(run_folder)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in FETCHING:
                assert value.startswith("data:image/")
            if name in ("href", "xlink:href"):
                assert value.startswith(("#", "data:image/"))
    style = page.html[: page.html.index("</style>")]
    assert "@import" not in style and "@font-face" not in style and "url(" not in style
    policy = next(attributes for attributes in page.all("meta") if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'")


def test_every_picture_and_drawing_has_a_text_of_its_own(run_folder: Path) -> None:
    page = page_of(run_folder)
    images, drawings = list(page.all("img")), list(page.all("svg"))
    assert len(images) == 3  # two columns of five triplets, and the progress
    assert len(drawings) == 7
    texts = [image["alt"] for image in images] + [drawing["aria-label"] for drawing in drawings]
    assert all(len(text) > 30 for text in texts)
    assert len(set(texts)) == len(texts)
    assert all(drawing["role"] == "img" for drawing in drawings)


def test_tables_name_their_rows_and_columns(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert {cell["scope"] for cell in page.all("th")} == {"row", "col"}
    labels = [section["aria-labelledby"] for section in page.all("section")]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert set(labels) <= set(identifiers)
    assert len(identifiers) == len(set(identifiers))


def test_the_embedded_pictures_are_the_saved_ones(run_folder: Path) -> None:
    page = page_of(run_folder)
    with Image.open(run_folder / "reconstructions" / "step-00000100.png") as saved:
        saved.load()
    columns = split_columns(saved)
    for attributes, column in zip(page.all("img"), columns, strict=False):
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))) as shown:
            assert shown.tobytes() == column.tobytes()
        assert (int(attributes["width"]), int(attributes["height"])) == column.size
        assert attributes["class"] == "pixelated"
    assert NOTE in page.words()


def test_large_photographs_are_compressed(run_folder: Path) -> None:
    photos = np.random.default_rng(0).random((3, 1, 3, 256, 256), dtype=np.float32)
    reconstruction_grid(*photos, run_folder / "reconstructions" / "step-00000100.png")
    pictures = load_reconstructions(load_run(run_folder))
    assert pictures is not None
    assert not pictures.pixelated
    assert pictures.progress is None  # the earlier picture is of something else
    (column,) = pictures.columns
    assert column.uri.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(column.uri.partition(",")[2]))) as shown:
        assert shown.size == (column.width, column.height)


def test_progress_is_spread_from_the_first_picture_to_the_last(run_folder: Path) -> None:
    write_pictures(run_folder / "reconstructions", tuple(range(10, 101, 10)))
    pictures = load_reconstructions(load_run(run_folder))
    assert pictures is not None and pictures.progress is not None
    assert pictures.step == 100
    assert pictures.progress_steps == (10, 40, 70, 100)


def test_pictures_of_another_making_are_shown_as_they_are(run_folder: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(run_folder / "reconstructions" / "step-00000100.png")
    pictures = load_reconstructions(load_run(run_folder))
    assert pictures is not None
    assert [(column.width, column.height) for column in pictures.columns] == [(30, 20)]
    assert (pictures.headers, pictures.pixelated, pictures.progress) == ((), False, None)
    assert len(list(page_of(run_folder).all("img"))) == 1


def test_a_picture_that_cannot_be_read_is_left_out(run_folder: Path) -> None:
    path = run_folder / "reconstructions" / "step-00000100.png"
    path.write_bytes(path.read_bytes()[:200])
    pictures = load_reconstructions(load_run(run_folder))
    assert pictures is not None and pictures.step == 50
    (run_folder / "reconstructions" / "step-00000050.png").write_bytes(b"nothing")
    assert load_reconstructions(load_run(run_folder)) is None
    assert "What it reconstructs" not in page_of(run_folder).headings()


def test_names_from_outside_are_text_and_nothing_else(run_folder: Path) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["data"]["source"] = HOSTILE
    config[HOSTILE] = HOSTILE
    config["eval"] = {HOSTILE: HOSTILE}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    names = dict.fromkeys(("data", "preset", "state", "target"), HOSTILE)
    (run_folder / "summary.json").write_text(json.dumps(summary(**names)))
    hostile = environment(command=HOSTILE, torchmae=HOSTILE, **{HOSTILE: HOSTILE})
    (run_folder / "environment.json").write_text(json.dumps(hostile))
    (run_folder / "bad_files.txt").write_text(f"{HOSTILE}.png\n")
    blank = np.zeros((1, 1, 8, 8))
    reconstruction_grid(blank, blank, blank, run_folder / "reconstructions" / "step-00000100.png", note=HOSTILE)
    renamed = run_folder.rename(run_folder.with_name("'\"><script>alert(2)<script>"))

    page = page_of(renamed)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert page.words().count(HOSTILE) >= 8


def test_an_unfinished_run_says_so_and_shows_what_there_is(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    page = page_of(run_folder)
    words = page.words()
    assert "has not finished: it stands at step 100" in words
    assert f"torchmae pretrain --resume {run_folder.as_posix()}" in words
    assert "This model 0.500 50.0%" in words and "80.0%" in words
    assert len(list(page.all("svg"))) == 7


def test_a_finished_run_offers_no_resumption(run_folder: Path) -> None:
    words = page_of(run_folder).words()
    assert "--resume" not in words
    assert f"torchmae.load({run_folder.as_posix()!r})" in words
    assert f"--config {run_folder.as_posix()}/config.yaml --out {run_folder.as_posix()}-again" in words


def test_commands_quote_the_folder(run_folder: Path) -> None:
    renamed = run_folder.rename(run_folder.with_name("my run"))
    words = page_of(renamed).words()
    assert f"torchmae reconstruct '{renamed.as_posix()}' IMAGE" in words


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    page = page_of(tmp_path)
    assert "before its first figures" in page.words() and "Cannot say" in page.words()
    assert page.headings() == ["Is my loss good?", "Configuration", "Use it"]
    assert not list(page.all("svg", "img"))


def test_without_labels_there_is_no_knn(run_folder: Path) -> None:
    without = [{key: item for key, item in record.items() if key not in ("knn", "linear")} for record in val_records()]
    write_metrics(run_folder, [*train_records(), *without])
    names = (f"{classifier}{of}" for classifier in ("knn", "linear") for of in ("", "_untrained", "_pixels"))
    (run_folder / "summary.json").write_text(json.dumps(summary(**dict.fromkeys(names))))
    page = page_of(run_folder)
    assert len(list(page.all("svg"))) == 5
    assert "Telling classes apart" not in page.words() and "nearest training images" not in page.words()
    assert page.html.count('<p class="answer">Yes</p>') == 1


def test_a_half_written_line_changes_nothing(run_folder: Path) -> None:
    before = write_report(run_folder).read_bytes()
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "val", "step": 150, "loss": 0.')
    assert write_report(run_folder).read_bytes() == before


def test_the_same_run_gives_the_same_bytes_and_no_other_file(run_folder: Path) -> None:
    files = {path.name for path in run_folder.iterdir()}
    first = write_report(run_folder)
    assert first == run_folder / "report.html"
    before = first.read_bytes()
    assert write_report(run_folder).read_bytes() == before
    assert {path.name for path in run_folder.iterdir()} == files | {"report.html"}


def test_bad_files_are_named_up_to_a_limit(run_folder: Path) -> None:
    assert "could not be read" not in page_of(run_folder).words()
    (run_folder / "bad_files.txt").write_text("".join(f"broken-{i}.png\n" for i in range(1050)))
    words = page_of(run_folder).words()
    assert "broken-19.png" in words and "broken-20.png" not in words
    assert "and 1,030 more" in words


def test_settings_that_differ_from_the_defaults_are_marked(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert re.findall(r"<mark>([^<]*)</mark>", page.html) == ["recipe: digits", "batch_size: 128"]
    sections = dict(settings(load_run(run_folder).config))
    lines = {line.name: line.value for line in sections["data"]}
    assert (lines["crop_scale"], lines["mean"], lines["flip"]) == ("null", "null", "null")


def test_the_shown_configuration_is_yaml(run_folder: Path) -> None:
    config = load_run(run_folder).config
    text = ""
    for section, lines in settings(config):
        indent = "  " if section else ""
        text += f"{section}:\n" if section else ""
        text += "".join(f"{indent}{line.name}: {line.value}\n" for line in lines)
    assert yaml.safe_load(text) == config


def test_a_folder_that_is_no_run_gets_no_page(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variance", [-2.0, 1.0])
def test_bars_stay_inside_their_cells(run_folder: Path, variance: float) -> None:
    (run_folder / "summary.json").write_text(json.dumps(summary(explained_variance=variance)))
    widths = [float(width) for width in re.findall(r"width: ([-\d.]+)%\"></span>", page_of(run_folder).html)]
    assert len(widths) == 9
    assert all(0 <= width <= 100 for width in widths)


def test_what_looks_wrong_stands_below_the_verdict(run_folder: Path) -> None:
    assert "Worth a look." not in page_of(run_folder).words()
    records = [{**record, "data_wait": 0.3} for record in train_records()]
    write_metrics(run_folder, [*records, *[{**record, "loss": 0.7} for record in val_records()]])
    words = page_of(run_folder).words()
    # The loss is the verdict's business.
    assert words.count("Worth a look.") == 1
    assert "Worth a look. Training waited for data for 30.0% of the time" in words


def test_pictures_of_the_features_with_their_own_words(run_folder: Path) -> None:
    images, colours = np.zeros((2, 1, 8, 8), dtype=np.float32), np.ones((2, 4, 4, 3), dtype=np.float32)
    save_png(pca_picture(images, colours), run_folder / "pictures" / "1-features.png")
    Image.new("RGB", (30, 20), "red").save(run_folder / "pictures" / "my_own.png")
    (run_folder / "pictures" / "damaged.png").write_bytes(b"nothing")
    page = page_of(run_folder)
    assert page.headings()[2] == "What it learned"
    assert re.findall(r'<figure class="learned">\s*<h3>([^<]*)', page.html) == ["Patch features as colours", "my own"]
    assert "Patches of the same colour look alike to the model." in page.words()
    alts = [image["alt"] for image in page.all("img")][-2:]
    assert all(len(alt) > 30 for alt in alts) and len(set(alts)) == 2


def test_a_run_of_before_the_linear_probe_has_one_column(run_folder: Path) -> None:
    without = [{key: item for key, item in record.items() if key != "linear"} for record in val_records()]
    write_metrics(run_folder, [*train_records(), *without])
    names = ("linear", "linear_untrained", "linear_pixels")
    (run_folder / "summary.json").write_text(json.dumps(summary(**dict.fromkeys(names))))
    words = page_of(run_folder).words()
    assert "Features of kNN This model 80.0% Raw pixels 60.0%" in words
    assert "logistic regression" not in words


def test_evaluations_stand_under_their_own_units(run_folder: Path) -> None:
    results = [
        {"method": "knn", "subject": subject, "figures": {"knn20": value, "knn20_low": 1.0, "knn20_high": 2.0}}
        for subject, value in (("model", 81.0), ("random", 41.0))
    ]
    anomaly = {"method": "anomaly", "figures": {"anomaly_knn": 0.9012}}
    command = "torchmae evaluate RUN --method knn"
    lines = [anomaly, {"method": "knn", "results": results, "environment": {"command": command}}]
    (run_folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"method"')
    page = page_of(run_folder)
    assert "Evaluations" in page.headings()
    words = page.words()
    assert f"knn Accuracy, % This model Untrained kNN, k = 20 81.0 1.0 to 2.0 41.0 1.0 to 2.0 {command}" in words
    assert "anomaly AUROC This model kNN distance of the mean feature 0.901" in words


def test_a_page_elsewhere_leaves_the_run_alone(run_folder: Path, tmp_path: Path) -> None:
    assert write_report(run_folder, tmp_path / "page.html") == tmp_path / "page.html"
    assert not (run_folder / "report.html").exists()
    assert (tmp_path / "page.html").read_bytes() == write_report(run_folder).read_bytes()
