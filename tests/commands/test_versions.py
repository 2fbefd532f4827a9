from __future__ import annotations

import os
import platform
from importlib.metadata import version

import pytest
import torch

import torchmae
from torchmae.commands import versions


def test_what_a_bug_report_needs() -> None:
    first, system, libraries, processor, gpu = versions.describe().splitlines()
    assert first == f"torchmae {torchmae.__version__}"
    assert system == f"python {platform.python_version()}, {platform.platform()}"
    assert libraries.startswith(f"torch {torch.__version__}, torchvision {version('torchvision')}, ")
    assert processor.startswith("processor: ")
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert processor.endswith(f", {os.cpu_count()} cores")
    assert gpu.startswith("gpu: ")


def test_libraries_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "LIBRARIES", ("numpy", "no-such-library"))
    assert versions.describe().splitlines()[2] == f"torch {torch.__version__}, numpy {version('numpy')}"


@pytest.mark.parametrize(
    ("cuda", "hip", "gpus", "said"),
    [
        (None, None, [], "none found (torch is built without CUDA)"),
        ("12.8", None, [], "none found (torch is built with CUDA 12.8)"),
        ("12.8", None, ["A", "B", "A"], "2 x A, 1 x B (torch is built with CUDA 12.8)"),
        (None, "6.3", ["C"], "1 x C (torch is built with ROCm 6.3)"),
    ],
)
def test_gpus(cuda: str | None, hip: str | None, gpus: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i])
    assert versions.describe().splitlines()[4] == f"gpu: {said}"
