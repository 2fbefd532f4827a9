"""Trackers that are asked for by name: Weights & Biases, trackio. Their libraries are imported when they are."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torchmae.errors import reason_of
from torchmae.training.run_folder import RunFolder

PROJECT = "torchmae"


class Wandb:
    """Weights & Biases. What it writes lies in RUN/wandb; WANDB_MODE=offline keeps it there, for `wandb sync`.

    A run that goes on keeps its page: its id is that of the run folder. Of steps that are repeated after a crash W&B
    keeps the first figures. The documented WANDB_* variables choose project, entity, name, server and mode.

    Args:
        folder: the run's.
        config: all settings.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        import wandb

        self._picture: Any = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.path.resolve().name,
            id=os.environ.get("WANDB_RUN_ID") or tracking_id(folder),
            resume="allow",
            dir=str(folder.path),
            config=dict(config),
            # Its own lines and its copy of ours would cut through the line of progress; a run that the caller has
            # open stays open.
            settings=wandb.Settings(console="off", silent=True, reinit="create_new"),
        )

    @property
    def place(self) -> str:
        """Where to look: the run's page, or the folder to synchronise."""
        if self._run.offline:
            return f"offline; to upload: wandb sync {Path(self._run.dir).parent}"
        return self._run.url or "disabled"

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """As `Tracker.log_picture`."""
        self._run.log({name: self._picture(str(path))}, step=step)

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


class Trackio:
    """trackio, which needs no account: a database in TRACKIO_DIR that `trackio show` displays.

    A run that goes on keeps its name, which ends in the id of the run folder. TRACKIO_PROJECT names the project, as for
    transformers; TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, which the library documents, send it elsewhere.

    Args:
        folder: the run's.
        config: all settings.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        self._project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        with redirect_stdout(io.StringIO()):  # standard output is for our own results
            self._run = trackio.init(
                project=self._project,
                name=f"{folder.path.resolve().name}-{tracking_id(folder)}",
                resume="allow",
                config=dict(config),
                embed=False,
            )

    @property
    def place(self) -> str:
        """Where to look."""
        return f"{self._run.name}; to see it: trackio show --project {self._project}"

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """As `Tracker.log_picture`."""
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        """Writes out what is left."""
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()  # the run's own method would run, and print, once more when the process ends


SERVICES: dict[str, Callable[[RunFolder, Mapping[str, Any]], Wandb | Trackio]] = {"wandb": Wandb, "trackio": Trackio}


class Spared:
    """A service whose failures cost a run nothing: the first is said, and no more is sent.

    Args:
        name: the service.
        folder: the run's.
        config: all settings.
        say: takes where to look.
        warn: takes the warning.
    """

    def __init__(
        self,
        name: str,
        folder: RunFolder,
        config: Mapping[str, Any],
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._name = name
        self._warn = warn
        self._tracker: Wandb | Trackio | None = None
        with self._spare():
            self._tracker = SERVICES[name](folder, config)
            say(f"{name}: {self._tracker.place}")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        with self._spare():
            if self._tracker is not None:
                self._tracker.log(kind, step, values)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """As `Tracker.log_picture`."""
        with self._spare():
            if self._tracker is not None:
                self._tracker.log_picture(name, step, path)

    def close(self) -> None:
        """As `Tracker.close`."""
        with self._spare():
            if self._tracker is not None:
                self._tracker.close()

    @contextmanager
    def _spare(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the library raises: none of it is the run's fault
            self._tracker = None
            reason = reason_of(error).rstrip(".")
            self._warn(f"{self._name} gets no more figures of this run: {reason}; metrics.jsonl has all of them")


def tracking_id(folder: RunFolder) -> str:
    """Eight characters that name a run folder among all others, kept in it: a run that goes on is found again."""
    path = folder.path / "tracking.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        name = uuid.uuid4().hex[:8]
        folder.write_json(path.name, {"id": name})
        return name
