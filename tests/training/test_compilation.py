from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from torchmae.errors import ConfigError
from torchmae.training import compilation
from torchmae.training.compilation import check_compiler, compile_model, first_shapes_only


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        check_compiler()
    with pytest.raises(ConfigError, match="compiler"):
        compile_model(nn.Linear(2, 2), torch.device("cpu"))


def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match="headers"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    check_compiler()


def test_only_the_first_shapes_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        compiled.append(next(value.shape[0] for value in example if value.shape[-1] == 3))
        return graph.forward

    monkeypatch.setattr(compilation, "check_compiler", lambda: None)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    compile_model(model, torch.device("cpu"))
    plain = {size: nn.Module.__call__(model[1], model[0](torch.ones(size, 3))) for size in (4, 2)}
    with first_shapes_only(True) as after_step:
        for size in (4, 4, 2, 4, 2):
            assert torch.allclose(model(torch.ones(size, 3)), plain[size])
            after_step()
        model.eval()
        model(torch.ones(5, 3))
    assert len(compiled) == 1
    model(torch.ones(6, 3))  # the stance is the default again: a new shape is compiled
    assert len(compiled) == 2


def test_nothing_is_compiled_unless_asked() -> None:
    with first_shapes_only(False) as after_step:
        after_step()
