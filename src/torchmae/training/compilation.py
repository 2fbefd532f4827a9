"""torch.compile in training: full batches are compiled, smaller ones run eagerly."""

from __future__ import annotations

import os
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from torchmae.errors import ConfigError
from torchmae.training.parallel import blocks
from torchmae.training.runtime import undo_later

COMPILERS = ("g++", "clang++", "c++")
MAX_WHOLE = 12  # blocks: two cores compile them in about a minute
_COMPILING = threading.RLock()
StepContext = Callable[[bool, tuple[int, ...]], AbstractContextManager[None]]
"""Gives the context of a training step. Arguments: whether the batch is full; the images' pixels along each axis."""


def compile_model(model: nn.Module, device: torch.device, *, budget: float = 1.0, by_block: bool = False) -> None:
    """Prepares a model for compilation at its first call, in place, for fixed shapes; `plain_at_the_end` undoes it.

    A model of at most MAX_WHOLE blocks is compiled as a whole: small blocks run a few percent faster. A deeper model
    would take over a minute, so its blocks are compiled: blocks of one shape share their code. Blocks are compiled too
    `by_block` (FSDP2 acts between them), and with a `budget` below 1, since a whole model would recompute all its
    activations at one time. `budget` is the share of the activations that is kept for the backward pass, in [0, 1];
    the compiler recomputes the others, the cheapest first.

    Raises:
        ConfigError: on a processor, no C++ compiler or no Python headers.
    """
    from torch._functorch import config as functorch

    if device.type == "cpu":
        check_compiler()
    if functorch.activation_memory_budget != budget:
        torch.compiler.reset()  # else code that was compiled for another budget would be used
        undo_later(setattr, functorch, "activation_memory_budget", functorch.activation_memory_budget)
        functorch.activation_memory_budget = budget
    for part in parts(model, by_block or budget < 1):
        part.forward = torch.compile(part.forward, dynamic=False)


def parts(model: nn.Module, by_block: bool = False) -> list[nn.Module]:
    """The modules to compile: the model itself, or its blocks."""
    found = blocks(model)
    return found if found and (by_block or len(found) > MAX_WHOLE) else [model]


def check_compiler() -> None:
    """Raises ConfigError if torch.compile cannot build code for the processor."""
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
def full_batches_only(active: bool, *, keep: bool = False) -> Iterator[StepContext]:
    """Yields the function that gives the context of each training step.

    A step with a full batch is compiled, once for each size of images. All other shapes run eagerly: an epoch's smaller
    last batch (even if a resumed run begins with it) and evaluation are too rare to repay a compilation. Without
    `active`, nothing happens. With `keep`, the compiled code stays for the run that follows. The compiler's stance is
    the process's: a second thread that enters here waits.
    """
    if not active:
        yield lambda _full, _size: nullcontext()
        return
    from torch._functorch import config as functorch

    compiled: set[tuple[int, ...]] = set()

    @contextmanager
    def step(full: bool, size: tuple[int, ...]) -> Iterator[None]:
        first = full and size not in compiled
        if first:
            torch.compiler.set_stance("default")
            compiled.add(size)
        yield
        if first:
            torch.compiler.set_stance("eager_on_recompile")

    with _COMPILING, torch.compiler.set_stance("force_eager"):
        try:
            yield step
        finally:
            if not keep:
                torch.compiler.reset()  # torch limits the shapes compiled of a function: the next run starts from zero
                functorch.activation_memory_budget = 1.0


@contextmanager
def plain_at_the_end(model: nn.Module) -> Iterator[None]:
    """Removes compilation and activation checkpointing from all modules at the end."""
    try:
        yield
    finally:
        for module in model.modules():
            vars(module).pop("forward", None)
