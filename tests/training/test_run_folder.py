from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from torchmae.errors import CheckpointError, ConfigError
from torchmae.training.run_folder import RunFolder


def test_a_new_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "a")
    assert folder.path.is_dir()
    assert list(folder.path.iterdir()) == []
    assert RunFolder.create(folder.path).path == folder.path  # an empty one will do


def test_what_a_write_that_was_cut_short_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".writing-config.yaml").write_text("recipe:")
    RunFolder.create(tmp_path)


def test_folders_that_cannot_take_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    run = tmp_path / "run"
    for path, message in (
        (run, f"{run} holds a run already; resume it with --resume {run}, or choose another --out"),
        (tmp_path / "full", f"{tmp_path}/full exists and is not an empty folder; choose another --out"),
        (tmp_path / "file", f"{tmp_path}/file exists and is not an empty folder; choose another --out"),
        (tmp_path / "file" / "a", f"cannot write to {tmp_path}/file/a: Not a directory; choose another --out"),
    ):
        with pytest.raises(ConfigError) as caught:
            RunFolder.create(path)
        assert str(caught.value) == message


@pytest.mark.parametrize("kept", ["checkpoints/step-00000001", "model.safetensors", "metrics.jsonl", None])
def test_a_run_that_took_no_step_is_begun_anew(tmp_path: Path, kept: str | None) -> None:
    run = RunFolder.create(tmp_path / "a")
    for name in ("config.yaml", "environment.json", "tracking.json", "metrics.jsonl", "checkpoints/step-00000000"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text('{"kind": "baseline"}\n')
    if kept is None:
        RunFolder.create(run.path).clear_start()
        assert list(run.path.iterdir()) == []
        return
    (run.path / kept).write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder.create(run.path)


def test_runs_that_start_at_once_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path / "runs" / "a", rename=True).path.name, range(8)))
    assert sorted(made) == ["a", *(f"a-{number}" for number in range(2, 9))]
    again = RunFolder.create(tmp_path / "runs" / "a", rename=True)
    again.close()
    assert again.path.name == "a-9" and not again.path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied; choose another --out"):
        RunFolder.create(tmp_path / "locked" / "a")


def test_only_an_empty_folder_of_its_own_is_discarded(tmp_path: Path) -> None:
    mine = RunFolder.create(tmp_path / "mine")
    mine.close()
    assert not mine.path.exists()
    (tmp_path / "theirs").mkdir()
    RunFolder.create(tmp_path / "theirs").close()
    assert (tmp_path / "theirs").exists()
    gone = RunFolder.create(tmp_path / "gone")
    shutil.rmtree(gone.path)
    gone.close()
    used = RunFolder.create(tmp_path / "used")
    used.write_text("config.yaml", "")
    used.close()
    assert used.config.exists()


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "is not a run folder (it has no config")):
        with pytest.raises(CheckpointError) as caught:
            RunFolder.open(path)
        assert str(caught.value).startswith(f"{path} {reason}")
        assert str(caught.value).endswith("; give the folder that `torchmae pretrain --out` made")
    (tmp_path / "config.yaml").write_text("")
    assert RunFolder.open(tmp_path).config == tmp_path / "config.yaml"


def test_metrics_are_rewound_to_a_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    lines = [{"kind": "baseline", "step": 0, "knn": 0.1 + 0.2}, *({"kind": "train", "step": i} for i in range(1, 5))]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    folder.metrics.write_text(whole + '{"kind": "train", "st')
    assert folder.read_metrics() == lines
    folder.rewind_metrics(9)
    assert folder.metrics.read_text() == whole
    folder.rewind_metrics(2)
    assert folder.read_metrics() == lines[:3]
    folder.rewind_metrics(-1)
    assert folder.metrics.read_text() == ""


def test_results_of_an_interrupted_part_are_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("model.safetensors", "summary.json", "model.json", "metrics.jsonl"):
        folder.write_text(name, "{}")
    folder.remove_results()
    folder.remove_results()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "model.json"]


def test_the_first_start_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.first_start() == {}
    started = {"command": "torchmae pretrain", "started": "2026-01-01T00:00:00+00:00", "job": "a-job"}
    folder.write_json("environment.json", {"torch": "2.9.0", **started})
    assert folder.first_start() == started
    for text in ("{", "[]"):
        folder.write_text("environment.json", text)
        assert folder.first_start() == {}
