"""The errors a user can cause. Each message is one line: the value, the limit it broke, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class TorchmaeError(Exception):
    """Base class of the errors that end a command with one line instead of a traceback: "PROBLEM; FIX".

    `problem` names the wrong value, `fix` the remedy. Characters that are not printable (line ends, a terminal's escape
    codes) are escaped.
    """

    exit_status = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = printable(problem)
        self.fix = printable(fix)
        super().__init__(f"{self.problem}; {self.fix}" if fix else self.problem)


class ConfigError(TorchmaeError, ValueError):
    """A wrong option, shape or combination of options."""


class DataError(TorchmaeError):
    """Data that is missing, empty, unreadable, or changed."""


class CheckpointError(TorchmaeError):
    """A run folder or checkpoint that cannot be read or written."""


class TrainingError(TorchmaeError):
    """Training cannot continue; earlier checkpoints stay."""

    exit_status = 1


class Interrupted(TorchmaeError):
    """A signal ended the run after its state was saved; the exit status is 128 plus its number, as in shells."""

    def __init__(self, problem: str, fix: str, signal_number: int) -> None:
        super().__init__(problem, fix)
        self.exit_status = 128 + signal_number


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError, which names the nearest choice, unless `value` is in `choices`."""
    known = list(choices)
    if value in known:
        return
    near = nearest(str(value), known, cutoff=0.5)
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(f"{name} is {value!r}", f"{hint}choose from {', '.join(known)}")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar word in `known`; None if no word is similar."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def within(
    name: str, value: float | None, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises ConfigError unless `value` is None or lies between the bounds, which are inclusive by default."""
    if value is None:
        return
    if not (value > low if open_low else value >= low) or not (value < high if open_high else value <= high):
        if high == float("inf"):
            limit = f"it must be above {_number(low)}" if open_low else f"it must be {_number(low)} or more"
        else:
            left, right = "(" if open_low else "[", ")" if open_high else "]"
            limit = f"it must lie in {left}{_number(low)}, {_number(high)}{right}"
        raise ConfigError(f"{name} is {_number(value)}", limit)


def reason_of(error: Exception) -> str:
    """An exception's message as one line of at most 300 characters; its type if it has no message."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__


def require(module: str, extra: str) -> Any:
    """Imports an optional library; ConfigError, with the command that installs it, if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = f"{module.partition('.')[0]} is not installed, and this needs it"
        raise ConfigError(missing, f"pip install 'torchmae[{extra}]'") from error


def printable(text: str | bytes) -> str:
    """A text, or a file name's bytes, with characters that are not printable escaped."""
    text = text if isinstance(text, str) else text.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _number(value: float) -> str:
    # 12 digits: 1000001 must not become 1e+06.
    return f"{value:.12g}" if isinstance(value, float) else str(value)
