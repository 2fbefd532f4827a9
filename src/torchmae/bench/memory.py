"""Peak memory of training, measured in a process of its own."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from torchmae.bench.contenders import Contender, build
from torchmae.config import PretrainConfig

_STEPS = 3
_STATUS = Path("/proc/self/status")


def peak_memory(code: str, config: PretrainConfig) -> int | None:
    """Bytes that training takes at its peak: weights, gradients, the optimiser's state, a batch, activations.

    On CUDA, what PyTorch's allocator had given out at most. On a processor, the largest resident size of a process
    that only trains, less what it holds before (interpreter and libraries); files mapped into memory do not count.

    Args:
        code: whose step, as in `contenders.build`.
        config: sizes of network and batch.

    Returns:
        None where it cannot be measured (a processor on another system than Linux), or where it was too much.

    Raises:
        ConfigError: as `contenders.build`.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, code, config).result()
        except (torch.OutOfMemoryError, BrokenProcessPool):
            return None


def _measure(code: str, config: PretrainConfig) -> int | None:
    contender = build(code, config)
    device = contender.runtime.device
    if device.type == "cuda":
        _train(contender)
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _STATUS.exists():
        return None
    gc.collect()
    before = _status()["RssAnon"] - _held(contender)
    _train(contender)
    after = _status()
    return after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before


def _train(contender: Contender) -> None:
    for _ in range(_STEPS):
        contender.run()


def _held(contender: Contender) -> int:
    """Bytes that are part of training and there before the first step."""
    tensors = [*contender.model.parameters(), *contender.model.buffers()]
    return contender.images.nbytes + sum(tensor.nbytes for tensor in tensors)


def _status() -> dict[str, int]:
    """The bytes in the kernel's account of this process."""
    lines = [line.split() for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
