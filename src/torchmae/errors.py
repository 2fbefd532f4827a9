"""The errors a user can cause. Each message is one line: the value, the limit it broke, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class TorchmaeError(Exception):
    """Base of every error that ends a command with one line instead of a traceback.

    What is not printable (line ends, a terminal's escape codes, in names and in what libraries say) is escaped.

    Args:
        problem: what was found, with the offending value.
        fix: what to do about it; joined to the problem by a semicolon.
    """

    exit_status = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = printable(problem)
        self.fix = printable(fix)
        super().__init__(f"{self.problem}; {self.fix}" if fix else self.problem)


class ConfigError(TorchmaeError, ValueError):
    """An option, a shape or a combination of them that cannot work."""


class DataError(TorchmaeError):
    """Data that is missing, empty, unreadable, or changed."""


class CheckpointError(TorchmaeError):
    """A run folder or checkpoint that cannot be read or written."""


class TrainingError(TorchmaeError):
    """Training cannot go on (a loss that is not finite); what was saved before stays."""

    exit_status = 1


class Interrupted(TorchmaeError):
    """A signal ended the run after its state was saved.

    Args:
        signal_number: the signal; the exit status is 128 plus it, as shells and schedulers expect.
    """

    def __init__(self, problem: str, fix: str, signal_number: int) -> None:
        super().__init__(problem, fix)
        self.exit_status = 128 + signal_number


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest choice, unless `value` is one of `choices`."""
    known = list(choices)
    if value in known:
        return
    near = nearest(str(value), known, cutoff=0.5)
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(f"{name} is {value!r}", f"{hint}choose from {', '.join(known)}")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar of `known`, if any is similar at all."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def within(
    name: str, value: float | None, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises ConfigError unless `value` is None or lies between the bounds (inclusive unless said)."""
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
    """What an exception says, as one line of at most 300 characters: the system's words, its own, or its type."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__


def require(module: str, extra: str) -> Any:
    """An optional library; ConfigError, with the command that installs it, where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = f"{module.partition('.')[0]} is not installed, and this needs it"
        raise ConfigError(missing, f"pip install 'torchmae[{extra}]'") from error


def printable(text: str | bytes) -> str:
    """A text, or a file name's bytes, as one line; what is not printable (a terminal's escape codes) is escaped."""
    text = text if isinstance(text, str) else text.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _number(value: float) -> str:
    # Every digit that matters: a seed or a batch of 1000001 must not read as 1e+06.
    return f"{value:.12g}" if isinstance(value, float) else str(value)
