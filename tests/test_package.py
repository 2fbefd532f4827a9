"""What is uploaded: the wheel and the source archive, built as for a release."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import torchmae

ROOT = Path(__file__).parents[1]
TREE = ("src", "tests", "docs", "benchmarks")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both archives, built from a copy: building writes beside the sources."""
    for module in ("build", "setuptools"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    place = tmp_path_factory.mktemp("release")
    copy = place / "tree"
    for name in TREE:
        shutil.copytree(ROOT / name, copy / name, ignore=SKIPPED)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return place / "dist"


def files(*folders: str, suffix: str = "") -> set[str]:
    """Paths below the repository's root of the files in some of its folders."""
    found = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))
    skipped = {"__pycache__", "torchmae.egg-info"}
    return {str(path) for path in found if (ROOT / path).is_file() and not skipped & set(path.parts)}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name == f"torchmae-{torchmae.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"torchmae-{torchmae.__version__}.dist-info/METADATA").decode()
        licence = wheel.read(f"torchmae-{torchmae.__version__}.dist-info/licenses/LICENSE").decode()
    # Every file of the package: code, recipes, page templates, style sheets, py.typed.
    assert names == {name.removeprefix("src/") for name in files("src")}
    assert {"torchmae/py.typed", "torchmae/recipes/digits.yaml", "torchmae/report/page.html"} <= names
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    head = Parser().parsestr(metadata)
    assert head["Version"] == torchmae.__version__
    assert head["License-Expression"] == "Apache-2.0"
    assert head["Description-Content-Type"] == "text/markdown"
    assert {"wandb", "trackio", "completion", "dev"} <= set(head.get_all("Provides-Extra", []))


def test_the_source_archive_holds_what_a_packager_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files(*TREE) <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git", "runs/", "dist/"))]


def test_the_version_has_one_home() -> None:
    """Files that must repeat it say the same."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == torchmae.__version__
    assert f"\n## {torchmae.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_is_the_readmes() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paper = citation["preferred-citation"]
    assert paper["title"] in readme
    assert paper["journal"] in readme
    for author in paper["authors"]:
        surname = author["family-names"].replace("á", r"{\'a}")  # as BibTeX spells it
        assert f"{surname}, {author['given-names']}" in readme


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml", "question.yml"])
def test_issue_forms_have_what_github_asks_for(name: str) -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    if not folder.is_dir():
        pytest.skip("not in a source archive")
    form = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    kinds = [item["type"] for item in form["body"]]
    assert set(kinds) <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}
    asked = [item for item in form["body"] if item["type"] != "markdown"]
    assert asked
    assert all(item["attributes"]["label"] for item in asked)
    assert len({item["id"] for item in asked}) == len(asked)
    assert any(item.get("validations", {}).get("required") for item in asked)
