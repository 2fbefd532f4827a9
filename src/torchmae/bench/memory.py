"""The peak memory of training."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from torchmae.bench.contenders import Contender

_STATUS = Path("/proc/self/status")


class MemoryMeter:
    """Bytes that training takes at its peak: weights, gradients, the optimiser's state, a batch, activations.

    On CUDA, what PyTorch's allocator has given out at most. On a processor, the largest resident size of this process,
    less what it held when the meter was made (interpreter and libraries); files mapped into memory do not count.

    Args:
        contender: what is there to train, before its first step, in a process that does nothing else.
    """

    def __init__(self, contender: Contender) -> None:
        self._device = contender.runtime.device
        self._measurable = self._device.type == "cpu" and _STATUS.exists()
        gc.collect()
        self._before = _status()["RssAnon"] - _held(contender) if self._measurable else 0

    def peak(self) -> int | None:
        """The bytes; None where they cannot be measured (a processor on another system than Linux)."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._measurable:
            return None
        after = _status()
        return after["VmHWM"] - after["RssFile"] - after["RssShmem"] - self._before


def _held(contender: Contender) -> int:
    """Bytes that are part of training and there before the first step."""
    tensors = [*contender.model.parameters(), *contender.model.buffers()]
    return contender.images.nbytes + sum(tensor.nbytes for tensor in tensors)


def _status() -> dict[str, int]:
    """The bytes in the kernel's account of this process."""
    lines = [line.split() for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
