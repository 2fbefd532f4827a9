"""Imports point down only, and what the command line imports at its start is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import torchmae

ROOT = Path(torchmae.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom up. Units of one layer do not import each other; the files of one unit may.
LAYERS = (
    ("errors",),
    ("files", "machine", "paths", "random", "words"),
    ("config",),
    ("settings", "data", "nn"),
    ("tutorial",),
    ("presets",),
    ("interop",),
    ("training",),
    ("building",),
    ("report", "bench", "planning"),
    ("evaluation",),
    ("visualize", "publish"),
    ("evaluators",),
    ("runs",),
    ("api",),
    ("app",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

# Modules that `torchmae --help` loads, and what none of them may load.
LIGHT = (
    "torchmae",
    "torchmae.errors",
    "torchmae.commands",
    "torchmae.paths",
    "torchmae.random",
    "torchmae.settings",
    "torchmae.machine",
    "torchmae.cli",
    *sorted(f"torchmae.config.{path.stem}" for path in (ROOT / "config").glob("[a-z]*.py")),
)
HEAVY = ("torch", "torchvision", "matplotlib", "sklearn", "PIL", "safetensors")
SLOW_TO_LOAD = ("torchvision", "torch._dynamo", "matplotlib", "sklearn", "scipy")  # seconds before any command begins
NUMPY_FREE = ("torchmae", "torchmae.errors", "torchmae.config")


def module_name(path: Path) -> str:
    parts = ("torchmae", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that the code imports, inside functions and under TYPE_CHECKING too.

    Args:
        tree: the parsed file.
        package: the package the file is in, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from torchmae import nn` imports the module torchmae.nn.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def violations(tree: ast.AST, module: str, package: str) -> list[str]:
    """Imports of `module` that do not point down, each as a sentence."""
    unit = module.split(".")[1] if "." in module else ""
    found = []
    for name in imported(tree, package):
        if name.split(".")[0] != "torchmae" or name in ("torchmae", "torchmae.__version__"):
            continue
        other = name.split(".")[1]
        if other not in RANK:
            found.append(f"{module} imports {name}: import it from the module it lives in")
        elif unit == "" or (other != unit and RANK[other] >= RANK[unit]):
            found.append(f"{module} imports {name}: not below it")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    unit = module.partition(".")[2].partition(".")[0]
    assert unit == "" or unit in RANK, f"give {unit!r} a place in LAYERS"
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert violations(ast.parse(path.read_text(encoding="utf-8")), module, package) == []


@pytest.mark.parametrize(
    ("source", "module", "count"),
    [
        ("from torchmae.nn.mae import Mask", "torchmae.training.loop", 0),
        ("from torchmae.nn.mae import Mask", "torchmae.nn.decoder", 0),
        ("from torchmae import __version__, nn", "torchmae.training.loop", 0),
        ("import torchmae", "torchmae.training.loop", 0),
        ("from torchmae.nn.mae import Mask", "torchmae.data.loader", 1),
        ("import torchmae.data.loader", "torchmae.nn.mae", 1),
        ("from torchmae import api", "torchmae.training.loop", 1),
        ("from torchmae import building", "torchmae.training.loop", 1),
        ("from torchmae.evaluation import knn", "torchmae.report.html", 1),
        ("def f():\n    from torchmae.cli import main", "torchmae.api", 1),
        ("if TYPE_CHECKING:\n    from torchmae.training.loop import Loop", "torchmae.nn.mae", 1),
        ("from ..data import loader", "torchmae.nn.mae", 1),
        ("from . import masking\nfrom .patches import gather", "torchmae.nn.mae", 0),
        ("from torchmae.errors import ConfigError", "torchmae", 1),
    ],
)
def test_the_check_itself(source: str, module: str, count: int) -> None:
    package = module.rpartition(".")[0] or module
    assert len(violations(ast.parse(source), module, package)) == count


WEIGHTLESS = "from torchmae import presets; [presets.weightless(presets.arguments(name)) for name in presets.PRESETS]"


@pytest.mark.parametrize(
    ("code", "barred"),
    [
        *((f"import {module}", [*HEAVY, *(["numpy"] if module in NUMPY_FREE else [])]) for module in LIGHT),
        (f"import torchmae.api; {WEIGHTLESS}", SLOW_TO_LOAD),
    ],
)
def test_nothing_heavy_is_loaded_that_is_not_needed(code: str, barred: Sequence[str]) -> None:
    code += f"; import sys; print(*[name for name in {barred!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


@pytest.mark.parametrize("name", torchmae.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(torchmae, name) is not None
    assert name in dir(torchmae)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="'torchmae' has no attribute 'pretrian'"):
        torchmae.pretrian  # noqa: B018
