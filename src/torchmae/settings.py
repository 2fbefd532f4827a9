"""From names, files and options to a `PretrainConfig`, and back to YAML. Order: defaults < recipe < file < options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from torchmae.config import PretrainConfig
from torchmae.errors import ConfigError, one_of
from torchmae.paths import user_path

# What people type for the settings they reach for most.
ALIASES = {"data": "data.source", "batch": "batch_size"}

# What the parser's types are called in messages.
KINDS = {
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "tuple": "a list such as [1, 2]",
}

DESCRIPTION = "Pre-trains a masked autoencoder and leaves a run folder with a backbone, pictures and a report."


class Parser(ArgumentParser):
    """An argument parser whose complaints are one line with a suggestion, raised as ConfigError.

    Attributes:
        kinds: the dataclasses whose fields are its options.
    """

    kinds: tuple[type[Any], ...] = ()

    def add_settings(self, kind: type[Any]) -> None:
        """Makes an option of every field of a dataclass."""
        self.add_class_arguments(kind, None, fail_untyped=True)
        self.kinds = (*self.kinds, kind)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises ConfigError in place of printing usage and leaving."""
        raise explain(message if ex is None else str(ex), self.option_names())

    def option_names(self) -> list[str]:
        """The options this parser knows, without dashes."""
        return [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]


def explain(message: str, known: Sequence[str]) -> ConfigError:
    """A parser's message as one line: the offending option, the reason, and the nearest option that exists."""
    text = " ".join(message.split())
    keys = re.findall(r'Parser key "(\S+?)"', text)
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", text)
    in_file = re.search(r"(?:Group '(?P<group>\S+)' does not accept option|Option) '(?P<leaf>\S+?)'", text)
    if unknown and not unknown[1].startswith("-"):
        return ConfigError(f"unexpected word {unknown[1]!r}", "options begin with two dashes, such as --data PATH")
    if unknown or (in_file and "accept" in text):
        return _unknown_option(unknown[1].lstrip("-").partition("=")[0] if unknown else _dotted(in_file), known)
    missing = re.search(r"arguments are required: (.+)", text)
    if missing:
        return ConfigError(f"not given: {missing[1]}", "see --help")
    group = re.search(r'Unable to load config "(.+)"$', text)
    if group:
        options = [f"--{name}" for name in known if name.startswith(f"{keys[-1]}.")]
        return ConfigError(f"{keys[-1]} is {group[1]}", f"set its parts one by one: {', '.join(options)}")
    no_value = re.search(r"argument (--\S+): expected", text)
    if no_value:
        return _no_value(no_value[1])
    if keys:
        given = re.search(r".*(?:Got|Given) value: (.+?)$", text)
        return ConfigError(f"{keys[-1]} is {given[1] if given else 'of the wrong type'}", _wanted(text))
    return ConfigError(text.removeprefix("error: ").rstrip("."), "see --help for what it takes")


def _unknown_option(name: str, known: Sequence[str]) -> ConfigError:
    same_leaf = [option for option in known if option.rpartition(".")[2] == name.rpartition(".")[2]]
    near = nearest(name, known) or next(iter(same_leaf), None)
    return ConfigError(f"unknown option {name!r}", f"did you mean --{near}?" if near else "see --help")


def _no_value(option: str) -> ConfigError:
    return ConfigError(f"{option} has no value", f"give one: {option} VALUE")


def _wanted(text: str) -> str:
    """What a parser's message says that an option takes, in words."""
    length = re.search(r"Expected a tuple with (\d+) elements", text)
    if length:
        return f"it takes a list of {length[1]} values"
    kinds = sorted(set(re.findall(r"Expected an? <class '(\w+)'>", text)) - {"NoneType"})
    return f"it takes {' or '.join(KINDS.get(kind, kind) for kind in kinds)}" if kinds else "see --help"


def _dotted(match: re.Match[str] | None) -> str:
    assert match is not None
    return f"{match['group']}.{match['leaf']}" if match["group"] else match["leaf"]


def build_parser() -> Parser:
    """A parser with one option for every field of PretrainConfig, and --config."""
    parser = Parser(
        prog="torchmae pretrain",
        usage="torchmae pretrain [OPTIONS]",
        description=DESCRIPTION,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; options given beside it win.")
    parser.add_settings(PretrainConfig)
    return parser


def recipe_names() -> list[str]:
    """The recipes that ship with torchmae, sorted."""
    folder = resources.files("torchmae") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe; ConfigError for a name that does not exist."""
    one_of("recipe", name, recipe_names())
    return Path(str(resources.files("torchmae") / "recipes" / f"{name}.yaml"))


def recipe_summary(name: str) -> str:
    """The first line of a recipe's head: what it is."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()


def normalise(args: Sequence[str]) -> list[str]:
    """Spells options as the parser does: underscores for dashes, the aliases' full names, `~/` written out.

    Raises:
        ConfigError: a path below a home folder that is not known.
    """
    result = []
    for arg in args:
        if arg.startswith("--") and len(arg) > 2:
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            arg = f"--{ALIASES.get(name, name)}{equals}{_written_out(value)}"
        else:
            arg = _written_out(arg)
        result.append(arg)
    for i, arg in enumerate(result):  # --batch auto
        if arg == "--batch_size=auto":
            result[i] = "--fit_batch=true"
        elif arg == "--batch_size" and result[i + 1 : i + 2] == ["auto"]:
            result[i : i + 2] = ["--fit_batch=true"]
    return result


def _written_out(word: str) -> str:
    return str(user_path(word)) if word.startswith("~") and "/" in word else word  # "~" alone is YAML's null


def as_options(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings given in Python as options: `{"mask": {"ratio": 0.5}}` becomes `["--mask.ratio=0.5"]`.

    Raises:
        ConfigError: a value that no option can take.
    """
    options = []
    for name, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            options += as_options(asdict(value), f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            options += as_options(value, f"{prefix}{name}.")
        else:
            try:
                text = str(value) if isinstance(value, (str, Path)) else json.dumps(value)
            except TypeError as error:
                raise ConfigError(
                    f"{prefix}{name} is a {type(value).__name__}", "give a number, text, a list or a dictionary"
                ) from error
            options.append(f"--{prefix}{name}={text}")
    return options


def take_options(args: list[str], name: str) -> list[str]:
    """Removes every --name VALUE and --name=VALUE from `args` and returns the values in their order."""
    values = []
    rest = iter(args.copy())
    args.clear()
    for arg in rest:
        if arg == f"--{name}":
            value = next(rest, None)
            if value is None:
                raise _no_value(arg)
            values.append(value)
        elif arg.startswith(f"--{name}="):
            values.append(arg.partition("=")[2])
        else:
            args.append(arg)
    return values


def take_option(args: list[str], name: str) -> str | None:
    """As `take_options`, of which the last counts; None when there is none."""
    values = take_options(args, name)
    return values[-1] if values else None


def take_flag(args: list[str], name: str) -> bool:
    """Removes every --name, --name=true and --name true (or false) from `args`; whether the last one says true.

    Raises:
        ConfigError: --name=VALUE with another value.
    """
    found = False
    words = args.copy()
    args.clear()
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option != f"--{name}":
            args.append(word)
            continue
        if not equals:
            value = words.pop(0) if words[:1] in (["true"], ["false"]) else "true"
        if value not in ("true", "false"):
            raise ConfigError(f"{name} is {value!r}", f"give --{name} alone, or with {KINDS['bool']}")
        found = value == "true"
    return found


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar of `known`, if any is similar at all."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def peek(args: Sequence[str]) -> tuple[str | None, str]:
    """What options and their --config files say of the recipe (None when none is named) and data.source."""
    rest = normalise(args)
    values: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for file in take_options(rest, "config"):
        values |= read_settings(Path(file))
        data |= values.get("data", {})
    default = PretrainConfig()
    recipe = take_option(rest, "recipe") or values.get("recipe") or default.recipe
    source = take_option(rest, "data.source") or data.get("source") or default.data.source
    return (None if recipe == "auto" else str(recipe)), str(source)


def parse(args: Sequence[str], recipe: str | None = None) -> PretrainConfig:
    """Options to settings.

    Args:
        args: options as on the command line; --config among them names a YAML file, and options win over it wherever
            they stand.
        recipe: the recipe to start from, whatever the options say; None: the defaults alone.

    Raises:
        ConfigError: an unknown option or recipe, or a value that does not fit.
    """
    parser = build_parser()
    rest = normalise(args)
    files = [str(recipe_path(recipe))] if recipe else []
    for file in take_options(rest, "config"):
        if read_settings(Path(file)):  # which says what is wrong with the file in one line; of an empty one, nothing
            files.append(file)
    if recipe:
        take_options(rest, "recipe")
        rest.append(f"--recipe={recipe}")
    try:
        values = parser.parse_args([*(f"--config={path}" for path in files), *rest])
        built = parser.instantiate(values)
        return PretrainConfig(**{name: built[name] for name in PretrainConfig.__dataclass_fields__})
    except ArgumentError as error:
        raise explain(str(error), parser.option_names()) from error


def read_options(parser: Parser, args: Sequence[str], *kinds: type[Any]) -> tuple[Any, ...]:
    """Words to dataclasses of plain settings, each field an option.

    Args:
        parser: with the command's positional arguments.
        args: the words.
        kinds: dataclasses; a flat option is made of each field.

    Returns:
        the parser's values, and an object of each kind.

    Raises:
        ConfigError: an unknown option, or a value that does not fit.
    """
    for kind in kinds:
        parser.add_settings(kind)
    words = normalise(args)
    source = take_option(words, "init_from")  # weights of others, where the command takes a run
    try:
        values = parser.parse_args(words if source is None else [source, *words])
        built = parser.instantiate(values)
    except ArgumentError as error:
        raise explain(str(error), parser.option_names()) from error
    return values, *(kind(**{name: built[name] for name in kind.__dataclass_fields__}) for kind in kinds)


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings; ConfigError where it is no mapping, or has a value in place of a group."""
    values = read_yaml(path)
    for item in fields(PretrainConfig):
        if is_dataclass(item.default_factory) and not isinstance(values.get(item.name, {}), dict):
            first = next(iter(vars(item.default_factory)["__annotations__"]))  # of its own, not of what it inherits
            raise ConfigError(
                f"{item.name} is {values[item.name]!r} in {path}", f"write {item.name}: {{{first}: VALUE}}"
            )
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; ConfigError when it is missing, not YAML, or no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        reason = " ".join(str(problem or error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}{where}", "mend the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}", "it must be a mapping of settings to values")
    return values


def to_yaml(config: PretrainConfig) -> str:
    """All settings as YAML, in their order; `--config` reads it back."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
