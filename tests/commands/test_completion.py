from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchmae import cli
from torchmae.cli import main
from torchmae.commands.completion import command_tree
from torchmae.config import PretrainConfig
from torchmae.config.base import settings_of
from torchmae.settings import recipe_names

pytest.importorskip("shtab")

SHELLS = ("bash", "zsh", "fish")

# Sets what bash sets when Tab is pressed after the last word, calls the function, prints what it offers.
PRESS_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
$(complete -p torchmae | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bash, zsh and fish: what the command writes for each."""
    path = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        command = [sys.executable, "-W", "error", "-m", "torchmae", "completion", shell]
        (path / shell).write_bytes(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return path


@pytest.fixture
def script(folder: Path) -> Path:
    return folder / "bash"


CASES = [
    ("pre", {"pretrain"}),
    ("", {name.split()[0] for name in cli.COMMANDS}),
    ("pretrain --rec", {"--recipe"}),
    ("pretrain --recipe ", set(recipe_names())),
    ("pretrain --epochs 3 --recipe ci", {"cifar10", "cifar10-cpu"}),
    ("pretrain --batch", {"--batch", "--batch_size"}),
    ("pretrain --optim.w", {"--optim.weight_decay", "--optim.warmup"}),
    ("pretrain --data.cache ", {"auto", "memory", "device", "none"}),
    ("pretrain --data.flip ", {"true", "false"}),
    ("pretrain --model.preset vit_t", {"vit_tiny", "vit_tiny_32_p4", "vit_tiny_32_p2"}),
    ("pretrain --trackers w", {"wandb"}),
    ("pretrain --resum", {"--resume"}),
    ("evaluate runs/a --method l", {"linear"}),
    ("evaluate runs/a --precision ", {"auto", "bf16", "fp32"}),
    ("visualize runs/a --method ", {"tsne", "pca", "umap"}),
    ("export runs/a --to hf", {"hf-mae", "hf-vit"}),
    ("bench ", {"step", "data", "train"}),
    ("bench step --aga", {"--against"}),
    ("bench step --recipe d", {"digits"}),
    ("data pack --format ", {"parquet", "wds", "npy"}),
    ("completion ", set(SHELLS)),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(("words", "offered"), CASES)
def test_bash_completes(words: str, offered: set[str], script: Path) -> None:
    ran = subprocess.run(
        ["bash", "-c", PRESS_TAB, "bash", str(script), "torchmae", *words.split(" ")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""
    assert {line for line in ran.stdout.split() if line not in ("-h", "--help", "--version")} == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_paths(script: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for words in (["pretrain", "--data"], ["pretrain", "--resume"], ["evaluate"], ["reconstruct", "run"]):
        command = ["bash", "-c", PRESS_TAB, "bash", str(script), "torchmae", *words, f"{tmp_path}/im"]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ran.stdout.split() == [f"{tmp_path}/images"], words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    written = capsys.readouterr().out
    assert all(word in written for word in ("cifar10-cpu", "optim.base_lr", "elements_inverted", "visualize"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=written, text=True, check=True)


def options(parser: argparse.ArgumentParser, *words: str) -> set[str]:
    """The options of a command in the tree."""
    for word in words:
        (branches,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = branches.choices[word]
    return {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}


def test_every_option_of_every_help_is_completed(capsys: pytest.CaptureFixture[str]) -> None:
    tree = command_tree(None)
    for name, command in cli.COMMANDS.items():
        assert main([*name.split(), "--help"]) == 0
        shown = set(re.findall(r"^  (?:-h, )?--([\w.]+)", capsys.readouterr().out, re.MULTILINE)) - {"help"}
        settings = settings_of(*command.kinds)
        words = {setting for setting in settings if settings[setting].positional}
        assert {f"--{option}" for option in {*shown, *settings} - words} <= options(tree, *name.split()), name


def test_values_are_those_that_the_types_allow() -> None:
    known = settings_of(PretrainConfig)
    assert known["optim.name"].choices == ("adamw", "adam", "muon")
    assert known["compile"].choices == ("true", "false")
    assert known["data.source"].choices == known["epochs"].choices == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zish"], "shell is 'zish'; did you mean 'zsh'? choose from bash, zsh, fish"),
        (["bash", "x"], "unexpected word 'x'; options begin with two dashes, such as --data PATH"),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words]) == 2
    assert capsys.readouterr().err == f"torchmae: {said}\n"


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "torchmae: shtab is not installed, and this needs it; pip install 'torchmae[completion]'\n"
    )
    assert main(["completion", "--help"]) == 0


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(("words", "offered"), CASES)
def test_fish_completes(words: str, offered: set[str], folder: Path, tmp_path: Path) -> None:
    asks = f"source {folder / 'fish'}; complete -C 'torchmae {words}'"
    command = ["fish", "--no-config", "-c", asks]
    environment = os.environ | {"HOME": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.stderr == ""
    assert offered <= {line.split("\t")[0] for line in ran.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_its_script(folder: Path, tmp_path: Path) -> None:
    """Found, bound to the command and parsed, as in a user's shell; what Tab then shows takes a terminal."""
    (tmp_path / "_torchmae").write_bytes((folder / "zsh").read_bytes())
    loads = (
        f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; "
        "autoload +X _torchmae; print $_comps[torchmae]"
    )
    ran = subprocess.run(["zsh", "-f", "-c", loads], capture_output=True, text=True)
    assert (ran.stdout.split(), ran.stderr) == (["_torchmae"], "")
