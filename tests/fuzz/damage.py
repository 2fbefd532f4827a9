"""Damaged copies of valid files, and what may come of reading one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from torchmae.errors import TorchmaeError

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    # Each example writes over the files of the one before, in the one folder that a test has.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
"""The same examples in every run."""

_EDGE = 96  # bytes at either end, where headers and footers are, that are changed more often than others
_VALUES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 3, b"\x80" + b"\0" * 7, b"-1", b"9" * 20, b"\x1b[2J"]),
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 10**4, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308]),
    st.sampled_from(["", "a", "../../a", "/dev/zero", "\x1b[2J", "\ud800", "9" * 30]),
)
"""Values of JSON that few expect."""


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Copies of `valid` with one to four changes: cut, shortened, lengthened, overwritten, a part said twice."""
    size = len(valid)
    places = st.one_of(st.integers(0, min(size, _EDGE)), st.integers(0, size), st.integers(max(0, size - _EDGE), size))
    edit = st.tuples(st.sampled_from(["cut", "delete", "insert", "overwrite", "repeat"]), places, _VALUES)
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _apply(valid, edits))


def _apply(valid: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    raw = bytearray(valid)
    for kind, at, value in edits:
        if kind == "cut":
            del raw[at:]
        elif kind == "delete":
            del raw[at : at + len(value)]
        elif kind == "insert":
            raw[at:at] = value
        elif kind == "overwrite":
            raw[at : at + len(value)] = value
        else:
            raw[at:at] = raw[at : at + 8 * len(value)]
    return bytes(raw)


def damaged_json(valid: dict[str, Any]) -> st.SearchStrategy[str]:
    """JSON texts of `valid` with one or two values (or keys) replaced, emptied or taken away."""
    edit = st.tuples(
        st.sampled_from(_paths(valid)),
        st.sampled_from(["set", "drop", "wrap"]),
        st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from(["a", ""]), SCALARS)),
    )
    return st.lists(edit, min_size=1, max_size=2).map(lambda edits: _apply_json(valid, edits))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, child in children for deeper in _paths(child, (*path, key)))]


def _apply_json(valid: Any, edits: list[tuple[tuple[Any, ...], str, Any]]) -> str:
    root = {"": json.loads(json.dumps(valid))}
    for path, kind, value in edits:
        parent: Any = root
        *above, last = ("", *path)
        try:
            for key in above:
                parent = parent[key]
            if kind == "drop":
                del parent[last]
            else:
                parent[last] = [parent[last]] if kind == "wrap" else value
        except (KeyError, IndexError, TypeError):  # the edit before took its place away
            continue
    return json.dumps(root.get("", {}))


def reads_or_refuses(read: Callable[[], object]) -> None:
    """Calls `read`: whatever it gives is right, and so is a one-line error of ours; nothing else."""
    try:
        read()
    except TorchmaeError as error:
        text = str(error)
        assert text.isprintable(), text
        assert 10 < len(text) < 1000, text
        assert error.exit_status == 2
