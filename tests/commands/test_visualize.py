from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_run

from torchmae.cli import main

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def picture_of(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


@pytest.mark.parametrize(
    ("kind", "title", "size"),
    [
        ("pca", "Patch features as colours", (1 * 2, 1)),
        ("attention", "Attention of the class token", (4, 1)),
        ("neighbours", "Nearest neighbours", (8, 1)),
        ("ratios", "Reconstruction at rising mask ratios", (5, 2)),
    ],
)
def test_every_kind_of_an_image(
    kind: str, title: str, size: tuple[int, int], run: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = photo.with_name("out.png")
    words = [str(run), str(photo), "--kind", kind, "--out", str(out), "--num-images", "100", *CPU]
    assert main(["visualize", *words]) == 0
    assert capsys.readouterr().out == f"{out}  ({title})\n"
    picture = picture_of(out)
    assert (picture.width // 112, picture.height // 112) == size
    assert picture.info["Title"] == title
    first = out.read_bytes()
    assert main(["visualize", *words]) == 0
    assert out.read_bytes() == first


def test_without_images_some_of_the_held_out_ones_are_drawn(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["visualize", str(run), "--out", str(out), *CPU]) == 0
    assert (picture_of(out).width // 112, picture_of(out).height // 112) == (8, 2)


def test_images_may_stand_anywhere(run: Path, photo: Path) -> None:
    out = photo.with_name("out.png")
    assert main(["visualize", str(run), "--out", str(out), str(photo), "--kind=pca", str(photo), *CPU]) == 0
    assert picture_of(out).width // 112 == 4


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_a_map_of_the_held_out_images(run: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out.png"
    words = ["--kind", "map", "--method", method, "--num-images", "60", "--out", str(out), *CPU]
    assert main(["visualize", str(run), *words]) == 0
    assert picture_of(out).info["Description"].startswith("60 images placed on a plane by ")


def test_other_data_than_the_runs_own(run: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        shutil.copy(photo, folder / f"{number}.png")
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(run / name, exported)
    out = tmp_path / "out.png"
    words = [str(exported), str(photo), "--kind", "neighbours", "--data", str(folder), "--out", str(out), *CPU]
    assert main(["visualize", *words]) == 0
    assert picture_of(out).width // 112 == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "not given: run"),
        (["nowhere"], "nowhere holds no model"),
        (["{run}", "--kind", "pcaa"], "kind is 'pcaa'; did you mean 'pca'?"),
        (["{run}", "--kind", "map", "photo.png"], "a map shows a data set, and photo.png is an image"),
        (["{run}", "nothing.png"], "cannot read nothing.png"),
        (["{run}", *["photo.png"] * 65], "65 images are too many for one picture; give 64 or fewer"),
        (["{run}", "--out", "picture.jpg"], "out is 'picture.jpg'; give a name that ends in .png"),
        (["{run}", "--method", "som"], "method is 'som'"),
        (["{run}", "--data", "nothing-here"], "'nothing-here' is neither a path nor the name of a data set"),
        (["{run}", "--device", "tpu"], "device is 'tpu'"),
        (["{run}", "--num-images", "1"], "num_images is 1; it must lie in [3, 1000000]"),
        (["{run}", "--knd", "pca"], "unknown option 'knd'; did you mean --kind?"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["visualize", *(arg.replace("{run}", str(run)) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_model_without_its_data_asks_for_some(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path)
    assert main(["visualize", str(tmp_path), *CPU]) == 2
    assert "does not say what the model was trained on; name the images: --data PATH_OR_NAME" in capsys.readouterr().err
