from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

PATH = Path(__file__).parents[2] / "benchmarks" / "flame.py"


@pytest.fixture
def flame() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flame", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flame"] = module
    spec.loader.exec_module(module)
    return module


def test_every_microsecond_has_a_box_and_gradients_belong_to_modules(flame: ModuleType) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(256, 256))
    model.add_module("last", nn.Linear(256, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with flame.modules_named(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            model(torch.randn(512, 256)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    model(torch.randn(512, 256))  # no hook is left
    assert not model._forward_hooks
    root = flame.frames(profiler.events())
    assert root.total == pytest.approx(sum(event.self_cpu_time_total for event in profiler.events()))
    assert set(root.above) == {"forward", "backward", "optimiser", "other"}
    for way, operator in (("forward", "linear"), ("backward", "AddmmBackward0")):
        modules = root.above[way].above["model"].above
        assert {"first", "last"} <= set(modules)
        assert all(operator in modules[name].above for name in ("first", "last"))
    drawn = ElementTree.fromstring(flame.draw(root, "two < three", steps=3))
    boxes = [item for item in drawn if item.tag.endswith("}g")]
    assert "two < three" in "".join(boxes[0].itertext())
    widths = {item[0].text.split(":")[0]: float(item[1].attrib["width"]) for item in boxes}
    assert widths["forward"] / flame.WIDTH == pytest.approx(root.above["forward"].total / root.total, abs=0.01)
