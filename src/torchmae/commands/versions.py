"""`torchmae --version`: versions for bug reports."""

from __future__ import annotations

import platform
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from torchmae import __version__
from torchmae.training.runtime import processor

LIBRARIES = ("torchvision", "numpy", "pillow", "timm", "transformers")


def describe() -> str:
    """Versions of torchmae and its libraries, the platform, and the processor and GPUs."""
    libraries = []
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries.append(f"{name} {version(name)}")
    return "\n".join(
        (
            f"torchmae {__version__}",
            f"python {platform.python_version()}, {platform.platform()}",
            ", ".join((f"torch {torch.__version__}", *libraries)),
            f"processor: {processor()}",
            f"gpu: {_gpus()}",
        )
    )


def _gpus() -> str:
    """The accelerators that torch finds, or why it finds none."""
    built = f"torch is built with CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if torch.version.hip:
        built = f"torch is built with ROCm {torch.version.hip}"
    if torch.backends.mps.is_available():
        return f"Apple's, by mps ({built})"
    if not torch.cuda.is_available():
        return f"none found ({built})"
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{', '.join(f'{count} x {name}' for name, count in names.items())} ({built})"
