from __future__ import annotations

import sys
from datetime import datetime, timedelta

import pytest
import torch

import torchmae
from torchmae.errors import ConfigError
from torchmae.training import runtime as module
from torchmae.training.ranks import Ranks
from torchmae.training.runtime import Runtime, environment, has_fast_bf16, open_runtime

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False, **capabilities: bool) -> None:
    """Pretends to have so many GPUs, and a processor with these capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize(
    ("have", "asked", "device"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": 1}, "auto", "cuda"),
        ({"cuda": 1, "mps": True}, "auto", "cuda"),
        ({"mps": True}, "auto", "cpu"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, "cpu", "cpu"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, have: dict[str, int], asked: str, device: str) -> None:
    machine(monkeypatch, **have)  # type: ignore[arg-type]
    assert str(open_runtime(asked, "fp32", 1).device) == device


@pytest.mark.parametrize(
    ("have", "asked", "message"),
    [
        ({}, "cuda", "device is 'cuda' but torch finds 0 cuda devices here; use --device auto, or cpu"),
        ({"cuda": 2}, "cuda:2", "device is 'cuda:2' but torch finds 2 cuda devices here; use --device auto, or cpu"),
        ({}, "mps", "device is 'mps' but torch finds 0 mps devices here; use --device auto, or cpu"),
        ({}, "xpu", "device is 'xpu' but torch finds 0 xpu devices here; use --device auto, or cpu"),
        ({}, "gpu", "device is 'gpu'; use auto, cpu, cuda, cuda:0 or mps"),
        ({}, "", "device is ''; use auto, cpu, cuda, cuda:0 or mps"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, have: dict[str, int], asked: str, message: str
) -> None:
    machine(monkeypatch, **have)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        open_runtime(asked, "auto", 1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_precision_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    machine(monkeypatch, **capabilities)  # type: ignore[arg-type]
    assert open_runtime("cpu", "auto", 1).precision == precision
    assert open_runtime("cpu", "bf16", 1).precision == "bf16"
    assert open_runtime("cpu", "fp32", 1).precision == "fp32"


def test_an_older_torch_that_knows_no_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_fast_bf16(CPU)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fast: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fast_bf16(torch.device("cuda")) is fast
    assert not has_fast_bf16(torch.device("mps"))


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(module, "num_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [open_runtime("cpu", "fp32", threads).threads for threads in (None, 2)] == [6, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [open_runtime("cpu", "fp32", threads).threads for threads in (None, 2)] == [3, 2]
    ranks = Ranks(0, 2, 0, 2)  # torchrun has set it to 1 for each
    assert open_runtime("cpu", "fp32", None, ranks).threads == 3
    assert asked == [6, 2, 3, 2, 3]


def test_autocast_is_for_bf16_only() -> None:
    matrix = torch.ones(2, 2)
    with Runtime(CPU, "bf16", 1).autocast():
        assert (matrix @ matrix).dtype == torch.bfloat16
    with Runtime(CPU, "fp32", 1).autocast():
        assert (matrix @ matrix).dtype == torch.float32


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/torchmae", "pretrain", "--data", "my images"], "torchmae pretrain --data 'my images'"),
        (["/lib/torchmae/__main__.py", "pretrain"], "torchmae pretrain"),
        (["/home/me/torchmae-experiments/run.py", "3"], "Python API"),
        (["-c"], "Python API"),
        ([], "Python API"),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, argv: list[str], command: str) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    described = environment(Runtime(CPU, "bf16", 3))
    assert described["command"] == command
    assert (described["device"], described["threads"], described["precision"]) == ("cpu", 3, "bf16")
    assert (described["torchmae"], described["torch"]) == (torchmae.__version__, torch.__version__)
    assert all(described[name] for name in ("torchvision", "jpeg_decoder", "python", "platform", "processor"))
    started = datetime.fromisoformat(str(described["started"]))
    assert started.utcoffset() == timedelta(0)
