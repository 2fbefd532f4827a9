from __future__ import annotations

import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchmae import settings
from torchmae.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "in" / ("ant" if i < 4 else "bee") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
    (tmp_path / "in" / "bee" / "bad.png").write_bytes(b"rubbish")
    return tmp_path / "in"


def test_inspect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheets" / "sheet.png"
    assert main(["data", "inspect", str(folder), "--sheet", str(sheet), "--progress", "none"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 7 images",
        "  size      all 28x28",
        "  channels  1",
        "  values    uint8, from 0 to 255",
        "  format    PNG",
        "  seem      grey pictures: 28 x 28",
        "  classes   2, of 3 (bee) to 4 (ant) images",
        "            ant 4, bee 3",
        "  corrupt   1",
        f"            {folder}/bee/bad.png: not an image, or cut short before its first pixel",
        "duplicates: none",
        "data: labels from folders (2 classes)",
        f"contact sheet: {sheet}",
        f"to train on it: torchmae pretrain --data {folder} --recipe cifar10-cpu",
    ]
    with Image.open(sheet) as picture:
        assert picture.size == (3 * 132 - 4, 3 * 132 - 4)
        assert len(np.unique(np.asarray(picture.convert("L").crop((12, 12, 116, 116))))) > 50  # something is drawn


def test_inspect_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(folder), "--json", "--limit", "4", "--progress", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["images"] == 7
    assert found["splits"]["train"]["examined"] == 4
    assert found["suggestion"].endswith("--recipe cifar10-cpu")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 400, 3), {"input_size": (400,), "patch_size": 2}),
        ((4, 20, 40, 40, 1), {"input_size": (16, 40, 40), "patch_size": 8}),
        ((4, 64, 256, 7), {"input_size": (64, 256), "patch_size": 8}),
    ],
)
def test_the_suggested_command_fits_other_shapes(
    tmp_path: Path, shape: tuple[int, ...], options: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x y.npy"
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    np.save(path, images if len(shape) > 3 else images[..., None, :])
    if len(shape) == 3:
        np.save(path, images[..., 0])
    assert main(["data", "inspect", str(path), "--json", "--progress", "none"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["suggestion"])
    config = settings.parse(words[2:])
    assert (config.data.source, config.model.input_size, config.model.patch_size) == (
        str(path),
        options["input_size"],
        options["patch_size"],
    )


def test_pack(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["data", "pack", str(folder), str(out), "--format", "wds", "--progress", "none"]
    assert main([*words, "--max-bad", "0.2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"left out: {folder}/bee/bad.png: not an image, or cut short before its first pixel"
    assert printed[1].startswith(f"{out}  (6 images in 1 file, ")
    assert printed[2] == f"to train on it: torchmae pretrain --data {out}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "not given: data"),
        (["inspekt", "x"], "unknown command 'data inspekt'; did you mean `torchmae data inspect`?"),
        (["inspect", "nowhere/at/all"], "no such file or folder: nowhere/at/all"),
        (["inspect", "digits", "--sheet", "x.jpg"], "sheet is 'x.jpg'; give a name that ends in .png"),
        (["pack", "digits"], "not given: out"),
        (["pack", "digits", "out", "--formt", "wds"], "unknown option 'formt'; did you mean --format?"),
        (["pack", "digits", "out", "--format", "zip"], "format is 'zip'; choose from parquet, wds, npy"),
    ],
)
def test_mistakes_end_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_inspect_where_no_label_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, unknown = np.zeros((6, 8, 8, 1), dtype=np.uint8), np.full(6, -1)
    np.savez(tmp_path / "unknown.npz", train_images=images, train_labels=unknown)
    assert main(["data", "inspect", str(tmp_path / "unknown.npz"), "--progress", "none"]) == 0
    assert "  classes   none: no image has a known label\n" in capsys.readouterr().out


def test_names_of_classes_reach_no_terminal_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("\x1b[31mred", 3), ("b\nc", 4)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(tmp_path / "in" / name / f"{i}.png")
    assert main(["data", "inspect", str(tmp_path / "in"), "--progress", "none"]) == 0
    said = capsys.readouterr().out
    assert "classes   2, of 3 (\\x1b[31mred) to 4 (b\\nc) images" in said
    assert "\x1b" not in said


def test_a_folder_with_a_space_can_be_pasted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a b")
    assert main(["data", "pack", str(folder), out, "--format", "wds", "--progress", "none"]) == 0
    assert capsys.readouterr().out.endswith(f"to train on it: torchmae pretrain --data {shlex.quote(out)}\n")


def test_an_empty_name_is_not_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", ""]) == 2
    assert capsys.readouterr().err == (
        "torchmae: data.source is empty; give a folder, a file, or a name such as digits\n"
    )


@pytest.mark.parametrize("words", [[], ["--json", "true"], ["--sheet", "sheet.png"]], ids=["plain", "json", "sheet"])
def test_inspect_of_nothing_that_can_be_read_fails(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.png").write_bytes(b"no picture")
    assert main(["data", "inspect", "in", "--progress", "none", *words]) == 2
    printed = capsys.readouterr()
    assert "a.png" in printed.out
    assert printed.err.count("\n") == 1


def test_a_choice_that_the_data_asks_for_is_part_of_the_command_to_begin_with(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHMAE_CACHE", str(folder.parent / "cache"))
    shard = folder.parent / "x.tar"
    with tarfile.open(shard, "w") as archive:
        for i in range(4):
            archive.add(folder / "ant" / f"{i}.png", f"{i}.png")
            archive.add(folder / "ant" / f"{i}.png", f"{i}.seg.png")
    assert main(["data", "inspect", str(shard), "--progress", "none"]) == 2
    asked = capsys.readouterr().err
    assert "4 samples of x.tar have several pictures" in asked and "--data.member png" in asked
    assert main(["data", "inspect", str(shard), "--data.member", "png", "--progress", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 4 images" and lines[-1].endswith("--data.member=png")
