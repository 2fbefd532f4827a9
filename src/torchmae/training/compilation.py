"""torch.compile of a model in training: the shapes of the first full batch are compiled, others run eagerly."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from torchmae.errors import ConfigError
from torchmae.training.parallel import blocks

COMPILERS = ("g++", "clang++", "c++")
MAX_WHOLE = 12  # blocks: as many as two cores compile in a minute


def compile_model(model: nn.Module, device: torch.device, *, budget: float = 1.0, by_block: bool = False) -> None:
    """Has a model compiled in place, for fixed shapes, when it is first called; `plain_at_the_end` undoes it.

    A model of few blocks is compiled as a whole, which is the fastest by a few percent where blocks are small. A deeper
    one would take over a minute: its blocks are compiled, once for all of one shape. So are they with a budget: a whole
    model would recompute all its activations at one time.

    Args:
        model: the model.
        device: where it runs.
        budget: share of the activations that is kept for the backward pass, in [0, 1]; the compiler recomputes the
            others, the cheapest first.
        by_block: compile block by block whatever their number, where something happens between blocks (FSDP2).

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
    for part in parts(model, by_block or budget < 1):
        part.forward = torch.compile(part.forward, dynamic=False)


def parts(model: nn.Module, by_block: bool = False) -> list[nn.Module]:
    """What is compiled in one piece: the model, or each of its blocks."""
    found = blocks(model)
    return found if found and (by_block or len(found) > MAX_WHOLE) else [model]


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
def first_shapes_only(active: bool, *, keep: bool = False) -> Iterator[Callable[[bool], AbstractContextManager[None]]]:
    """Yields a function that makes the context of a step; its argument says whether the step has a full batch.

    The first step with a full batch is compiled. After it, new shapes run eagerly instead of recompiling: an epoch's
    last, smaller batch (also when a resumed run begins with it) and evaluation are too rare to repay a compilation.
    Without `active`, nothing happens. With `keep`, the compiled code stays for the run that follows.
    """
    if not active:
        yield lambda _full: nullcontext()
        return
    from torch._functorch import config as functorch

    compiled = False

    @contextmanager
    def step(full: bool) -> Iterator[None]:
        nonlocal compiled
        first = full and not compiled
        if first:
            torch.compiler.set_stance("default")
            compiled = True
        yield
        if first:
            torch.compiler.set_stance("eager_on_recompile")

    try:
        torch.compiler.set_stance("force_eager")
        yield step
    finally:
        torch.compiler.set_stance("default")
        if not keep:
            torch.compiler.reset()  # only so many shapes are compiled of one function: the next run begins with none
            functorch.activation_memory_budget = 1.0


@contextmanager
def plain_at_the_end(model: nn.Module) -> Iterator[None]:
    """At the end, removes compilation and activation checkpointing from all modules."""
    try:
        yield
    finally:
        for module in model.modules():
            vars(module).pop("forward", None)
