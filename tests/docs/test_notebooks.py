"""The notebooks run from top to bottom, and are kept without outputs and without traces of a machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, programs_of_minutes

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, "executed.ipynb")
"""


def executed(path: Path, folder: Path) -> str:
    """Runs a notebook in a folder, in a process of its own; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(folder / "executed.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@programs_of_minutes
def test_building_one(tmp_path: Path) -> None:
    printed = executed(DOCS / "notebooks" / "build-a-masked-autoencoder.ipynb", tmp_path)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+); mean patch ([\d.]+)", printed)
    assert losses is not None
    first, last, mean_patch = map(float, losses.groups())
    assert last < 0.6 * mean_patch < first


@programs_of_minutes
def test_using_your_backbone(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    printed = executed(DOCS / "notebooks" / "use-your-backbone.ipynb", tmp_path)
    knn = re.search(r"kNN ([\d.]+)%", printed)
    difference = re.search(r"largest difference (\S+)\s*$", printed)
    assert knn is not None and float(knn[1]) > 50
    assert difference is not None and float(difference[1]) < 1e-4
    assert (tmp_path / "exported" / "notebook" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
