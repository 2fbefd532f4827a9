from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchmae.api import configure
from torchmae.cli import main
from torchmae.data.arrays import ArraySource
from torchmae.data.groups import hold_out_groups, name_groups, proposed_group, shared_groups
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.loader import hold_out
from torchmae.data.opening import HELD_OUT, held_out_images
from torchmae.errors import ConfigError, DataError


def pictures(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number % 256).save(folder / name)
    return folder


@pytest.mark.parametrize("count", [1, 3, 10, 30])
def test_whole_groups_are_held_out_as_far_as_they_fit(count: int) -> None:
    groups = np.array([f"g{i}" for i in range(12) for _ in range(i + 2)])
    held_out = hold_out_groups(groups, count)
    assert set(groups[held_out]).isdisjoint(groups[~held_out])
    assert 0 < held_out.sum() <= max(count, 2)  # the smallest group has two
    if count >= 10:
        assert held_out.sum() > count - 14  # what is left had room for no further group
    np.testing.assert_array_equal(hold_out_groups(groups, count), held_out)
    assert not hold_out_groups(np.array(["a"] * 5), count).any()


def test_a_column_a_pattern_and_an_array_give_the_same_groups(tmp_path: Path) -> None:
    names = [f"patient{i // 4}/slice{i % 4}.png" for i in range(40)]
    pictures(tmp_path / "scans", names)
    rows = [f"scans/{name},{name.partition('/')[0]},{i}" for i, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["path,Patient,age", *rows]))
    patients = np.array([name.partition("/")[0] for name in names])
    np.savez(tmp_path / "all.npz", images=np.zeros((40, 8, 8), np.uint8), patient=patients, age=np.arange(40))
    np.savez(tmp_path / "scans.npz", mri_images=np.zeros((40, 8, 8), np.uint8), patient=patients)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", np.zeros((40, 8, 8), np.uint8))
    np.save(tmp_path / "arrays" / "patient.npy", patients)
    sources = [
        open_splits(str(tmp_path / "list.csv"), Context(group="patient"))["train"],
        open_splits(str(tmp_path / "scans"), Context(group=r"(patient\d+)"))["train"],
        open_splits(str(tmp_path / "all.npz"), Context(group="patient", spatial_dims=2))["train"],
        open_splits(str(tmp_path / "scans.npz"), Context(group="patient", spatial_dims=2))["train"],
        open_splits(str(tmp_path / "arrays"), Context(group="patient", spatial_dims=2))["train"],
    ]
    for source in sources:
        by_name = dict(zip([source.name(i).rpartition("scans/")[2] for i in range(40)], source.groups, strict=True))
        expected = patients if "slice" not in next(iter(by_name)) else [by_name[name] for name in names]
        np.testing.assert_array_equal(expected, patients)
        train, val = hold_out(source, 8)
        assert set(source.groups[train]).isdisjoint(source.groups[val])
        assert len(val) == 8
        kept, held, apart = held_out_images({"train": source}, HELD_OUT, 8, Context(), "data.val")
        assert (len(kept), len(held), apart.notes, shared_groups(kept, held)) == (32, 8, (), ())
    assert not any("Patient" in note for note in sources[0].remarks)


@pytest.mark.parametrize(
    ("group", "kind", "named"),
    [
        ("patient", ConfigError, "parentheses"),
        (r"(case_\d+)", DataError, "0.png"),
        (r"(case_\d+)?", DataError, "0.png"),
        ("(", ConfigError, "data.group"),
    ],
)
def test_groups_that_cannot_be_had(tmp_path: Path, group: str, kind: type[Exception], named: str) -> None:
    pictures(tmp_path, ["0.png", "1.png"])
    with pytest.raises(kind, match=named):
        open_splits(str(tmp_path), Context.of(configure({"data.source": str(tmp_path), "data.group": group}).data))


def test_one_of_several_patterns(tmp_path: Path) -> None:
    pictures(tmp_path, ["case_1 0.png", "case_1 1.png", "p7.png"])
    source = open_splits(str(tmp_path), Context(group=r"(case_\d+)|(p\d+)"))["train"]
    assert source.groups is not None and source.groups.tolist() == ["case_1", "case_1", "p7"]


def test_all_of_one_group_cannot_be_held_out(tmp_path: Path) -> None:
    source = ArraySource(np.zeros((40, 8, 8)))
    source.groups = np.array(["a"] * 40)
    with pytest.raises(DataError, match="1 group"):
        held_out_images({"train": source}, HELD_OUT, 8, Context(), "data.val")


def test_groups_on_both_sides_are_said() -> None:
    train, test = (ArraySource(np.full((4, 8, 8), value)) for value in range(2))
    train.groups, test.groups = np.array(["a", "b", "b", "c"]), np.array(["c", "d", "d", "a"])
    (note,) = held_out_images({"train": train, "test": test}, "test", 8, Context(), "test_data")[2].notes
    assert "2 of 3 groups" in note


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ([f"P{i:03}_{j:02}.png" for i in range(10) for j in range(5)], 10),
        ([f"patient_{i}/slice_{j}.png" for i in range(10) for j in range(5)], 10),
        ([f"slide{i}_x{x}_y{y}.png" for i in range(6) for x in range(4) for y in range(4)], 6),
        ([f"scene-{i}_{x}_{y}.tif" for i in range(6) for x in range(4) for y in range(4)], 6),
        ([f"{i}_2025010{d}_{t}_{x}_{y}.tif" for i in "abcd" for d in "12" for t in ("pre", "post") for x in "012"
          for y in "012"], 4),
        ([f"vid{i}_frame{j:05}.jpg" for i in range(6) for j in range(30)], 6),
    ],
)  # fmt: skip
def test_whole_patients_clips_and_scenes_are_proposed(names: list[str], groups: int) -> None:
    pattern = proposed_group(names)
    assert pattern is not None
    assert len({match[1] for name in names if (match := re.search(pattern, name))}) == groups


@pytest.mark.parametrize(
    ("names", "labels", "proposed"),
    [
        ([f"fire{i}_{row}_{column}.tif" for i in "abc" for row in range(3) for column in range(3)], None, True),
        ([f"clip{i}/frame_{j:04}.jpg" for i in range(4) for j in range(5)], None, True),
        ([f"IMG_{i:04}.jpg" for i in range(20)], None, False),  # one camera
        ([f"cat/{i}.jpg" for i in range(9)] + [f"dog/{i}.jpg" for i in range(9)], None, False),
        ([f"cat_{i}.jpg" for i in range(9)] + [f"dog_{i}.jpg" for i in range(9)], [0] * 9 + [1] * 9, False),
        (["cat.jpg", "dog.jpg"], None, False),
    ],
)
def test_what_inspect_proposes(names: list[str], labels: list[int] | None, proposed: bool) -> None:
    pattern = proposed_group(names, labels)
    assert (pattern is not None) == proposed
    if pattern is not None:
        source = ArraySource(np.zeros((len(names), 2, 2)))
        source.name = lambda i: names[i]  # type: ignore[method-assign]
        name_groups({"train": source}, pattern)
        assert source.groups is not None
        assert 1 < len(set(source.groups)) <= len(names) / 3


def test_inspect_and_pretrain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "tiles", [f"fire{i // 5}_{i % 5}.png" for i in range(40)])
    main(["data", "inspect", str(tmp_path / "tiles")])
    said = capsys.readouterr().out
    assert "--data.group" in said
    pattern = said.partition("'--data.group=")[2].partition("'")[0]
    small = ["--recipe", "digits", "--epochs", "1", "--eval.count", "1", "--out", str(tmp_path / "run")]
    assert main(["pretrain", "--data", str(tmp_path / "tiles"), "--data.group", pattern, *small]) == 0
    assert main(["data", "inspect", str(tmp_path / "tiles"), "--group", pattern]) == 0
    assert "8 groups" in capsys.readouterr().out
