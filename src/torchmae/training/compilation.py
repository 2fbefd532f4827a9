"""torch.compile of a model in training: the first step's shapes are compiled, all others run as they are."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from torchmae.errors import ConfigError

COMPILERS = ("g++", "clang++", "c++")


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compiles a model's calls from now on, in place, for fixed shapes; the work is done in the first step.

    Raises:
        ConfigError: for a processor, no C++ compiler or no Python headers.
    """
    if device.type == "cpu":
        check_compiler()
    torch.compiler.set_stance("default")
    model.compile(dynamic=False)


def check_compiler() -> None:
    """Raises ConfigError where torch.compile cannot build code for the processor."""
    found = [name for name in (os.environ.get("CXX"), *COMPILERS) if name and shutil.which(name)]
    if not found:
        raise ConfigError(
            f"compile needs a C++ compiler, and none of {', '.join(COMPILERS)} is here",
            "install one (Debian: apt-get install g++), or use --compile false",
        )
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        raise ConfigError(
            f"compile needs Python's headers, and {headers} is not there",
            "install them (Debian: apt-get install python3-dev), or use --compile false",
        )


@contextmanager
def first_shapes_only(active: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call after a step: from the first on, what was not compiled yet runs without.

    An epoch's last, smaller batch and evaluation come too seldom to repay a compilation of their own.

    Args:
        active: whether anything is compiled at all.
    """
    if not active:
        yield lambda: None
        return
    try:
        yield lambda: torch.compiler.set_stance("eager_on_recompile")
    finally:
        torch.compiler.set_stance("default")
