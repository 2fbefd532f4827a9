"""`TRY=1 benchmarks/gpu.sh`: every quick part runs on a processor, and its file holds what a reader looks for.

The parts take two minutes together, so they are tried where TORCHMAE_TEST_GPU_SCRIPT is set, as `.ci/run` does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="gpu.sh uses coreutils' timeout")


def run(*parts: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = {"OUT": str(out), "PYTHON": sys.executable, "TRY": "1", **environment}
    return subprocess.run(
        ["sh", str(BENCHMARKS / "gpu.sh"), *parts], env=os.environ | words, capture_output=True, text=True, check=False
    )


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.skipif("TORCHMAE_TEST_GPU_SCRIPT" not in os.environ, reason="two minutes: set TORCHMAE_TEST_GPU_SCRIPT")
def test_parts_are_measured_and_written(tmp_path: Path) -> None:
    done = run("quick", "learn", "profile", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    ran = read(tmp_path / "run.json")
    assert 0 < ran["killed_at"] < ran["steps"]
    assert ran["last_loss"] < ran["first_loss"]
    assert ran["images_per_s"] > 0
    assert 0 <= ran["knn20"] <= 100
    assert 0 <= ran["linear_mean"] <= 100
    assert ran["check"].startswith("check: ")
    assert ran["feature_distance"] < 1e-3
    assert set(ran["seconds"]) == {"pack", "until killed", "resumed to the end", "knn", "linear", "export", "reload"}

    (case,) = read(tmp_path / "steps.json")["cases"].values()
    rows = case["steps"]
    assert set(rows) == {"eager", "compiled", "transformers"}
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["images_per_s"] / rows["transformers"]["images_per_s"])
        share = row["images_per_s"] * case["gflop_per_image"] / 1e3 / case["peak_tflops"]
        assert row["share_of_peak"] == pytest.approx(share)

    assert {result["name"] for result in read(tmp_path / "loop-4.json")["results"]} == {"torchmae", "bare step"}

    learned = read(tmp_path / "learn.json")
    assert learned["pretrain_seconds"] > 0
    assert learned["pretrained_epochs"] >= 2
    assert 0 <= learned["pretrained"]["finetune"] <= 100
    assert learned["environment"]["torch"]

    profiled = read(tmp_path / "profile.json")
    assert 0 <= profiled["idle_share"] < 1
    assert sum(profiled["kinds"].values()) >= sum(profiled["kernels"].values()) * 0.99 > 0

    log = (tmp_path / "gpu.txt").read_text()
    for part in ("tests", "run", "steps", "loop-4", "learn", "profile"):
        assert f"== {part}\n" in log


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho started; exit 3\n")
    broken.chmod(0o755)
    done = run("tests", "profile", out=tmp_path / "out", PYTHON=str(broken))
    assert done.returncode == 1
    assert "failed: tests profile" in done.stdout
    assert "failed: tests, exit status 3" in (tmp_path / "out" / "gpu.txt").read_text()
    assert run("nonsense", out=tmp_path).returncode == 2
    assert "DATA is not set" in run("learn", out=tmp_path, TRY="").stdout
