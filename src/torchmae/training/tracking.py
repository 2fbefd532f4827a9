"""Trackers: metrics.jsonl always, TensorBoard if it is installed, and services chosen by name."""

from __future__ import annotations

import io
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from torchmae import settings
from torchmae.errors import CheckpointError, ConfigError, reason_of
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder

PROJECT = "torchmae"


class Tracker(Protocol):
    """Records figures and pictures of a run."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records figures by name after `step` optimiser steps; `kind` is "train", "val", "epoch" or "baseline"."""

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """Records a PNG file of the run folder."""

    def close(self) -> None:
        """Writes buffered figures and closes files."""


class JsonLines(Tracker):
    """Appends figures to the file `path`, one JSON object per line; no line waits in a buffer.

    Every method raises CheckpointError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _one_line_errors(path):
            self._file = path.open("ab", buffering=0)  # a buffer would fail again when it is closed

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        figures = {name: value if math.isfinite(value) else None for name, value in values.items()}  # no nan in JSON
        line = (json.dumps({"kind": kind, "step": step, **figures}) + "\n").encode()
        with _one_line_errors(self._path):
            while line:
                line = line[self._file.write(line) :]

    def log_picture(self, name: str, step: int, path: Path) -> None:
        pass  # the run folder has the file

    def close(self) -> None:
        self._file.close()


class TensorBoard(Tracker):
    """Writes TensorBoard's event files, with the settings as YAML; a resumed run hides figures after `step`.

    Every method raises CheckpointError if the folder cannot be written to.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, config: str = "", step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with _one_line_errors(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
            self._writer.add_text("config", f"```yaml\n{config}```", step)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        with _one_line_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        with _one_line_errors(self._folder), Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        with _one_line_errors(self._folder):
            self._writer.close()


class Service(Tracker, Protocol):
    """A tracker that sends figures to another program. Its constructor imports the library."""

    place: str  # tells the user where to see the figures
    _run: Any
    _picture: Any

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        self._run.log({name: self._picture(str(path))}, step=step)


class Wandb(Service):
    """Weights & Biases. Its files lie in RUN/wandb; WANDB_MODE=offline keeps them there, for `wandb sync`.

    A resumed run keeps its page, whose id is the run folder's. If steps are repeated after a crash, W&B keeps the
    first figures. The documented WANDB_* variables choose project, entity, name, server and mode.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        import wandb

        self._picture = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.path.resolve().name,
            id=os.environ.get("WANDB_RUN_ID") or tracking_id(folder),
            resume="allow",
            dir=str(folder.path),
            config=dict(config),
            # Its output would break the progress bar; a run that the caller has opened stays open.
            settings=wandb.Settings(console="off", silent=True, reinit="create_new"),
        )
        offline = self._run.offline  # reading `url` would warn
        upload = f"offline; to upload: wandb sync {Path(self._run.dir).parent}"
        self.place = upload if offline else self._run.url or "disabled"

    def close(self) -> None:
        self._run.finish()


class Trackio(Service):
    """trackio, which needs no account: a database in TRACKIO_DIR that `trackio show` displays.

    A resumed run keeps its name, which ends in the run folder's id. TRACKIO_PROJECT names the project, as in
    transformers; the library's TRACKIO_SPACE_ID and TRACKIO_SERVER_URL choose another destination.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        self._picture = trackio.Image
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        with redirect_stdout(io.StringIO()):  # standard output is for the command's results
            self._run = trackio.init(
                project=project,
                name=f"{folder.path.resolve().name}-{tracking_id(folder)}",
                resume="allow",
                config=dict(config),
                embed=False,
            )
        self.place = f"{self._run.name}; to see it: trackio show --project {project}"

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()  # `self._run.finish` would run again, and print, when the process ends


class SwanLab(Service):
    """SwanLab, a service in China. Its files lie in RUN/swanlab; SWANLAB_MODE=offline keeps them there.

    A resumed run keeps its page, whose id is the run folder's. The documented SWANLAB_* variables choose project,
    workspace, name, server and mode; without credentials, nothing is asked for.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        with redirect_stdout(io.StringIO()):  # standard output is for the command's results
            import swanlab

            self._picture = swanlab.Image
            self._run = swanlab.init(
                project=os.environ.get("SWANLAB_PROJ_NAME") or PROJECT,
                name=os.environ.get("SWANLAB_EXP_NAME") or folder.path.resolve().name,
                id=os.environ.get("SWANLAB_RUN_ID") or tracking_id(folder),
                resume="allow",
                log_dir=str(folder.path / "swanlab"),
                config=dict(config),
                settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}),
            )
        mode = self._run.mode
        upload = f"; to upload: swanlab sync {self._run.dir}" if mode == "offline" else ""
        self.place = self._run.url if mode == "online" else f"{mode}{upload}"  # else reading `url` is an error

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


SERVICES: dict[str, Callable[[RunFolder, Mapping[str, Any]], Service]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "swanlab": SwanLab,
}


class Trackers(Tracker):
    """Several trackers as one, a context manager. A failure of a service does not end the run."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers
        self._services: dict[str, Tracker] = {}
        self._warn: Callable[[str], None] = print

    def start(self, service: str, folder: RunFolder, config: Mapping[str, Any], display: Display) -> None:
        """Starts a service of `SERVICES` and says where its figures are; after a failure it gets no more figures."""
        self._warn = display.warn
        with self._spare(service):
            self._services[service] = tracker = SERVICES[service](folder, config)
            display.say(f"{service}: {tracker.place}")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._tell(lambda tracker: tracker.log(kind, step, values))

    def log_picture(self, name: str, step: int, path: Path) -> None:
        self._tell(lambda tracker: tracker.log_picture(name, step, path))

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())

    def _tell(self, message: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            message(tracker)
        for name, service in tuple(self._services.items()):
            with self._spare(name):
                message(service)

    @contextmanager
    def _spare(self, service: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of the library may end the run
            self._services.pop(service, None)
            reason = reason_of(error).rstrip(".")
            self._warn(f"{service} gets no more figures of this run: {reason}; metrics.jsonl has all of them")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An earlier error says more than the one it causes here.
        with suppress(CheckpointError) if error else nullcontext():
            self.close()


def tracker_names(trackers: str) -> tuple[str, ...]:
    """The names in the setting `trackers`; ConfigError if a library is not installed."""
    if trackers == "none":
        return ()
    if trackers == "auto":
        return ("tensorboard",) if _is_installed("tensorboard") else ()
    names = tuple(dict.fromkeys(name.strip() for name in trackers.split(",")))
    for name in names:
        if not _is_installed(name):
            raise ConfigError(
                f"trackers is {trackers!r} and {name} is not installed", f"pip install 'torchmae[{name}]'"
            )
    return names


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder ./wandb of other runs has no origin


def open_trackers(trackers: str, folder: RunFolder, display: Display, step: int = 0) -> Trackers:
    """Opens metrics.jsonl and the trackers of the setting `trackers`; config.yaml must exist.

    `step` is the number of steps that a resumed run has done. Errors: as in `tracker_names`, and CheckpointError if the
    run folder cannot be written to.
    """
    names = tracker_names(trackers)
    files: list[Tracker] = [JsonLines(folder.metrics)]
    if "tensorboard" in names:
        with warnings.catch_warnings(), suppress(ImportError) if trackers == "auto" else nullcontext():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn
            config = folder.config.read_text(encoding="utf-8")
            files.append(TensorBoard(folder.path / "tensorboard", config, step))
    opened = Trackers(*files)
    for name in (name for name in names if name in SERVICES):
        opened.start(name, folder, settings.read_yaml(folder.config), display)
    return opened


def tracking_id(folder: RunFolder) -> str:
    """Eight random characters that identify a run folder, stored in it so that a resumed run keeps its page."""
    path = folder.path / "tracking.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        name = uuid.uuid4().hex[:8]
        folder.write_json(path.name, {"id": name})
        return name


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}", "free space or mend the folder, then resume the run"
        ) from error
