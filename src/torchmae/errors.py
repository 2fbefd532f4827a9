"""The errors a user can cause. Each message is one line: the value, the limit it broke, and the fix."""

from __future__ import annotations


class TorchmaeError(Exception):
    """Base of every error that ends a command with one line instead of a traceback.

    Args:
        problem: what was found, with the offending value.
        fix: what to do about it; joined to the problem by a semicolon.
    """

    exit_status = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}; {fix}" if fix else problem)


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
