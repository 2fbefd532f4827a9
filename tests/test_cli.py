from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torchmae
from torchmae import cli
from torchmae.cli import main
from torchmae.commands import print_json
from torchmae.config import PretrainConfig
from torchmae.config.base import settings_of
from torchmae.settings import recipe_names
from torchmae.training.checkpoint import load_checkpoint

SMALL = (
    *("--threads=1", "--epochs=2", "--batch=128", "--progress=none", "--model.depth=1", "--model.embed_dim=16"),
    *("--model.decoder_depth=1", "--model.decoder_embed_dim=16", "--eval.count=2", "--eval.images=20"),
    *("--eval.knn_train=100", "--eval.knn_val=50"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures_of_features: None) -> Path:
    """A finished run on digits."""
    out = tmp_path_factory.mktemp("runs") / "a"
    assert main(["pretrain", "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all kinds of wrong input."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "notes.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "unknown.yaml").write_text("mask: {rato: 0.5}\n")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    for name, value in (("nothing", 0), ("everything", 255)):
        Image.new("L", (8, 8), value).save(tmp_path / f"{name}.png")
    return tmp_path


def complaint(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says: one line, status 2, nothing printed."""
    capsys.readouterr()
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("torchmae: ")
    return printed.err.removeprefix("torchmae: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrian", "unknown command 'pretrian'; did you mean `torchmae pretrain`?"),
        ("--data x", "unknown command '--data'; see torchmae --help"),
        ("recipes x", "unexpected word 'x'; options begin with two dashes, such as --data PATH"),
        # options
        ("pretrain --optim.rl 1", "unknown option 'optim.rl'; did you mean --optim.lr?"),
        ("pretrain images", "unexpected word 'images'; options begin with two dashes, such as --data PATH"),
        ("pretrain --config unknown.yaml", "unknown option 'mask.rato'; did you mean --mask.ratio?"),
        ("pretrain --config no.yaml", "cannot read no.yaml: No such file or directory; give the path of a YAML file"),
        ("pretrain --mask.ratio 1", "mask.ratio is 1; it must lie in (0, 1)"),
        ("pretrain --mask.ratio 0", "mask.ratio is 0; it must lie in (0, 1)"),
        ("pretrain --epochs 0", "epochs is 0; it must lie in [1, 1000000]"),
        ("pretrain --batch-size 0", "batch_size is 0; it must lie in [1, 1000000]"),
        ("pretrain --recipe cifar", "recipe is 'cifar'; did you mean 'cifar10'? choose from "),
        ("pretrain --device cuda", "device is 'cuda' but torch finds 0 cuda devices here; use --device auto, or cpu"),
        # models
        (
            "pretrain --model.patch_size 3",
            "patch size 3x3 does not divide input size 8x8; use an input size that is a multiple of the patch, ",
        ),
        (
            "pretrain --model.preset mlp --mask.strategy elements",
            "optim.name is 'muon', which is for transformer blocks, and the preset 'mlp' has none; use --optim.name",
        ),
        (
            "pretrain --model.preset mlp --mask.strategy elements --optim.name adam --checkpoint-activations true",
            "checkpoint_activations is true, which is for transformer blocks, and the preset 'mlp' has none",
        ),
        (
            "pretrain --model.preset mlp",
            "mask.strategy is 'random' and the preset 'mlp'; choose from elements, elements_inverted",
        ),
        (
            "pretrain --mask.strategy elements",
            "mask.strategy is 'elements' and the preset 'vit_digits'; choose from random, block, grid, cells2, cells4",
        ),
        ("pretrain --model.hidden_dim 5", "model.hidden_dim does not apply to preset 'vit_digits'; leave it out"),
        ("pretrain --model.embed_dim 63", "width 63 cannot be divided among 4 heads; use a divisor of the width"),
        # data
        ("pretrain --data no/where", "no such file or folder: no/where; check data.source"),
        ("pretrain --data cifar11", "'cifar11' is neither a path nor the name of a data set; did you mean 'cifar10'? "),
        ("pretrain --data empty", "empty is empty; accepted are .jpg, .jpeg, "),
        ("pretrain --data text", "text holds no images, only 1 other files (1 .txt); accepted are .jpg, "),
        ("pretrain --data file", "file is a single file of type (none); unpack archives first; accepted are .jpg, "),
        # run folders
        ("pretrain --out file", "file exists and is not an empty folder; choose another --out"),
        ("pretrain --out images", "images exists and is not an empty folder; choose another --out"),
        ("pretrain --out file/a", "cannot write to file/a: Not a directory; choose another --out"),
        ("pretrain --out RUN", "RUN holds a run already; resume it with --resume RUN, or choose another --out"),
        ("pretrain --resume nowhere", "nowhere does not exist; give the folder that `torchmae pretrain --out` made"),
        (
            "pretrain --resume images",
            "images is not a run folder (it has no config.yaml); give the folder that `torchmae pretrain --out` made",
        ),
        ("pretrain --resume", "--resume has no value; give one: --resume VALUE"),
        *(
            (
                f"pretrain --resume RUN --{name} {value}",
                f"{name} cannot change in a resumed run; drop --{name}, or begin a new run with these weights: --init-",
            )
            for name, value in (
                *(("seed", 4), ("epochs", 3), ("model.depth", 2), ("data.source", "images"), ("out", "b")),
                *(("recipe", "cifar10"), ("mask.ratio", 0.5), ("batch_size", 7), ("max_minutes", 1)),
            )
        ),
        ("pretrain --resume RUN --sed 4", "unknown option 'sed'; did you mean --seed?"),
        # reconstruct
        ("reconstruct", "not given: run, images; see --help"),
        ("reconstruct RUN", "not given: images; see --help"),
        (
            "reconstruct nowhere images/0.png",
            "nowhere holds no model: cannot read model.json; give a run folder of `torchmae pretrain`",
        ),
        (
            "reconstruct RUN no.png",
            "cannot read no.png: No such file or directory; give files or a folder, as for torchmae pretrain --data",
        ),
        ("reconstruct RUN text", "cannot read text: "),
        ("reconstruct RUN text/notes.txt", "text/x: No such file or directory"),
        ("reconstruct RUN images/0.png --mask.ratio 1.5", "mask.ratio is 1.5; it must lie in (0, 1)"),
        ("reconstruct RUN images/0.png --mask.stratgy x", "unknown option 'mask.stratgy'; did you mean --mask.strat"),
        ("reconstruct RUN images/0.png --mask.strategy elements", "mask.strategy is 'elements'; choose from random, "),
        (
            "reconstruct RUN images/0.png --mask-file no.png",
            "cannot read no.png: No such file or directory; give image",
        ),
        (
            "reconstruct RUN images/0.png --mask-file nothing.png",
            "nothing.png: the mask removes 0 of 16 patches; paint the hole white and the rest black",
        ),
        (
            "reconstruct RUN images/0.png --mask-file everything.png",
            "everything.png: the mask removes 16 of 16 patches; paint the hole white and the rest black",
        ),
        (
            "reconstruct RUN images/0.png --out a.jpg",
            "out is 'a.jpg'; give a name that ends in .png",
        ),
        ("reconstruct RUN images/0.png --out file/a.png", "cannot write file/a.png: Not a directory"),
        ("reconstruct RUN images/0.png --seed x", "seed is x; it takes a whole number"),
        ("reconstruct RUN images/0.png --seed -1", "seed is -1; it must lie in [0, 18446744073709551615]"),
    ],
)
def test_wrong_input_is_one_line(words: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "--device cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    assert complaint(words.replace("RUN", str(run)), capsys).startswith(said.replace("RUN", str(run)))
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_a_refused_run_leaves_no_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("--data empty", "--model.patch_size 3", "--model.in_chans 3", "--device cuda:99"):
        complaint(f"pretrain --out new {words}", capsys)
        assert not (place / "new").exists()


def test_data_that_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--data", "images", "--recipe", "digits", "--out", "a", *SMALL]) == 0
    Image.new("RGB", (10, 12)).save(place / "images" / "9.png")
    assert complaint("pretrain --resume a", capsys) == (
        "the images of images have changed since the checkpoint; "
        "bring the same images back, start a new run in another folder, or go on with what is there: "
        "--data.allow_change true"
    )
    assert main(["pretrain", "--resume", "a", "--data.allow_change", "true"]) == 0
    changed = "the images of images have changed since the checkpoint; going on with what is there"
    assert changed in capsys.readouterr().err.splitlines()


def test_a_run_prints_its_table_and_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--resume", str(run), "--json"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert f"report: {run}/report.html" in lines
    assert re.search(r"Explained variance +-?\d\.\d{3} +-?\d\.\d{3}", printed.out)
    assert re.search(r"kNN accuracy, % +\d+\.\d +\d+\.\d +\d+\.\d", printed.out)
    figures = json.loads(lines[-1])
    assert figures == json.loads((run / "summary.json").read_text())
    assert (figures["state"], figures["steps"], figures["images_seen"]) == ("finished", 24, 2 * 1437)


def test_json_is_a_line_or_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"run": "a", "loss": 0.5}
    for to in (False, True, place / "figures.json"):
        print_json(to, figures)
    assert capsys.readouterr().out == f"{json.dumps(figures)}\n"
    assert json.loads((place / "figures.json").read_text()) == figures


def test_the_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()} - {"tensorboard"}
    assert names == {
        *("config.yaml", "metrics.jsonl", "checkpoints", "model.safetensors", "model.json", "reconstructions"),
        *("pictures", "report.html", "summary.json", "environment.json", ".lock"),
    }
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert len(list((run / "reconstructions").glob("*.png"))) == 2
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    baselines = {"knn_pixels", "knn_untrained", "linear_pixels", "linear_untrained", "effective_rank_untrained"}
    baselines |= {"majority", "majority_images"}
    assert records[0].keys() == {"kind", "step"} | baselines
    assert {record["kind"] for record in records} == {"baseline", "train", "epoch", "val"}
    assert all(len(record) > 3 for record in records if record["kind"] == "val")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["started"].endswith("+00:00")


@pytest.mark.parametrize("args", [[], ["--recipe", "tutorial"], ["--mask.ratio=0.5", "--batch", "64", "--data=digits"]])
def test_print_config_can_be_fed_back(args: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *args, "--print_config"]) == 0
    first = capsys.readouterr().out
    (place / "config.yaml").write_text(first)
    assert main(["pretrain", "--config", "config.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert "mask:" in first


def test_an_image_that_is_not_finite_is_named_and_skipped(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32)
    images[17] = np.nan
    np.save(place / "images.npy", images)
    options = ("--recipe=digits", "--data=images.npy", "--data.mean=[0.5]", "--data.std=[0.3]", "--batch=4")
    options += ("--data.nodata=none",)
    assert main(["pretrain", *SMALL, *options, "--data.val=none", "--data.max_bad=0.05", "--out", "a"]) == 0
    assert "skipped: the loss" not in capsys.readouterr().err
    assert (place / "a" / "bad_files.txt").read_text().startswith("images.npy/17\t")
    checkpoint = load_checkpoint(place / "a" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 20
    assert all(value.isfinite().all() for value in checkpoint.model.values())


def test_files_that_cannot_be_read_are_counted_and_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "images" / "bad.png").write_bytes(b"\x89PNG\r\n")
    words = ["pretrain", *SMALL, "--recipe=digits", "--data=images", "--data.max_bad=0.5", "--out=a"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == "1 images could not be read and were skipped: see a/bad_files.txt\n"
    assert (place / "a" / "bad_files.txt").read_text().startswith("images/bad.png\t")


def test_reconstruct(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reconstruct", str(run), "images/0.png", "images/1.png", "--out", "new/grid.png"]) == 0
    assert capsys.readouterr().out == "new/grid.png  (masked patches as predicted)\n"
    with Image.open(place / "new" / "grid.png") as picture:
        assert picture.width > picture.height / 2
    options = ["images/0.png", "--mask.ratio=0.9", "--mask.strategy=block", "--device=cpu", "--out", "a.png"]
    assert main(["reconstruct", str(run), *options]) == 0
    assert main(["reconstruct", str(run), *options[:-1], "b.png", "--seed=0"]) == 0
    assert main(["reconstruct", str(run), *options[:-1], "c.png", "--seed=1"]) == 0
    a, b, c = ((place / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "I;16", "F"])
def test_in_painting_hides_what_is_white(mode: str, run: Path, place: Path) -> None:
    from torchmae.commands.reconstruct import mask_from_image

    pixels = np.zeros((8, 8))
    pixels[2:4, 4:8] = 1
    if mode == "F":
        Image.fromarray(pixels.astype(np.float32)).save(place / "hole.tif")
    elif mode == "I;16":
        Image.fromarray((pixels * 65535).astype(np.uint16)).save(place / "hole.tif")
    else:
        Image.fromarray((pixels * 255).astype(np.uint8)).convert(mode).save(place / "hole.tif")
    mask = mask_from_image(torchmae.load(run), Path("hole.tif"), 3)
    assert mask.ids_masked.tolist() == [[6, 7]] * 3  # row-major in a grid of 4 x 4
    assert main(["reconstruct", str(run), "images/0.png", "--mask-file", "hole.tif", "--out", "a.png"]) == 0


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(re.fullmatch(r"[a-z0-9-]+  +\S.{20,}", line) for line in lines)
    assert main(["recipes", "--help"]) == 0


def test_help_shows_every_option_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--data\.source( SOURCE)?, --data SOURCE", shown)  # from Python 3.13 on without the first
    assert f"--mask.ratio RATIO {settings_of(PretrainConfig)['mask.ratio'].about} (default: 0.75)" in shown
    assert "--resume" in shown
    assert "--json" in shown
    assert main(["reconstruct", "--help"]) == 0
    assert "--mask_file" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"torchmae {torchmae.__version__}\npython {sys.version.split()[0]}")
    assert torch.__version__ in shown


def test_quick_answers_load_no_torch() -> None:
    code = """
import sys
from torchmae.cli import COMMANDS, main
answers = [["--help"], ["data"], ["recipes"], ["pretrian"], ["bench", "stepp"]]
answers += [[*name.split(), "--help"] for name in COMMANDS]
print([main(words) for words in answers].count(2), file=sys.stderr)
heavy = ("torch", "torchvision", "numpy", "sklearn", "matplotlib", "gradio", "rich")
print(*[name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-2:] == ["2", ""]
    assert "usage: torchmae reconstruct RUN IMAGES... [OPTIONS]" in ran.stdout
    assert "usage: torchmae visualize RUN [IMAGES...] [OPTIONS]" in ran.stdout


def test_the_module_runs_too() -> None:
    ran = subprocess.run([sys.executable, "-m", "torchmae", "recipes"], capture_output=True, text=True, check=False)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (0, len(recipe_names()))
    ran = subprocess.run([sys.executable, "-m", "torchmae", "recipe"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "torchmae: unknown command 'recipe'; did you mean `torchmae recipes`?\n"


def test_ctrl_c_before_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchmae.commands.recipes.run", interrupt)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "torchmae: stopped\n"


def test_a_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m torchmae pretrain --help; echo $? >&2"
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(["sh", "-c", command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert "Traceback" not in ran.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is too small for a run, with a file on it that can be removed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("free", [60_000, 150_000, 330_000])
def test_a_full_disk_loses_nothing(free: int, run: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, filler = small_disk / "a", small_disk / "filler"
    filler.write_bytes(bytes(8 * 2**20 - free))
    capsys.readouterr()
    assert main(["pretrain", "--out", str(out), *SMALL, "--checkpoint-minutes=0"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(rf"torchmae: cannot (write|save) .*{out}.*: No space left on device.*; free space ", said)
    before = load_checkpoint(out / "checkpoints")
    assert before is not None or free < 100_000
    filler.unlink()
    assert main(["pretrain", "--resume", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_the_folder_of_a_run_may_move(run: Path, place: Path) -> None:
    shutil.copytree(run, place / "moved")
    (place / "moved" / "model.safetensors").unlink()
    assert main(["pretrain", "--resume", "moved"]) == 0
    assert (place / "moved" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_an_early_size_that_does_not_fit_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--recipe", "digits", "--start_size", "3", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("torchmae: start_size is (3, 3): patch size 2x2 does not divide")
    assert not (tmp_path / "run").exists()


def test_an_empty_file_of_settings_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").touch()
    texts = []
    for words in ([], ["--config", str(tmp_path / "empty.yaml")]):
        assert main(["pretrain", "--recipe", "digits", *words, "--print_config"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
