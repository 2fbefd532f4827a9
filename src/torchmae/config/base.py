"""The base of all settings: frozen dataclasses that convert their fields to their types and check them.

A value may be text from the command line, a value from a YAML file, or a Python object. Types say everything: `Literal`
names the choices, `Range` the limits, `PLACE` a file or folder, ".png" the ending of its name, and `POSITIONAL` a word
that stands without an option before it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from inspect import getdoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torchmae.errors import ChoiceError, ConfigError, one_of, within
from torchmae.paths import user_path

T = TypeVar("T", bound="Settings")

POSITIONAL = "positional"
PLACE = "place"
WORDS = {
    bool: "true or false",
    dict: "a dictionary",
    float: "a number",
    int: "a whole number",
    Path: "a path",
    str: "text",
    tuple: "a list such as [1, 2]",
}
"""What types are called in messages."""


class Range(NamedTuple):
    """The limits of a number; `open_low` and `open_high` exclude the limit itself."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False


Place = Annotated[str, PLACE]
Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(1, 1_000_000)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Rate = Annotated[float, Range(0, 10, open_low=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
Fraction = Annotated[float, Range(0, 1, open_low=True, open_high=True)]
Momentum = Annotated[float, Range(0, 1, open_high=True)]
Threads = Annotated[int, Range(1, 1024)]
Device = Literal["auto", "cpu", "cuda", "mps"] | str  # cuda:1
Precision = Literal["auto", "bf16", "fp32"]
Progress = Literal["auto", "plain", "none"]
Target = Literal["pixels", "normalised"]


class WrongType(ConfigError):
    """A value that cannot be converted to the type of its setting."""


@dataclass(frozen=True)
class Settings:
    """Base of a group of settings. `GROUP` is the prefix of its names in messages, such as "data."."""

    GROUP: ClassVar[str] = ""
    _types: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for name, kind in self.types().items():
            object.__setattr__(self, name, convert(self.GROUP + name, kind, getattr(self, name)))

    @classmethod
    def types(cls) -> dict[str, Any]:
        """The type of every field by its name."""
        if "_types" not in vars(cls):
            hints = get_type_hints(cls, include_extras=True)
            cls._types = {item.name: hints[item.name] for item in fields(cls)}
        return cls._types


class Setting(NamedTuple):
    """One setting: its type, its default (MISSING: it has to be given), and its description."""

    kind: Any
    default: Any
    about: str


def settings_of(*kinds: type[Settings], prefix: str = "") -> dict[str, Setting]:
    """Every setting of some classes by its dotted name, such as "mask.ratio"."""
    found: dict[str, Setting] = {}
    for kind in kinds:
        about = {name: text for base in reversed(kind.__mro__) for name, text in _attributes(base).items()}
        for item in fields(kind):
            hint = kind.types()[item.name]
            if is_group(hint):
                found |= settings_of(hint, prefix=f"{prefix}{item.name}.")
            else:
                found[prefix + item.name] = Setting(hint, item.default, about[item.name])
    return found


def is_group(kind: Any) -> bool:
    """Whether a type is a class of settings."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def _attributes(kind: type[Any]) -> dict[str, str]:
    """The descriptions of the fields, from the section "Attributes" of the docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in (getdoc(kind) or "").partition("Attributes:\n")[2].splitlines():
        if line.startswith("        "):
            found[name] += " " + line.strip()
        elif line.strip():
            name, _, text = line.strip().partition(": ")
            found[name] = text
    return found


def make(kind: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """Creates settings from values by dotted name; names of other classes are ignored.

    Raises:
        ConfigError: a value that does not fit its setting.
    """
    values = {}
    for name, hint in kind.types().items():
        if is_group(hint):
            values[name] = make(hint, given, f"{prefix}{name}.")
        elif prefix + name in given:
            values[name] = given[prefix + name]
    return kind(**values)


def convert(name: str, kind: Any, value: Any) -> Any:
    """Converts a value to the type of a setting.

    Args:
        name: of the setting, for messages.
        kind: its type.
        value: text, a value from YAML, or a Python object.

    Raises:
        ConfigError: the value has another type, is none of the choices, or lies outside its range.
    """
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        value = convert(name, args[0], value)
        for rule in args[1:]:
            if isinstance(rule, Range):
                within(name, value, rule.low, rule.high, open_low=rule.open_low, open_high=rule.open_high)
            elif rule == PLACE and isinstance(value, str) and value.startswith("~"):
                value = str(user_path(value))
        endings = suffixes(kind)
        if endings and isinstance(value, (str, Path)) and not str(value).lower().endswith(endings):
            raise ConfigError(f"{name} is {str(value)!r}", f"give a name that ends in {' or '.join(endings)}")
        return value
    if origin in (Union, UnionType):
        return _convert_union(name, args, value)
    if origin is Literal:
        one_of(name, value, args)
        return value
    if origin in (tuple, dict):
        value = _from_yaml(value)
        if origin is dict and isinstance(value, Mapping):
            return {convert(name, args[0], key): convert(f"{name} of {key}", args[1], of) for key, of in value.items()}
        if origin is tuple and isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
            items = tuple(value)
            kinds = args[:1] * len(items) if args[-1] == Ellipsis else args
            if len(items) != len(kinds):
                raise WrongType(f"{name} is {value}", f"it takes a list of {len(kinds)} values")
            return tuple(convert(name, each, item) for each, item in zip(kinds, items, strict=True))
    elif origin not in WORDS and not is_group(origin):  # an object that no text stands for
        return value
    elif not is_group(origin):
        try:
            return _scalar(origin, value)
        except (TypeError, ValueError, KeyError, OverflowError):
            pass
    elif isinstance(value, origin):
        return value
    raise WrongType(f"{name} is {value}", f"it takes {in_words(kind)}")


def _convert_union(name: str, kinds: Iterable[Any], value: Any) -> Any:
    if NoneType in kinds and (value is None or (isinstance(value, str) and value in ("null", "~"))):
        return None
    kinds = [kind for kind in kinds if kind is not NoneType]
    if len(kinds) == 1:
        return convert(name, kinds[0], value)
    for kind in sorted(kinds, key=lambda kind: get_origin(kind) != Literal):  # a choice may look like a number: nan
        try:
            return convert(name, kind, value)
        except (WrongType, ChoiceError):
            pass
    raise WrongType(f"{name} is {value}", f"it takes {' or '.join(map(in_words, kinds))}")


def _scalar(kind: type[Any], value: Any) -> Any:
    """Converts to bool, int, float, str or Path; TypeError, ValueError or KeyError for a value that does not fit."""
    text = isinstance(value, str)
    if kind is bool and text:
        return {"true": True, "false": False}[value.lower()]
    if isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is int:
        return int(value) if text else operator.index(value)
    if kind is float:
        return float(value)
    if kind is str and not isinstance(value, (str, os.PathLike, int, float)):
        raise TypeError
    return user_path(value) if kind is Path else kind(value)


def _from_yaml(value: Any) -> Any:
    """A list or dictionary that is written as text; other values as they are."""
    import yaml  # here, since most options are plain words

    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def in_words(kind: Any) -> str:
    """What a setting takes, in words."""
    if get_origin(kind) is Annotated:
        return in_words(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return WORDS.get(get_origin(kind) or kind, "other values")


def alternatives(kind: Any) -> list[Any]:
    """The types that a type is made of, without `Annotated` and `| None`."""
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [part for each in get_args(kind) if each is not NoneType for part in alternatives(each)]
    return [kind]


def many(kind: Any) -> bool:
    """Whether a setting takes several values."""
    return get_origin(alternatives(kind)[0]) is tuple


def names_file(kind: Any) -> bool:
    """Whether a setting names a file or folder, or several."""
    return PLACE in rules(kind) or any(Path in (part, *get_args(part)) for part in alternatives(kind))


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a setting offers: those of a `Literal`, true and false of a bool."""
    found: list[str] = []
    for part in alternatives(kind):
        found += get_args(part) if get_origin(part) is Literal else ("true", "false") if part is bool else ()
    return tuple(found)


def rules(kind: Any) -> list[Any]:
    """What `Annotated` says of a type: ranges, PLACE, POSITIONAL, endings."""
    if get_origin(kind) is Annotated:
        return [*get_args(kind)[1:], *rules(get_args(kind)[0])]
    return [rule for part in get_args(kind) for rule in rules(part)]


def suffixes(kind: Any) -> tuple[str, ...]:
    """The endings that the name of a file may have; none: any."""
    return tuple(rule for rule in rules(kind) if isinstance(rule, str) and rule.startswith("."))


@dataclass(frozen=True)
class JsonOption(Settings):
    """Figures for programs.

    Attributes:
        json: print the figures as one JSON object on the last line; with a name that ends in .json, write them to that
            file instead.
    """

    json: Annotated[bool | Path, ".json"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.json, Path) and not self.json.parent.is_dir():
            raise ConfigError(f"the folder of {self.json} does not exist", "make it first")


@dataclass(frozen=True)
class RunArgument(Settings):
    """The model that a command takes.

    Attributes:
        run: run folder, exported model, or weights of others (also as --init-from)
    """

    run: Annotated[Place, POSITIONAL]
