from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchmae import settings
from torchmae.config import DataConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from torchmae.errors import ConfigError
from torchmae.settings import as_options, parse, peek, read_yaml, recipe_names, to_yaml


def names(config: type[Any] = PretrainConfig, prefix: str = "") -> list[str]:
    """The dotted name of every setting."""
    found = []
    for field in fields(config):
        if is_dataclass(field.default_factory):
            found += names(field.default_factory, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            found.append(prefix + field.name)
    return found


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_defaults() -> None:
    assert parse([]) == PretrainConfig()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data", "x"], PretrainConfig(data=DataConfig(source="x"))),
        (["--data=x"], PretrainConfig(data=DataConfig(source="x"))),
        (["--data.source", "x"], PretrainConfig(data=DataConfig(source="x"))),
        (["--data.source=x=y"], PretrainConfig(data=DataConfig(source="x=y"))),
        (["--data", "123"], PretrainConfig(data=DataConfig(source="123"))),
        (["--max-minutes", "1"], PretrainConfig(max_minutes=1.0)),
        (["--max_minutes", "1"], PretrainConfig(max_minutes=1.0)),
        (["--batch", "64"], PretrainConfig(batch_size=64)),
        (["--batch-size=64"], PretrainConfig(batch_size=64)),
        (["--batch_size=64", "--batch", "32"], PretrainConfig(batch_size=32)),
        (["--mask.ratio=0.5"], PretrainConfig(mask=MaskConfig(ratio=0.5))),
        (["--optim.lr", "1e-4"], PretrainConfig(optim=OptimConfig(lr=1e-4))),
        (["--optim.lr", "null"], PretrainConfig()),
        (["--compile", "true"], PretrainConfig(compile=True)),
        (["--data.crop_scale", "[0.5, 1]"], PretrainConfig(data=DataConfig(crop_scale=(0.5, 1.0)))),
        (["--data.crop-scale=[0.5,1]"], PretrainConfig(data=DataConfig(crop_scale=(0.5, 1.0)))),
        (["--model.input_size", "32"], PretrainConfig(model=ModelConfig(input_size=32))),
        (["--model.input_size", "[32, 48]"], PretrainConfig(model=ModelConfig(input_size=(32, 48)))),
        (["--seed", str(2**64 - 1)], PretrainConfig(seed=2**64 - 1)),
    ],
)
def test_forms_of_options(args: list[str], expected: PretrainConfig) -> None:
    assert parse(args) == expected


def test_the_order_of_precedence(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "mask: {ratio: 0.6}\nepochs: 7\ndata: {flip: true}\n")
    other = write(tmp_path / "b.yaml", "epochs: 8\n")
    recipe, default = parse([], "digits"), PretrainConfig()
    assert (recipe.data.flip, recipe.recipe) == (False, "digits")  # recipe over defaults
    assert recipe.batch_size != default.batch_size
    assert recipe.data.crop_scale != default.data.crop_scale
    for args in (
        ["--config", file, "--mask.ratio", "0.3"],
        ["--mask.ratio", "0.3", "--config", file],
        ["--mask.ratio=0.3", f"--config={file}", "--recipe", "digits"],
        ["--recipe", "digits", "--mask.ratio", "0.3", "--config", file],
    ):
        config = parse(args, "digits")
        assert config.mask.ratio == 0.3  # option over file
        assert (config.epochs, config.data.flip) == (7, True)  # file over recipe
        assert (config.batch_size, config.data.crop_scale) == (recipe.batch_size, recipe.data.crop_scale)
        assert config.eval == default.eval
    both = parse(["--mask.ratio", "0.3", "--config", file, "--config", other], "digits")
    assert (both.epochs, both.mask.ratio, both.data.flip) == (8, 0.3, True)  # the later file over the earlier


@pytest.mark.parametrize("recipe", [None, *recipe_names()])
def test_yaml_gives_the_same_settings_back(tmp_path: Path, recipe: str | None) -> None:
    config = parse(["--optim.lr=1e-5", "--optim.clip_grad", "1.5", "--model.input_size=[24,32]", "--seed=3"], recipe)
    file = write(tmp_path / "config.yaml", to_yaml(config))
    assert parse(["--config", file]) == config
    assert parse(["--config", file], recipe) == config
    assert list(yaml.safe_load(to_yaml(config))) == [field.name for field in fields(PretrainConfig)]


@pytest.mark.parametrize("name", names())
def test_every_setting_has_an_option_with_its_description(name: str) -> None:
    parser = settings.build_parser()
    (action,) = (action for action in parser._actions if f"--{name}" in action.option_strings)
    assert action.help, name
    assert len(str(action.help)) > 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.rl", "1"], "unknown option 'optim.rl'; did you mean --optim.lr?"),
        (["--optim.rl=1"], "unknown option 'optim.rl'; did you mean --optim.lr?"),
        (["--lr", "1"], "unknown option 'lr'; did you mean --optim.lr?"),
        (["--mask-ratio", "0.5"], "unknown option 'mask_ratio'; did you mean --mask.ratio?"),
        (["--epoch", "3"], "unknown option 'epoch'; did you mean --epochs?"),
        (["--zzz"], "unknown option 'zzz'; see --help"),
        (["images"], "unexpected word 'images'; options begin with two dashes, such as --data PATH"),
        (["--epochs"], "--epochs has no value; give one: --epochs VALUE"),
        (["--config"], "--config has no value; give one: --config VALUE"),
        (["--epochs", "x"], "epochs is x; it takes a whole number"),
        (["--epochs", "1.5"], "epochs is 1.5; it takes a whole number"),
        (["--epochs", "0"], "epochs is 0; it must lie in [1, 1000000]"),
        (["--batch-size", "0"], "batch_size is 0; it must lie in [1, 1000000]"),
        (["--mask.ratio", "x"], "mask.ratio is x; it takes a number"),
        (["--mask.ratio", "1"], "mask.ratio is 1; it must lie in (0, 1)"),
        (["--mask.ratio", "-0.5"], "mask.ratio is -0.5; it must lie in (0, 1)"),
        (["--mask.ratio", ".nan"], "mask.ratio is nan; it must lie in (0, 1)"),
        (["--mask", "5"], "mask is 5; set its parts one by one: --mask.strategy, --mask.ratio, --mask.final_ratio"),
        (["--compile", "maybe"], "compile is maybe; it takes true or false"),
        (["--data.flip", "3"], "data.flip is 3; it takes true or false"),
        (["--data.crop_scale", "0.5"], "data.crop_scale is 0.5; it takes a list such as [1, 2]"),
        (["--optim.betas", "[0.9]"], "optim.betas is [0.9]; it takes a list of 2 values"),
        (["--model.patch_size", "x"], "model.patch_size is x; it takes a whole number or a list such as [1, 2]"),
        (["--precision", "fp16"], "precision is 'fp16'; did you mean 'bf16'? choose from auto, bf16, fp32"),
    ],
)
def test_options_that_do_not_fit(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(args)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask:\n  rato: 0.5\n", "unknown option 'mask.rato'; did you mean --mask.ratio?"),
        ("optm:\n  lr: 0.5\n", "unknown option 'optm.lr'; did you mean --optim.lr?"),
        ("epoch: 5\n", "unknown option 'epoch'; did you mean --epochs?"),
        ("mask: 5\n", "mask is 5 in FILE; write mask: {strategy: VALUE}"),
        ("data: images\n", "data is 'images' in FILE; write data: {source: VALUE}"),
        ("mask: {ratio: high}\n", "mask.ratio is high; it takes a number"),
        ("mask: {ratio: 2}\n", "mask.ratio is 2; it must lie in (0, 1)"),
        ("- epochs\n", "FILE holds a list; it must be a mapping of settings to values"),
        (
            "mask: [\n",
            "FILE is not valid YAML: expected the node content, but found '<stream end>' in line 2; mend the",
        ),
        ("mask: \t- x\n", "FILE is not valid YAML: "),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "my.yaml", text)
    with pytest.raises(ConfigError) as caught:
        parse(["--config", file])
    assert str(caught.value).startswith(message.replace("FILE", file))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert str(caught.value) == f"cannot read {path}: {reason}; give the path of a YAML file"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary is not valid YAML: .*; mend the file"):
        read_yaml(tmp_path / "binary")
    assert read_yaml(Path(write(tmp_path / "empty.yaml", "# nothing\n"))) == {}


def test_peek(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "recipe: cifar10\ndata: {source: images, root: there}\n")
    other = write(tmp_path / "b.yaml", "data: {source: others}\n")
    assert peek([]) == (None, "digits")
    assert peek(["--config", file]) == ("cifar10", "images")
    assert peek(["--config", file, "--config", other]) == ("cifar10", "others")
    assert peek(["--data", "x", "--config", file, "--recipe=digits"]) == ("digits", "x")
    assert peek(["--config", file, "--recipe", "auto", "--data.root", "here"]) == (None, "images")
    assert peek(["--data=a", "--data.source", "b"]) == (None, "b")


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"epochs": 3, "max_minutes": None}, ["--epochs=3", "--max_minutes=null"]),
        ({"mask": {"ratio": 0.5, "strategy": "grid"}}, ["--mask.ratio=0.5", "--mask.strategy=grid"]),
        ({"data": {"source": Path("a b"), "mean": (0.5, 1)}}, ["--data.source=a b", "--data.mean=[0.5, 1]"]),
        ({"compile": True, "model": {"class_token": False}}, ["--compile=true", "--model.class_token=false"]),
    ],
)
def test_settings_from_python(values: dict[str, Any], options: list[str]) -> None:
    assert as_options(values) == options


def test_a_group_may_be_its_dataclass() -> None:
    mask = MaskConfig(strategy="block", ratio=0.6)
    data = DataConfig(source="x", mean=(0.1,), std=(0.2,))
    assert parse(as_options({"mask": mask, "data": data})) == PretrainConfig(mask=mask, data=data)


def test_values_that_no_option_takes() -> None:
    with pytest.raises(ConfigError, match=r"^mask\.ratio is a object; give a number, text, a list or a dictionary$"):
        as_options({"mask": {"ratio": object()}})


def test_options_are_taken_out() -> None:
    args = ["--json", "--resume", "a", "--epochs", "3", "--resume=b"]
    assert settings.take_option(args, "resume") == "b"
    assert settings.take_flag(args, "json")
    assert args == ["--epochs", "3"]
    assert settings.take_option(args, "resume") is None
    assert not settings.take_flag(args, "json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "true"], True),
        (["--json=true"], True),
        (["--json", "false"], False),
        (["--json", "--json=false"], False),
        (["--json", "x"], True),
    ],
)
def test_a_flag_may_say_true_or_false(words: list[str], said: bool) -> None:
    args = ["--a", "1", *words]
    assert settings.take_flag(args, "json") == said
    assert args == ["--a", "1", *(["x"] if "x" in words else [])]
    with pytest.raises(ConfigError, match=r"^json is '1'; give --json alone, or with true or false$"):
        settings.take_flag(["--json=1"], "json")


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    assert settings.normalise(["~/data", "--out", "~/a", "--init-from=~/b.pth", "--x", "~"]) == [
        *("/home/u/data", "--out", "/home/u/a", "--init_from=/home/u/b.pth", "--x", "~")
    ]
    with pytest.raises(ConfigError, match=r"^no home folder is known for the ~ in ~nobody-of-that-name/a; give the"):
        settings.normalise(["--out", "~nobody-of-that-name/a"])


def test_recipes() -> None:
    assert {"cifar10", "digits", "images", "images-96", "tutorial", "tutorial-corrected"} <= set(recipe_names())
    with pytest.raises(
        ConfigError, match=r"^recipe is 'cifar'; did you mean 'cifar10'\? choose from cifar10, cifar10-cpu, digits,"
    ):
        settings.recipe_path("cifar")
