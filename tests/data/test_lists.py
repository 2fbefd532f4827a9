from __future__ import annotations

from pathlib import Path

import pytest

from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.sources import Source
from torchmae.errors import ConfigError, DataError


def paths(source: Source, folder: Path) -> list[str]:
    return [str(Path(source.name(i)).relative_to(folder)) for i in range(len(source))]


def test_patterns(write_pictures, tmp_path: Path) -> None:
    write_pictures("b/2.png", "a/1.jpg", "a/deep/3.jpg", "a/.hidden.jpg", "c/[1].jpg")
    (tmp_path / "a" / "notes.txt").touch()
    every = open_splits(f"{tmp_path}/**/*.jpg")["train"]
    assert paths(every, tmp_path) == ["a/1.jpg", "a/deep/3.jpg", "c/[1].jpg"]
    assert every.read(0).shape == (12, 16, 3)
    grey = open_splits(f"{tmp_path}/{{b,a}}/*", Context(num_channels=1))["train"]
    assert paths(grey, tmp_path) == ["a/1.jpg", "b/2.png"]
    with pytest.raises(DataError, match=r"no file matches .*\*\.gif; check the pattern, and quote it"):
        open_splits(f"{tmp_path}/*.gif")
    some = open_splits(f"{tmp_path}/a/*")["train"]
    assert (len(some), some.remarks) == (1, ("1 other files not used",))
    with pytest.raises(DataError, match=r"matches no images, only files such as .*notes.txt"):
        open_splits(f"{tmp_path}/a/*.txt")
    # A folder whose name looks like a pattern is a folder.
    write_pictures("d[1]/1.png", "d[1]/2.png")
    assert len(open_splits(f"{tmp_path}/d[1]")["train"]) == 2


def test_a_text_file_of_paths(write_pictures, tmp_path: Path) -> None:
    (outside,) = write_pictures("elsewhere/1.png")
    write_pictures("list/b.png", "list/a.png")
    (tmp_path / "list" / "some.txt").write_bytes(f"b.png\r\n\n  a.png\n{outside}".encode())
    source = open_splits(str(tmp_path / "list" / "some.txt"))["train"]
    assert paths(source, tmp_path) == ["list/b.png", "list/a.png", "elsewhere/1.png"]
    assert [source.read(i).shape for i in range(3)] == [(12, 16, 3)] * 3
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"none.txt has no rows"):
        open_splits(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("a.png,7\nb.png,0\n", [7, 0], None),
        ("path,label\na.png,dog\nb.png,cat\n", [1, 0], ("cat", "dog")),
        ("Label , FileName\n,a.png\ncat,b.png\n", [-1, 0], ("cat",)),
        ('class,path\n"a, b",a.png\n10,"b.png"\n', [1, 0], ("10", "a, b")),
        ("a.png,-1\nb.png,3.0\n", [-1, 3], None),
        ("path,label\na.png,dog\nb.png,-1\n", [0, -1], ("dog",)),
        ("a.png\nb.png\n", None, None),
        ("\ufeffpath\na.png\nb.png\n", None, None),
    ],
)
def test_csv(
    write_pictures, tmp_path: Path, text: str, labels: list[int] | None, classes: tuple[str, ...] | None
) -> None:
    write_pictures("a.png", "b.png")
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    splits = open_splits(str(tmp_path / "list.csv"))
    assert list(splits) == ["train"]
    assert paths(splits["train"], tmp_path) == ["a.png", "b.png"]
    assert (None if splits["train"].labels is None else splits["train"].labels.tolist()) == labels
    assert splits["train"].classes == classes


def test_csv_with_splits_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("path\tlabel\tsplit\na\tx\ttrain\nb\ty\tVALID\nc\ty\ttest\nd\tx\t\n")
    splits = open_splits(str(tmp_path / "list.tsv"))
    assert {split: paths(item, tmp_path) for split, item in splits.items()} == {
        "train": ["a", "d"],
        "val": ["b"],
        "test": ["c"],
    }
    assert [item.labels.tolist() for item in splits.values()] == [[0, 0], [1], [1]]
    assert splits["val"].classes == ("x", "y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows of the train split"),
        ("path,split\na.png,other\n", "line 2: the split is 'other'; choose from"),
        ("path,label\na.png,1\n,2\n", "line 3: no path"),
        ("path,split\na.png,test\n", "has no rows of the train split"),
        (f'"{"a" * 70000}"\n', "is not a list: field larger than"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_splits(str(tmp_path / "list.csv"))


def test_braces_that_stand_for_too_much() -> None:
    with pytest.raises(ConfigError, match="stands for more than 1,000,000 files"):
        open_splits("x-{0..999999999}.tar")


def test_numbers_as_classes_keep_those_of_training(tmp_path: Path) -> None:
    rows = ("file,label,split", "a,1355868,train", "b,1355900,train", "c,1355868,val", "d,1355870,val")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    splits = open_splits(str(tmp_path / "list.csv"))
    for split, expected in (("train", ["1355868", "1355900"]), ("val", ["1355868", "1355870"])):
        source = splits[split]
        assert source.classes is not None and source.labels is not None
        assert [source.classes[label] for label in source.labels] == expected
