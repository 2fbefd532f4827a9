"""RUN/evaluations.jsonl: every evaluation of a run, one JSON object a line, with all that made its figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmae.errors import CheckpointError

NAME = "evaluations.jsonl"


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one line, by a single write; a line that an earlier write left unfinished is closed off first.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = folder / NAME
    try:
        unfinished = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        line = ("\n" if unfinished else "") + json.dumps(record) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            content = line.encode("utf-8")
            if os.write(descriptor, content) < len(content):
                raise OSError(28, "no space left on device")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "the figures stand above; free space or mend the folder"
        ) from error


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
