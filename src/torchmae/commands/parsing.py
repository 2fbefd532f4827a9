"""From a command's words to its options: dataclasses of plain settings, each field an option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError

from torchmae import settings


def parse(parser: settings.Parser, args: Sequence[str], *kinds: type[Any]) -> tuple[Any, ...]:
    """Parses words.

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
        parser.add_class_arguments(kind, None, fail_untyped=True)
    try:
        values = parser.parse_args(settings.normalise(args))
        built = parser.instantiate(values)
    except ArgumentError as error:
        raise settings.explain(str(error), parser.option_names()) from error
    return values, *(kind(**{name: built[name] for name in kind.__dataclass_fields__}) for kind in kinds)
