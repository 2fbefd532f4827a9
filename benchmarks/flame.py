"""Flame graphs of training steps, from PyTorch's profiler: SVG with a word under the pointer for every box."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent

WIDTH, ROW, LETTER = 1200, 18, 6.6  # pixels
COLOURS = {"forward": "#8fb8de", "backward": "#e8a87c", "optimiser": "#9bc995", "other": "#cccccc"}
_BACKWARD = "autograd::engine::evaluate_function: "
# What says nothing in the names of operators.
_NOISE = rf"^({_BACKWARD}|module: |aten::|graph_\d+_cpp_fused_|## Call )|(?<=CompiledFxGraph) \w+ ##$|#.*\.step$"


class Frame:
    """A box: microseconds of its own, and the boxes above it."""

    def __init__(self) -> None:
        self.own = 0.0
        self.above: dict[str, Frame] = {}

    def at(self, path: Sequence[str]) -> Frame:
        """The box that a path leads to, made where it is not there yet."""
        return self.above.setdefault(path[0], Frame()).at(path[1:]) if path else self

    @property
    def total(self) -> float:
        """Microseconds, what is above included."""
        return self.own + sum(frame.total for frame in self.above.values())

    @property
    def height(self) -> int:
        """Rows."""
        return 1 + max((frame.height for frame in self.above.values()), default=0)


@contextmanager
def modules_named(model: nn.Module) -> Iterator[None]:
    """Each module's part of the forward pass shows in a profile, by its place in the model; blocks are one."""
    handles, open_ranges = [], []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(torch.profiler.record_function(f"module: {name}"))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for path, module in model.named_modules():
        words = [word for word in path.split(".") if not word.isdigit()]
        handles += [
            module.register_forward_pre_hook(enter(words[-1] or "model")),
            module.register_forward_hook(leave),
        ]
    yield
    for handle in handles:
        handle.remove()


def frames(events: Sequence[FunctionEvent]) -> Frame:
    """The boxes of a profile: forward by module, backward by the module whose gradient it is, optimiser."""

    def parents(event: FunctionEvent) -> list[FunctionEvent]:
        return [] if event.cpu_parent is None else [*parents(event.cpu_parent), event.cpu_parent]

    def label(event: FunctionEvent) -> str:
        return re.sub(_NOISE, "", event.name)

    def modules_of(event: FunctionEvent) -> list[str]:
        return [label(item) for item in parents(event) if item.name.startswith("module: ")]

    made_by = {}  # the modules of the operator that a gradient belongs to: both have its sequence number
    for event in events:
        if event.sequence_nr >= 0 and not any(item.name.startswith(_BACKWARD) for item in [*parents(event), event]):
            made_by.setdefault(event.sequence_nr, modules_of(event))
    root = Frame()
    for event in events:
        line = [*parents(event), event]
        first = line[0].name
        if first.startswith(_BACKWARD):
            path = ["backward", *made_by.get(line[0].sequence_nr, [])]
        elif first.startswith("Optimizer."):
            path = ["optimiser"]
        elif first.startswith(("module: ", "CompiledFunction", "Torch-Compiled", "TorchDynamo", "## Call")):
            path = ["forward"]
        else:
            path = ["other"]
        path += map(label, line)
        # What calls itself by the same name, as a gradient and its evaluation do, is one box.
        root.at([word for word, _ in groupby(path)]).own += event.self_cpu_time_total
    return root


def draw(root: Frame, title: str, steps: int) -> str:
    """An SVG: width is time, what calls is below what is called."""
    total, height = root.total, (root.height + 1) * ROW
    boxes: list[str] = []

    def box(name: str, frame: Frame, left: float, row: int, colour: str) -> None:
        width = frame.total / total * WIDTH
        if width < 1:
            return
        top = height - (row + 1) * ROW
        says = f"{name}: {frame.total / 1000 / steps:.1f} ms a step, {100 * frame.total / total:.1f}%"
        fits = name if len(name) * LETTER < width - 4 else name[: max(0, int((width - 10) / LETTER))]
        boxes.append(
            f'<g><title>{escape(says)}</title><rect x="{left:.1f}" y="{top}" width="{width - 0.5:.1f}" '
            f'height="{ROW - 1}" fill="{colour}"/><text x="{left + 3:.1f}" y="{top + 13}">{escape(fits)}</text></g>'
        )
        for child, above in sorted(frame.above.items(), key=lambda item: -item[1].total):
            box(child, above, left, row + 1, COLOURS.get(child, colour) if row == 0 else colour)
            left += above.total / total * WIDTH

    box(f"{title}: {total / 1000 / steps:.0f} ms a step", root, 0, 0, "#eeeeee")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" '
        f'font-size="11">\n' + "\n".join(boxes) + "\n</svg>\n"
    )
