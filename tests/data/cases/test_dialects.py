"""Lists in the dialects that people have: read, or what is wrong is named; a header is no sample and no class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchmae.data.layouts import open_splits
from torchmae.data.sources import Source
from torchmae.errors import DataError

TWO = ["a.png", "sub/ü b.png"]


def opened(path: Path) -> Source:
    return open_splits(str(path))["train"]


def names(source: Source, folder: Path) -> list[str]:
    return [os.path.relpath(source.name(i), folder) for i in range(len(source))]


def said(source: Source) -> str:
    return "; ".join(source.remarks)


@pytest.mark.parametrize(
    ("name", "text", "labels", "says"),
    [
        ("x.csv", "path;label\na.png;cat\nsub/ü b.png;dog\n", ["cat", "dog"], "semicolons"),
        ("x.csv", "a.png\tcat\nsub/ü b.png\tdog\n", ["cat", "dog"], "tabs"),
        ("x.csv", "a.png|cat\nsub/ü b.png|dog\n", ["cat", "dog"], "bars"),
        ("x.tsv", "a.png,cat\nsub/ü b.png,dog\n", ["cat", "dog"], "commas"),
        ("x.csv", "Bild,Befund\na.png,cat\nsub/ü b.png,dog\n", ["cat", "dog"], "paths of x.csv in the column 'Bild'"),
        ("x.csv", ",image_path,diagnosis\n0,a.png,cat\n1,sub/ü b.png,dog\n", ["cat", "dog"], ""),
        ("x.csv", "0,a.png,cat\n1,sub/ü b.png,dog\n", ["cat", "dog"], ""),
        (
            "x.csv",
            "label,site,img\ncat,A,a.png\ndog,B,sub/ü b.png\n",
            ["cat", "dog"],
            "x.csv not used (site)",
        ),
        (
            "x.csv",
            "filename,width,class,xmin\na.png,1,cat,3\nsub/ü b.png,1,dog,3\n",
            ["cat", "dog"],
            "width",
        ),
        ("x.csv", "image,subset,label\na.png,training,cat\nsub/ü b.png,train,dog\n", ["cat", "dog"], ""),
        ("x.csv", "image,set,label\na.png,A,cat\nsub/ü b.png,B,dog\n", ["cat", "dog"], "not used (set)"),
        ("x.csv", '"a.png","cat"\n"sub/ü b.png","dog"\n', ["cat", "dog"], ""),
        ("x.txt", "a.png\nsub/ü b.png\n", None, ""),
        ("x.txt", "filename\na.png\nsub/ü b.png\n", None, ""),
        ("x.txt", "# from 2020\na.png\nsub/ü b.png\n", None, ""),
        ("x.txt", "a.png 3\nsub/ü b.png 0\n", ["3", "0"], "spaces"),
        ("x.txt", "a.png   3\n'sub/ü b.png' 0\n", ["3", "0"], "spaces"),
        ("x.lst", "a.png\t3\nsub/ü b.png\t0\n", ["3", "0"], "tabs"),
        ("x.txt", "path,label\na.png,cat\nsub/ü b.png,dog\n", ["cat", "dog"], "commas"),
        ("x.csv", ".\\a.png,cat\nsub\\ü b.png,dog\n", ["cat", "dog"], "backslashes"),
        ("x.csv", "C:\\data\\set\\a.png,cat\nC:\\data\\set\\sub\\ü b.png,dog\n", ["cat", "dog"], "first 3 folders"),
        ("x.txt", "/home/anne/set/a.png\n/home/anne/set/sub/ü b.png\n", None, "first 4 folders"),
        ("x.csv", "a.png,0.31\nsub/ü b.png,1.5\n", None, "measurements"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_dialects(
    write_pictures, tmp_path: Path, name: str, text: str, labels: list[str] | None, says: str, encoding: str
) -> None:
    write_pictures(*TWO)
    (tmp_path / name).write_text(text, encoding=encoding, newline="\r\n" if encoding == "utf-16" else None)
    source = opened(tmp_path / name)
    assert names(source, tmp_path) == TWO
    assert source.read(1).shape == (12, 16, 3)
    found = None if source.labels is None else [(source.classes or range(99))[i] for i in source.labels]
    assert found == (labels if labels is None or source.classes else [*map(int, labels)])
    assert says in said(source)
    assert (encoding in said(source)) == (encoding in ("utf-16", "cp1252"))
    if not says and not encoding.startswith(("utf-16", "cp")):
        assert not source.remarks


def test_paths_relative_to_the_working_folder(write_pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures("images/a.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "x.txt").write_text("images/a.png\n")
    monkeypatch.chdir(tmp_path)
    source = opened(tmp_path / "lists" / "x.txt")
    assert source.read(0).shape == (12, 16, 3)
    assert "relative to the working folder" in said(source)


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,label\nabc,1\nabd,0\n")
    assert "exists, such as id" in said(opened(tmp_path / "x.csv"))
    (tmp_path / "y.txt").write_text("D:\\photos\\a.png\n")
    assert "none of 1 Windows' paths of y.txt exists" in said(opened(tmp_path / "y.txt"))
    (tmp_path / "z.csv").write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match=r"z.csv"):
        opened(tmp_path / "z.csv")
