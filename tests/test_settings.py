from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from torchmae import settings
from torchmae.config import DataConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from torchmae.config.base import JsonOption, RunArgument, make, settings_of
from torchmae.config.evaluate import EvaluateOptions, RunOrBaseline
from torchmae.errors import ConfigError
from torchmae.settings import collect, parse, read_words, read_yaml, recipe_names, to_yaml

KNOWN = settings_of(PretrainConfig)


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
    assert len(KNOWN[name].about) > 8


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
        (["--mask.ratio", "nan"], "mask.ratio is nan; it must lie in (0, 1)"),
        (
            ["--mask", "5"],
            "mask is a group of settings; set its parts one by one: --mask.strategy, --mask.ratio, --mask.final_ratio",
        ),
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
        ("mask: 5\n", "mask is a group of settings; set its parts one by one: --mask.strategy, "),
        ("mask: {ratio: high}\n", "mask.ratio is high; it takes a number"),
        ("mask: {ratio: 2}\n", "mask.ratio is 2; it must lie in (0, 1)"),
        ("- epochs\n", "FILE holds a list; it must be a mapping of settings to values"),
        ("mask: [\n", "FILE is not valid YAML: expected the node content, but found '<stream end>' in line 2; mend"),
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


def test_words_and_files_are_collected_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "recipe: cifar10\ndata: {source: images, root: there}\n")
    other = write(tmp_path / "b.yaml", "data: {source: others}\n")
    words = ["--data.root", "here", "--config", file, f"--config={other}", "--batch", "auto"]
    expected = {"recipe": "cifar10", "data.source": "others", "data.root": "here", "fit_batch": True}
    assert read_words(words, PretrainConfig) == expected
    assert read_words(["--data=a", "--data.source", "b"], PretrainConfig) == {"data.source": "b"}


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({"epochs": 3, "max_minutes": None}, {"epochs": 3, "max_minutes": None}),
        ({"mask": {"ratio": 0.5, "strategy": "grid"}}, {"mask.ratio": 0.5, "mask.strategy": "grid"}),
        ({"data": {"scale": {"uint8": 1}}, "batch": 4}, {"data.scale": {"uint8": 1}, "batch_size": 4}),
        ({"data": "x", "batch_size": "auto"}, {"data.source": "x", "fit_batch": True}),
    ],
)
def test_settings_from_python(values: dict[str, Any], given: dict[str, Any]) -> None:
    assert collect(values, KNOWN) == given


def test_python_values_are_converted() -> None:
    given = collect(
        {"data": {"source": Path("a b"), "mean": [0.5, 1], "std": np.ones(2)}, "epochs": np.int64(2)}, KNOWN
    )
    config = make(PretrainConfig, given)
    assert (config.data.source, config.data.mean, config.data.std, config.epochs) == ("a b", (0.5, 1.0), (1.0, 1.0), 2)
    assert [type(value) for value in (*(config.data.std or ()), config.epochs)] == [float, float, int]


def test_a_group_may_be_its_dataclass() -> None:
    mask = MaskConfig(strategy="block", ratio=0.6)
    data = DataConfig(source="x", mean=(0.1,), std=(0.2,))
    assert make(PretrainConfig, collect({"mask": mask, "data": data}, KNOWN)) == PretrainConfig(mask=mask, data=data)


def test_values_that_no_setting_takes() -> None:
    for value in (object(), True, [0.5], "", "half"):
        with pytest.raises(ConfigError, match=r"^mask\.ratio is .*; it takes a number$"):
            make(PretrainConfig, {"mask.ratio": value})
    with pytest.raises(ConfigError, match=r"^epochs is 2\.0; it takes a whole number$"):
        PretrainConfig(epochs=2.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^mask is random; it takes a group of settings$"):
        PretrainConfig(mask="random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["a", "--json", "true"], {"json": "true"}),
        (["--json", "a"], {"json": "true"}),
        (["--json=false", "a"], {"json": "false"}),
        (["--json", "b.json", "a"], {"json": "b.json"}),
        (["a", "--json", "--resume"], {"json": "true", "resume": "true"}),
        (["a", "--resume", "b"], {"resume": "b"}),
        (["a", "--resume", "false"], {"resume": "false"}),
        (["--init-from", "a", "--init", "random"], {"finetune.init": "random"}),
        (["--data=b", "--", "a"], {"data.source": "b"}),
    ],
)
def test_options_that_need_no_value(words: list[str], given: dict[str, Any]) -> None:
    assert read_words(words, RunOrBaseline, EvaluateOptions) == {"run": "a", **given}


def test_a_value_of_the_wrong_kind_is_no_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^json is '1'; give a name that ends in \.json$"):
        make(JsonOption, {"json": "1"})
    assert make(JsonOption, {"json": str(tmp_path / "a.json")}).json == tmp_path / "a.json"
    assert make(JsonOption, {"json": "true"}).json is True


def test_positional_words() -> None:
    with pytest.raises(ConfigError, match=r"^not given: run; see --help$"):
        read_words([], RunArgument)
    with pytest.raises(ConfigError, match=r"^unexpected word 'b'; "):
        read_words(["a", "b"], RunArgument)
    with pytest.raises(ConfigError, match=r"^--init_from has no value; "):
        read_words(["--init_from", "--x"], RunArgument)


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    config = parse(["--data", "~/data", "--out=~/a", "--init-from", "~/b.pth#x", "--optim.lr", "~"])
    assert (config.data.source, config.out, config.init_from) == ("/home/u/data", "/home/u/a", "/home/u/b.pth#x")
    assert config.optim.lr is None
    with pytest.raises(ConfigError, match=r"^no home folder is known for the ~ in ~nobody-of-that-name/a; give the"):
        parse(["--out", "~nobody-of-that-name/a"])


def test_recipes() -> None:
    assert {"cifar10", "digits", "images", "images-96", "tutorial", "tutorial-corrected"} <= set(recipe_names())
    with pytest.raises(
        ConfigError, match=r"^recipe is 'cifar'; did you mean 'cifar10'\? choose from cifar10, cifar10-cpu, digits,"
    ):
        settings.recipe_path("cifar")
