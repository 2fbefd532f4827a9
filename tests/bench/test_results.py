from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from torchmae.bench.results import Report, Result

ENVIRONMENT = {"processor": "a processor", "threads": 2, "torch": "2.0"}
OURS = Result(
    "ours", (900.0, 1000.0, 1300.0), {"forward": 0.25, "backward": 0.75}, {"peak_memory": 3 * 2**29, "x": 1.0}
)
THEIRS = Result("theirs", (50.0, 40.0, 44.0), {"forward": 1.0}, {"peak_memory": None, "share_of_peak": 0.125})
REPORT = Report("a title", [OURS, THEIRS], ["A note."], ENVIRONMENT, {"seed": 1})


def test_a_ratio_is_one_of_medians() -> None:
    assert REPORT.ratios() == {"theirs": pytest.approx(1000 / 44)}


def test_the_table_holds_every_figure() -> None:
    title, machine, blank, headings, _, ours, theirs, *rest = REPORT.text().splitlines()
    assert (title, machine, blank) == ("a title", "a processor, threads 2, torch 2.0", "")
    columns = [" ".join(line.split()) for line in (headings, ours, theirs)]
    assert columns == [
        "images/s low - high ratio memory, GiB of peak forward backward",
        "ours 1,000 900 - 1,300 1.50 - 25% 75%",
        "theirs 44.0 40.0 - 50.0 22.73 - 12.5% 100%",
    ]
    assert [line for line in rest if line] == [
        "Ratio: ours over the row's, of the medians of 3 rounds.",
        "A note.",
    ]


def test_one_contender_has_no_ratio() -> None:
    text = Report("a title", [OURS], [], ENVIRONMENT, {}).text()
    assert "atio" not in text


def test_the_record_holds_rounds_ratios_and_settings() -> None:
    record = json.loads(json.dumps(REPORT.record()))
    assert record["results"][0]["images_per_s"] == [900, 1000, 1300]
    assert record["results"][0]["median"] == 1000
    assert record["results"][1]["figures"] == {"peak_memory": None, "share_of_peak": 0.125}
    assert record["ratios"] == REPORT.ratios()
    assert (record["settings"], record["environment"]) == ({"seed": 1}, ENVIRONMENT)


@pytest.mark.parametrize("results", [[OURS, THEIRS], [Result("ours", (1.0,))]], ids=["shares", "speed alone"])
def test_the_picture_is_one(results: list[Result], tmp_path: Path) -> None:
    Report("a title", results, [], ENVIRONMENT, {}).write_plot(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.size[0] == 1200
