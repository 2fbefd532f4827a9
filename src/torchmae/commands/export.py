"""`torchmae export` and `torchmae push`: a model in another library's format, checked, on disk or on the hub."""

from __future__ import annotations

from pathlib import Path

from torchmae.config.export import ExportCommand, ExportOptions, PushCommand
from torchmae.publish import hub
from torchmae.publish.export import export


def run(command: ExportCommand, options: ExportOptions) -> int:
    """Exports; returns the exit status."""
    made = export(command.run, Path(command.out), options)
    for note in made.notes:
        print(f"note: {note}")
    print(f"check: {made.check}")
    print(f"{made.path}  ({', '.join(made.files)})")
    return 0


def push(command: PushCommand, options: ExportOptions) -> int:
    """Exports and uploads; returns the exit status."""
    print(hub.push(command.run, command.repo, options, private=command.private))
    return 0
