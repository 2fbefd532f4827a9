"""Settings from the command line, YAML files, recipes and Python. Precedence: defaults < recipe < file < options.

Values are collected by dotted name ("mask.ratio"), and `make` builds dataclasses from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from torchmae.config import PretrainConfig
from torchmae.config.base import Setting, Settings, alternatives, make, rules, settings_of, suffixes
from torchmae.errors import ConfigError, nearest, one_of, reason_of
from torchmae.paths import user_path

RECIPES = Path(__file__).parent / "recipes"
Given = dict[str, Any]
"""Values by dotted name, before they are converted."""

ALIASES = {"data": "data.source", "batch": "batch_size", "init": "finetune.init", "init_from": "run"}
"""Short names of settings; a command's own setting of the same name comes first."""


def recipe_names() -> list[str]:
    """The names of torchmae's recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe; ConfigError if there is no such recipe."""
    one_of("recipe", name, recipe_names())
    return RECIPES / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """The first line of a recipe, which describes it."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()


def full_name(name: str, known: Mapping[str, Setting]) -> str:
    """The dotted name of a setting, with - for _ allowed; ConfigError, which names the nearest, if there is none."""
    name = name.replace("-", "_")
    without_group = name.removeprefix("data.") if "axes" in known else ""  # `torchmae data` has --axes for --data.axes
    for spelling in (name, ALIASES.get(name, ""), without_group):
        if spelling in known:
            return spelling
    parts = [f"--{other}" for other in known if other.startswith(f"{name}.")]
    if parts:
        raise ConfigError(f"{name} is a group of settings", f"set its parts one by one: {', '.join(parts)}")
    same_leaf = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = nearest(name, known) or next(iter(same_leaf), None)
    raise ConfigError(f"unknown option {name!r}", f"did you mean --{near}?" if near else "see --help")


def collect(values: Mapping[str, Any], known: Mapping[str, Setting], prefix: str = "") -> Given:
    """Flattens nested values: `{"mask": {"ratio": 0.5}}` to `{"mask.ratio": 0.5}`; ConfigError for unknown names."""
    given: Given = {}
    for key, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = {item.name: getattr(value, item.name) for item in fields(value)}
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known:
            given |= collect(value, known, f"{name}.")
        else:
            name = full_name(name, known)
            auto = name == "batch_size" and value == "auto" and "fit_batch" in known
            given |= {"fit_batch": True} if auto else {name: value}
    return given


def read_words(words: Sequence[str], *kinds: type[Settings]) -> Given:
    """Reads the words of a command line for the settings of `kinds`.

    Words are positional, `--name value`, `--name=value`, or `--name` alone for true. If `kinds` has the settings of a
    run, `--config FILE` reads a YAML file, which options override in any order.

    Raises:
        ConfigError: an unknown option, an option without a value, a missing or unexpected word.
    """
    known = settings_of(*kinds)
    files: Given = {}
    given: Given = {}
    positional: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        if word == "--":
            positional += rest
            break
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            value = _next_value(name, known, rest)
        if name == "config" and PretrainConfig in kinds:
            files |= read_file(Path(value))
        else:
            given |= collect({name: value}, known)
    for name, setting in known.items():
        if setting.positional and name not in given and positional:
            given[name] = positional if setting.several else positional[0]
            positional = [] if setting.several else positional[1:]
    if positional:
        raise ConfigError(f"unexpected word {positional[0]!r}", "options begin with two dashes, such as --data PATH")
    needed = {name: setting for name, setting in known.items() if setting.default is MISSING}
    missing = [name if needed[name].positional else f"--{name}" for name in needed if name not in given]
    if missing:
        raise ConfigError(f"not given: {', '.join(missing)}", "see --help")
    return files | given


def _next_value(name: str, known: Mapping[str, Setting], rest: list[str]) -> str:
    """Removes an option's value from the following words; "true" if the option has none."""
    kind = str if name == "config" else known[full_name(name, known)].kind
    kinds = alternatives(kind)
    following = rest[0] if rest and not rest[0].startswith("--") else None
    if bool in kinds and following not in (None, "true", "false"):
        named = len(kinds) > 1 and following.endswith(suffixes(rules(kind)) or "")
        if not named and any(setting.positional for setting in known.values()):  # a positional word
            following = None
    if following is None and bool not in kinds:
        raise ConfigError(f"--{name} has no value", f"give one: --{name} VALUE")
    return "true" if following is None else rest.pop(0)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping; ConfigError if the file is missing, not YAML, or no mapping."""
    path = user_path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {reason_of(error)}", "give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML: {problem or reason_of(error)}{where}", "mend the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}", "it must be a mapping of settings to values")
    return values


def read_file(path: Path) -> Given:
    """Reads settings of a run from a YAML file."""
    return collect(read_yaml(path), settings_of(PretrainConfig))


def read_config(path: Path) -> PretrainConfig:
    """Reads the settings of a run from its config.yaml."""
    return make(PretrainConfig, read_file(path))


def from_recipe(given: Mapping[str, Any]) -> PretrainConfig:
    """The settings of the recipe in `given` (for "auto" the defaults), overridden by the other given values."""
    recipe = given.get("recipe", "auto")
    return make(PretrainConfig, given if recipe == "auto" else {**read_file(recipe_path(recipe)), **given})


def parse(words: Sequence[str], recipe: str | None = None) -> PretrainConfig:
    """The settings of a run from the words of a command line; `recipe` overrides theirs."""
    given = read_words(words, PretrainConfig)
    return from_recipe(given if recipe is None else {**given, "recipe": recipe})


def values_of(config: PretrainConfig) -> Given:
    """All settings of a run by dotted name."""
    return collect(asdict(config), settings_of(PretrainConfig))


def to_yaml(config: PretrainConfig) -> str:
    """All settings as YAML in their order, for `--config`."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def default_values() -> dict[str, Any]:
    """All defaults of a run, nested as in YAML."""
    return _plain(PretrainConfig())


def _plain(config: PretrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples as lists
    return values
