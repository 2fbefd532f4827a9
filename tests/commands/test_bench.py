from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchmae.cli import main
from torchmae.commands import bench
from torchmae.config import PretrainConfig
from torchmae.settings import read_words

SMALL = ["--model.preset", "vit_digits", "--model.depth", "1", "--batch_size", "8", "--threads", "1"]
QUICK = ["--rounds", "1", "--steps", "1", "--precision", "fp32", "--progress", "none"]


def test_a_step_prints_a_table_and_writes_figures_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "a.json"), f"--plot={tmp_path / 'a.png'}"]
    assert main(["bench", "step", *SMALL, *QUICK, *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "vit_digits, 1 x 8 x 8, batch 8, mask 0.75"
    assert any(line.startswith(" torchmae, fp32 ") for line in printed)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["torchmae"]["batch_size"] == 8
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "preset", "depth", "batch"),
    [
        ([], bench.STEP_PRESET, None, 256),
        (["--batch", "4"], bench.STEP_PRESET, None, 4),
        (["--model.preset=vit_base"], "vit_base", None, 256),
        (["--recipe", "cifar10"], "vit_tiny_32_p4", 6, 128),
    ],
)
def test_the_settings_of_a_step(words: list[str], preset: str, depth: int | None, batch: int) -> None:
    config = bench.step_config(read_words(words, PretrainConfig))
    assert (config.model.preset, config.model.depth, config.batch_size) == (preset, depth, batch)


def test_a_steps_settings_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {preset: vit_small}\nbatch_size: 2\n")
    config = bench.step_config(read_words(["--config", str(tmp_path / "run.yaml")], PretrainConfig))
    assert (config.model.preset, config.batch_size) == ("vit_small", 2)


def test_data_chooses_the_recipe_of_the_others() -> None:
    assert bench.configure({"data.source": "digits"}).recipe == "digits"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stepp"], "unknown command 'bench stepp'; did you mean `torchmae bench step`?"),
        (["step", "--against", "tranformers"], "against is 'tranformers'; did you mean 'transformers'?"),
        (["data", "--against", "transformers"], "against is 'transformers'; choose from torchvision"),
        (["step", "--rounds", "0"], "rounds is 0; it must lie in [1, 10000]"),
        (["step", "--rounds"], "--rounds has no value"),
        (["step", "--stepps", "3"], "unknown option 'stepps'"),
        (["step", "--plot", "a.pdf"], "plot is 'a.pdf'; give a name that ends in .png"),
        (["step", "--json", "no/such/folder/a.json"], "the folder of no/such/folder/a.json does not exist"),
        (
            ["step", "--recipe", "cifar10", "--against", "transformers"],
            "transformers has no equal of this model.decoder",
        ),
        (["step", "--recipe", "cifar10", "--against", "timm-blocks"], "timm-blocks has no equal of this model.decoder"),
        (["train", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_the_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert all(f"bench {part}" in shown for part in ("step", "data", "train"))
