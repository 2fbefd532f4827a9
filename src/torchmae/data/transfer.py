"""From the processor's memory to a device's."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU's copy may still be under way: work that is queued behind it sees it done.

    It comes from pinned memory, which PyTorch keeps until then; from other memory CUDA would wait for the work before
    it, and other devices might read what has been freed.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
