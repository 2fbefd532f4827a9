"""Nothing outside a seam asks which implementation it holds, and settings stop where models are built."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torchmae
from torchmae.nn import DECODERS, ENCODERS, TARGETS
from torchmae.tutorial import mlp

ROOT = Path(torchmae.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HOMES = {
    part.__name__: part.__module__.replace("torchmae.", "").replace(".", "/") + ".py"
    for part in (
        *(*ENCODERS.values(), *DECODERS.values(), *TARGETS.values()),
        *(mlp.FlatEncoder, mlp.FlatDecoder, mlp.ValueTarget, mlp.ElementMask),
    )
}
# The tutorial's model by any of its names. `presets` builds it; the settings name its options and presets.
TUTORIALS = {"mlp", "hidden_dim", "elements", "elements_inverted", "loss_on"}
KNOW_TUTORIAL = {"config.py"}
# The building place, what stands above it, and what makes the settings.
TAKE_SETTINGS = ("building.py", "runs.py", "api.py", "settings.py", "commands/", "bench/", "__init__.py", "cli.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def asks(tree: ast.AST) -> set[str]:
    """The names of classes that `isinstance` or `issubclass` is called with."""
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            found |= {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_asks_which_part_a_model_has(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strangers = {name for name in asks(tree) & HOMES.keys() if HOMES[name] != name_of(path)}
    assert strangers == set()
    compared = {
        constant.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    if not name_of(path).startswith("tutorial/") and name_of(path) not in KNOW_TUTORIAL:
        assert compared & TUTORIALS == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_settings_stop_where_models_are_built(path: Path) -> None:
    if name_of(path).startswith(TAKE_SETTINGS):
        return
    names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert "PretrainConfig" not in names
