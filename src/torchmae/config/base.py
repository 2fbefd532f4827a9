"""The base class of settings: frozen dataclasses that convert their fields to their types and check them.

A value is text from the command line, a value from a YAML file, or a Python object. A field's type gives its check:
`Literal` the choices, `Range` the limits, `PLACE` a file or folder, ".png" the ending of its name, and `POSITIONAL` a
positional argument.

No parser library is used: values from Python and YAML need this conversion too, and jsonargparse's errors do not give
limit, fix and nearest name separately.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from inspect import getdoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torchmae.errors import ConfigError, one_of, within
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
"""The names of types in messages."""


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
Minutes = Annotated[float, Range(0.05, 10_000)]
Device = Literal["auto", "cpu", "cuda", "mps"] | str  # cuda:1
Precision = Literal["auto", "bf16", "fp32"]


class WrongType(Exception):
    """A value that cannot be converted to a type."""


@dataclass(frozen=True)
class Settings:
    """Base class of settings. A group of settings names its prefix: `class MaskConfig(Settings, group="mask.")`."""

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, group: str | None = None) -> None:
        if group is not None:
            cls.prefix = group

    def __post_init__(self) -> None:
        types = self.types()
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not item.default:
                object.__setattr__(self, item.name, convert(self.prefix + item.name, types[item.name], value))

    @classmethod
    @cache
    def types(cls) -> dict[str, Any]:
        """The types of the fields by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {item.name: hints[item.name] for item in fields(cls)}


class Setting(NamedTuple):
    """The type, default and description of a setting."""

    kind: Any
    default: Any  # MISSING if the setting is required
    about: str

    @property
    def positional(self) -> bool:
        """Whether it is a positional argument."""
        return POSITIONAL in rules(self.kind)

    @property
    def several(self) -> bool:
        """Whether it takes several values."""
        return get_origin(alternatives(self.kind)[0]) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """Its choices: the values of a `Literal`, true and false of a bool."""
        words: list[str] = []
        for part in alternatives(self.kind):
            words += get_args(part) if get_origin(part) is Literal else ("true", "false") if part is bool else ()
        return tuple(words)

    @property
    def names_file(self) -> bool:
        """Whether its values are files or folders."""
        return PLACE in rules(self.kind) or any(Path in (part, *get_args(part)) for part in alternatives(self.kind))


def settings_of(*kinds: type[Settings], prefix: str = "") -> dict[str, Setting]:
    """The settings of some classes by dotted name, such as "mask.ratio"."""
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


def _attributes(kind: type[Any]) -> dict[str, str]:
    """The descriptions of the fields, from the section "Attributes" of the docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in (getdoc(kind) or "").partition("Attributes:\n")[2].splitlines():
        if not line.startswith("        "):
            name, _, line = line.partition(": ")
        found[name.strip()] = f"{found.get(name.strip(), '')} {line.strip()}".strip()
    return found


def make(kind: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """Creates settings from values by dotted name; ignores names of other classes. ConfigError as in `convert`."""
    values = {}
    for name, hint in kind.types().items():
        if is_group(hint):
            values[name] = make(hint, given, f"{prefix}{name}.")
        elif prefix + name in given:
            values[name] = given[prefix + name]
    return kind(**values)


def convert(name: str, kind: Any, value: Any) -> Any:
    """Converts text, a value from YAML or a Python object to the type `kind` of the setting `name`.

    Raises:
        ConfigError: the value has the wrong type, is not among the choices, or lies outside its range.
    """
    parts = alternatives(kind)
    if NoneType in parts and (value is None or (isinstance(value, str) and value in ("null", "~"))):
        return None
    parts = tuple(part for part in parts if part is not NoneType)
    if [get_origin(part) for part in parts] == [Literal]:
        one_of(name, value, get_args(parts[0]))
    for part in parts:
        with suppress(WrongType):
            return _checked(name, rules(kind), _convert_to(name, part, value))
    raise ConfigError(f"{name} is {value}", f"it takes {' or '.join(map(_in_words, parts))}")


def _checked(name: str, limits: Iterable[Any], value: Any) -> Any:
    """Checks a value against the rules in `Annotated`; expands ~ in a path."""
    for limit in limits:
        if isinstance(limit, Range) and isinstance(value, (int, float)):
            within(name, value, limit.low, limit.high, open_low=limit.open_low, open_high=limit.open_high)
        elif limit == PLACE and isinstance(value, str) and value.startswith("~"):
            value = str(user_path(value))
    endings = suffixes(limits)
    if endings and isinstance(value, (str, Path)) and not str(value).lower().endswith(endings):
        raise ConfigError(f"{name} is {str(value)!r}", f"give a name that ends in {' or '.join(endings)}")
    return value


def _convert_to(name: str, kind: Any, value: Any) -> Any:
    origin, args = get_origin(kind) or kind, get_args(kind)
    if (origin is Literal and value in args) or (is_group(origin) and isinstance(value, origin)):
        return value
    if origin in (tuple, dict):
        items = _from_yaml(value)
        if origin is dict and isinstance(items, Mapping):
            return {str(key): convert(f"{name} of {key}", args[1], item) for key, item in items.items()}
        if origin is tuple and isinstance(items, Iterable) and not isinstance(items, (str, Mapping)):
            items = tuple(items)
            kinds = args[:1] * len(items) if args[-1] == Ellipsis else args
            if len(items) != len(kinds):
                raise ConfigError(f"{name} is {value}", f"it takes a list of {len(kinds)} values")
            return tuple(convert(name, each, item) for each, item in zip(kinds, items, strict=True))
    elif origin in WORDS:
        with suppress(TypeError, ValueError, KeyError, OverflowError):
            return _scalar(origin, value)
    elif origin is not Literal and not is_group(origin):  # an object that has no text form
        return value
    raise WrongType


def _scalar(kind: type[Any], value: Any) -> Any:
    """Converts to bool, int, float, str or Path; TypeError, ValueError or KeyError if the value does not fit."""
    text = isinstance(value, str)
    if kind is bool and text:
        return {"true": True, "false": False}[value.lower()]
    if isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is int:
        return int(value) if text else operator.index(value)
    if kind is str and not isinstance(value, (str, os.PathLike, int, float)):
        raise TypeError
    return user_path(value) if kind is Path else kind(value)


def _from_yaml(value: Any) -> Any:
    """A list or dictionary that is written as text; other values as they are."""
    import yaml  # most options do not need it

    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _in_words(kind: Any) -> str:
    """A type in words."""
    return WORDS.get(get_origin(kind) or kind) or ", ".join(map(str, get_args(kind))) or "a group of settings"


def is_group(kind: Any) -> bool:
    """Whether a type is a class of settings."""
    return isinstance(kind, type) and issubclass(kind, Settings)


@cache
def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; without `Annotated`."""
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    unions = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return tuple(part for each in unions for part in alternatives(each)) or (kind,)


@cache
def rules(kind: Any) -> tuple[Any, ...]:
    """The metadata of `Annotated` in a type: ranges, PLACE, POSITIONAL, endings."""
    if get_origin(kind) is Annotated:
        return (*get_args(kind)[1:], *rules(get_args(kind)[0]))
    unions = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return tuple(rule for part in unions for rule in rules(part))


def suffixes(limits: Iterable[Any]) -> tuple[str, ...]:
    """The allowed endings of a file name in the metadata of `Annotated`; empty: any ending."""
    return tuple(limit for limit in limits if isinstance(limit, str) and limit.startswith("."))


@dataclass(frozen=True)
class JsonOption(Settings):
    """Figures for programs.

    Attributes:
        json: print the figures as one JSON object on the last line; NAME.json: write them to this file instead.
    """

    json: Annotated[bool | Path, ".json"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.json, Path) and not self.json.parent.is_dir():
            raise ConfigError(f"the folder of {self.json} does not exist", "make it first")


@dataclass(frozen=True, kw_only=True)
class DeviceOption(Settings):
    """Where to compute.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps.
    """

    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class ProgressOption(Settings):
    """How progress is shown.

    Attributes:
        progress: "auto" (a live line on a terminal, else plain lines), "plain" or "none".
    """

    progress: Literal["auto", "plain", "none"] = "auto"


@dataclass(frozen=True, kw_only=True)
class TargetOption(Settings):
    """How weights of others are read.

    Attributes:
        target: the training target of others' weights if they do not store it: pixels or normalised (patches).
    """

    target: Literal["pixels", "normalised"] | None = None


@dataclass(frozen=True)
class RunArgument(Settings):
    """The model that a command takes.

    Attributes:
        run: run folder, exported model, or weights of others (also as --init-from)
    """

    run: Annotated[Place, POSITIONAL]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TargetOption, DeviceOption, RunArgument):
    """The model that a command runs, and where."""
