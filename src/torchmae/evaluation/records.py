"""RUN/evaluations.jsonl: every evaluation of a run, one JSON object a line, with all that made its figures."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmae.errors import CheckpointError

NAME = "evaluations.jsonl"


def append_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Adds one line, by a single write; a line that an earlier write left unfinished is closed off first.

    Returns:
        The file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = folder / NAME
    try:
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            start = b"\n" if file.read(1) not in (b"", b"\n") else b""
            line = start + json.dumps(record).encode("utf-8") + b"\n"
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "the figures stand above; free space or mend the folder"
        ) from error
    return path


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All evaluations of a run, the oldest first; a line that was cut short is passed over."""
    path = folder / NAME
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
