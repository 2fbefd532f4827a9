"""torch.compile of a model in training: the first step's shapes are compiled, all others run as they are."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
from torch import nn

from torchmae.errors import ConfigError
from torchmae.training.parallel import blocks

COMPILERS = ("g++", "clang++", "c++")
MAX_WHOLE = 12  # blocks, each compiled for itself: as many as two cores compile in a minute


def compile_model(model: nn.Module, device: torch.device, *, budget: float = 1.0, by_block: bool = False) -> None:
    """Compiles a model's calls from now on, in place, for fixed shapes; the work is done in the first step.

    A model is compiled as a whole. Of a deep one, whose blocks are many copies of few graphs, each graph is compiled
    once (`torch.compiler.nested_compile_region`), which saves minutes and costs the fusion across blocks.
    `plain_at_the_end` undoes it.

    Args:
        model: what is called.
        device: where.
        budget: the share of the activations that is kept for the backward pass, in [0, 1]; the compiler has the rest
            computed again, the cheapest first. Below 1, each block is compiled alone: what a whole model computes again
            is in memory all at once.
        by_block: compile each block alone, where something happens between blocks: FSDP2 gathers weights, DDP exchanges
            gradients, activations are computed again.

    Raises:
        ConfigError: for a processor, no C++ compiler or no Python headers.
    """
    from torch._functorch import config as functorch

    if device.type == "cpu":
        check_compiler()
    torch.compiler.set_stance("default")
    if functorch.activation_memory_budget != budget:
        torch.compiler.reset()  # code for another budget would be taken for this one's
        functorch.activation_memory_budget = budget
    found = blocks(model)
    by_block = bool(found) and (by_block or budget < 1)
    if not by_block and len(found) > MAX_WHOLE:
        for block in found:
            region = torch.compiler.nested_compile_region(type(block).forward)
            block.forward = MethodType(region, block)
    for part in found if by_block else [model]:
        part.forward = torch.compile(part.forward, dynamic=False)


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
    from torch._functorch import config as functorch

    try:
        yield lambda: torch.compiler.set_stance("eager_on_recompile")
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()  # only so many shapes are compiled of one function: the next run begins with none
        functorch.activation_memory_budget = 1.0


@contextmanager
def plain_at_the_end(model: nn.Module) -> Iterator[None]:
    """At the end, modules call what their classes define: neither compiled nor saving activations, whatever was set."""
    try:
        yield
    finally:
        for module in model.modules():
            vars(module).pop("forward", None)
