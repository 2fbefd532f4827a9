from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import train_records, write_metrics

from torchmae.errors import CheckpointError
from torchmae.report.run import load_run


def test_a_finished_run_is_read_whole(run_folder: Path) -> None:
    (run_folder / "bad_files.txt").write_text("a.png\n\nb.png\n")
    run = load_run(run_folder)
    assert [record["step"] for record in run.train] == list(range(10, 101, 10))
    assert [record["step"] for record in run.val] == [50, 100]
    assert run.config["batch_size"] == 128
    assert run.summary["knn"] == 80.0
    assert run.environment["torch"] == "2.9.0"
    assert [step for step, _ in run.pictures] == [50, 100]
    assert run.bad_files == ("a.png", "b.png")


def test_a_half_written_line_is_passed_over(run_folder: Path) -> None:
    before = load_run(run_folder)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 110, "lo')
    assert load_run(run_folder) == before


@pytest.mark.parametrize("line", ["[1, 2]", "3", '{"kind": "train"}', '{"kind": "train", "step": "x"}', "\x00"])
def test_a_line_that_is_no_record_is_passed_over(run_folder: Path, line: str) -> None:
    before = load_run(run_folder)
    path = run_folder / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    assert load_run(run_folder) == before


def test_what_a_resumed_run_repeats_counts_once_and_the_later_figure_wins(run_folder: Path) -> None:
    records = train_records()
    write_metrics(run_folder, [*records, {**records[3], "loss": 9.0}, {"kind": "train", "step": 40, "lr": 5.0}])
    run = load_run(run_folder)
    assert len(run.train) == len(records)
    assert (run.train[3]["loss"], run.train[3]["lr"], run.train[3]["epoch"]) == (9.0, 5.0, records[3]["epoch"])


def test_what_is_missing_is_empty(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    run = load_run(tmp_path)
    assert run.config == {"seed": 1}
    assert (run.train, run.val, run.baseline, run.pictures, run.bad_files) == ((), (), (), (), ())
    assert (run.summary, run.environment) == ({}, {})


@pytest.mark.parametrize("text", ["{", "[1]", "", "a: [", "\ttab: 1"])
def test_damaged_files_are_empty(run_folder: Path, text: str) -> None:
    for name in ("config.yaml", "summary.json", "environment.json"):
        (run_folder / name).write_text(text)
    run = load_run(run_folder)
    assert (run.config, run.summary, run.environment) == ({}, {}, {})


def test_other_files_among_the_pictures_are_no_pictures(run_folder: Path) -> None:
    for name in ("step-.png", "step-x.png", "other.png", "step-1.jpg"):
        (run_folder / "reconstructions" / name).touch()
    assert [step for step, _ in load_run(run_folder).pictures] == [50, 100]


@pytest.mark.parametrize(("name", "problem"), [("", "holds neither"), ("nowhere", "does not exist")])
def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as raised:
        load_run(tmp_path / name)
    assert "\n" not in str(raised.value) and "torchmae pretrain" in str(raised.value)
