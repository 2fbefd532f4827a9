"""A run from its settings to its folder: opened, trained, measured, reported; begun or gone on with."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torchmae
from torchmae import presets, settings
from torchmae.building import NOTHING, Own, check_model, check_parallel, check_views, pretrain_settings
from torchmae.config import PretrainConfig
from torchmae.config.base import make
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits, settled
from torchmae.data.loader import one_line_when_a_worker_ends
from torchmae.data.opening import Data, open_data
from torchmae.data.sources import data_line
from torchmae.errors import ConfigError, DataError, Interrupted, TorchmaeError
from torchmae.evaluation.diagnostics import Seen
from torchmae.evaluation.images import run_data
from torchmae.evaluators import affordable, build_evaluators
from torchmae.files import seen_late
from torchmae.interop.weights import initialise
from torchmae.nn.layers import without_weights
from torchmae.nn.mae import MaskedAutoencoder, parameter_counts
from torchmae.nn.masking import Masker
from torchmae.nn.teacher import attach
from torchmae.paths import user_path
from torchmae.report.html import write_report
from torchmae.report.verdict import hints
from torchmae.training.checkpoint import Checkpoint, load_checkpoint
from torchmae.training.compilation import check_compiler
from torchmae.training.initial import adopt_shape, read_initial
from torchmae.training.parallel import is_sharded, place, whole_state
from torchmae.training.pretrain import fit_batch, pretrain
from torchmae.training.pretrained import Pretrained
from torchmae.training.progress import Display
from torchmae.training.ranks import (
    Ranks,
    concatenate,
    job_name,
    open_ranks,
    ranks_from_environment,
    restarts,
    share_of_cores,
)
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime, callers_state, environment, find_device, open_runtime
from torchmae.training.saved_model import Description, write_description, write_weights
from torchmae.training.task import seeded
from torchmae.training.teacher import Teacher, read_teacher
from torchmae.training.tracking import Trackers, open_trackers, tracker_names
from torchmae.training.trainer import ran_out_of_memory
from torchmae.visualize import look_of, write_pictures

# Settings that may change when a run is resumed: where and how fast it computes, and the learning rate, for runs that
# diverged.
MAY_CHANGE = frozenset({
    *("device", "threads", "compile", "precision", "log_every", "checkpoint_minutes", "progress", "trackers"),
    *("accumulate", "parallel", "rank_timeout", "compress_gradients"),
    *("checkpoint_activations", "activation_memory_budget"),
    *("data.allow_change", "data.num_workers", "data.cache", "data.memory_limit", "data.root", "data.max_bad"),
    *("optim.lr", "optim.base_lr", "optim.muon_lr", "optim.clip_grad", "max_skipped"),
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    path: Path  # its folder
    figures: dict[str, Any]  # as in summary.json
    report: Path  # an HTML file
    hints: tuple[str, ...] = ()  # what in the figures looks wrong, in plain words


def start(config: PretrainConfig, own: Own = NOTHING) -> Run:
    """Runs `config` in a new folder.

    A job of torchrun that was started again (`--max-restarts`, or for a machine that joined) goes on with the run that
    it began. Restarts are counted by each machine for itself, so rank 0 decides, also by the job's name.
    """
    config = own.named_in(config)
    if config.init_from is not None:
        config = replace(config, model=adopt_shape(config.model, read_initial(config.init_from, config.model)))
    name = config.recipe if config.recipe != "auto" else "run"
    path = user_path(config.out) if config.out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if restarts()[1] and config.out is None:
        raise ConfigError("torchrun may start this run again and would not find its folder", "give --out")

    def begun() -> bool:
        folder = RunFolder(path)
        own_job = job_name() is not None and folder.first_start().get("job") == job_name()
        return (own_job or any(counts)) and folder.config.is_file()

    with open_ranks(config.device, config.rank_timeout) as ranks:
        counts = ranks.gather(restarts()[0])
        if not ranks.on_main(begun):
            return _run(config, path, own, resume=False)
        given = settings.values_of(config)
        # The run's own settings say what fitted into memory and time.
        given = {name: value for name, value in given.items() if not name.startswith("eval.")}
        if config.fit_batch:
            del given["fit_batch"], given["batch_size"]
        return resume_run(path, given, own)


def resume_run(path: Path, given: Mapping[str, Any], own: Own = NOTHING) -> Run:
    """Goes on with the run in a folder from its newest whole checkpoint, or from the start if it had none.

    `given` are settings by dotted name that differ from the run's own, all of them in `MAY_CHANGE`, else ConfigError.
    `own` are the objects that the run was begun with. CheckpointError: no run, or all its checkpoints damaged.
    """
    path = user_path(path)
    if not ranks_from_environment().is_main:
        seen_late(path / "config.yaml")
    folder = RunFolder.open(path)
    saved = settings.read_file(folder.config)
    config = own.named_in(make(PretrainConfig, {**saved, **given}))
    before, after = settings.values_of(make(PretrainConfig, saved)), settings.values_of(config)
    for name in sorted({name for name in after if after[name] != before[name]} - MAY_CHANGE):
        raise ConfigError(
            f"{name} cannot change in a resumed run",
            f"drop --{name}, or begin a new run with these weights: --init-from {path} --out ANOTHER_FOLDER",
        )
    return _run(config, path, own, resume=True)


def _run(config: PretrainConfig, path: Path, own: Own, *, resume: bool) -> Run:
    with callers_state(), open_ranks(config.device, config.rank_timeout) as ranks, one_line_when_a_worker_ends():
        try:
            return _run_on(ranks, config, path, own, resume=resume)
        except (ConfigError, Interrupted) as error:  # the same on all ranks: one says it
            if ranks.is_main:
                raise
            raise SystemExit(error.exit_status) from None


def _run_on(ranks: Ranks, config: PretrainConfig, path: Path, own: Own, *, resume: bool) -> Run:
    check_parallel(config, ranks.world_size)
    arguments = own.arguments(config)
    teacher: Teacher | None = None
    if source := config.model.teacher:
        grid = presets.weightless({**arguments, "teacher_dim": 1}).encoder.grid
        teacher = ranks.main_first(lambda: read_teacher(source, grid))
        arguments["teacher_dim"] = teacher.dim
    with without_weights():
        check_model(config, own.construct(arguments))
    own.try_out(config)  # before there is a folder, which would refuse the next try
    if config.compile and find_device(config.device).type == "cpu":
        ranks.together(check_compiler)
    display = Display(config.progress) if ranks.is_main else Display("none", io.StringIO())
    folder = RunFolder(path)

    def claim() -> Path:
        nonlocal folder
        tracker_names(config.trackers)
        folder = RunFolder(path) if resume else RunFolder.create(path, rename=config.out is None)
        folder.lock()
        if not resume:
            folder.clear_start()
        return folder.path

    claimed = ranks.on_main(claim)
    folder = folder if ranks.is_main else RunFolder(claimed)  # rank 0's clock has named it
    try:
        checkpoint = load_checkpoint(folder.checkpoints, display.warn, ranks) if resume else None
        # A resumed run keeps what "auto" meant when it began.
        saved_precision = checkpoint.state["precision"] if checkpoint is not None else "auto"
        precision = saved_precision if config.precision == "auto" else config.precision
        runtime = ranks.together(lambda: open_runtime(config.device, precision, config.threads, ranks))
        context = Context.of(config.data, spatial_dims=len(arguments["input_size"]), progress=display.preparing)
        if config.data.spacing == "median" and own.splits is None:
            spacing = ranks.together(lambda: settled(config.data.source, context).spacing)
            config = replace(config, data=replace(config.data, spacing=spacing))
        if ranks.world_size > 1 and own.splits is None:  # rank 0 first: what is downloaded or indexed is so once
            ranks.on_main(lambda: len(open_splits(config.data.source, context)))
        # "auto" means what it meant when the run began.
        window = run_data(str(folder.path)).window if resume else config.data.window
        data = ranks.together(
            lambda: open_data(
                replace(config.data, num_workers=share_of_cores(config.data.num_workers, ranks), window=window),
                input_size=arguments["input_size"],
                channels=config.model.in_chans,
                device=runtime.device,
                progress=display.preparing,
                own=own.splits,
            )
        )
        check_same_data(data, ranks)
        if checkpoint is not None and checkpoint.state["data"] != data.fingerprint:
            changed = f"the images of {config.data.source} have changed since the checkpoint"
            if not config.data.allow_change:
                raise DataError(
                    changed,
                    "bring the same images back, start a new run in another folder, or go on with what is there: "
                    "--data.allow_change true",
                )
            display.warn(f"{changed}; going on with what is there")
        if data.notes:
            display.say(data_line(data.notes))
        if note := data.train.note_on_room(-(-config.batch_size // ranks.world_size)):
            display.say(note)
        arguments["in_chans"] = data.channels
        with seeded(config.seed):
            model = own.construct(arguments)
        if teacher is not None:
            attach(model, teacher.teach(model.patch_size, data.normalisation))
        if config.fit_batch:
            size = (data.channels, *arguments["input_size"])
            batch_size = fit_batch(pretrain_settings(config, model), model, size, len(data.train), runtime)
            config = replace(config, batch_size=batch_size, fit_batch=False)
            display.say(f"the largest batch that fits: {batch_size} images")
        views = config.refine.views if config.refine.share else 1
        patches = model.encoder.num_patches * views  # of an image
        if config.max_tokens is not None and config.max_tokens < config.batch_size * patches:
            batch_size = max(1, config.max_tokens // patches)
            config = replace(config, batch_size=batch_size)
            display.say(f"batches of {batch_size} images, of {patches:,} patches each: max_tokens")
        check_views(config, min(config.batch_size, len(data.train)), ranks.world_size)
        place(model, config.parallel, runtime)
        if not resume:
            chosen, line = affordable(
                config.eval, model, data, runtime, epochs=config.epochs, minutes=config.max_minutes
            )
            config = replace(config, eval=chosen)
            if line:
                display.say(line)
        try:
            return _train(config, own, model, arguments, data, runtime, folder, display, checkpoint)
        finally:
            data.train.close()
    finally:
        display.close()
        folder.close()


def check_same_data(data: Data, ranks: Ranks) -> None:
    """ConfigError where ranks see different training images."""
    seen = ranks.gather(data.fingerprint)
    for rank, fingerprint in enumerate(seen):
        if fingerprint != seen[0]:
            raise ConfigError(
                f"rank {rank} sees other training images than rank 0", "give all machines the same files in one order"
            )


def _train(
    config: PretrainConfig,
    own: Own,
    model: MaskedAutoencoder,
    arguments: dict[str, Any],
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    display: Display,
    checkpoint: Checkpoint | None,
) -> Run:
    """Writes the run folder around one call of the training loop."""
    ranks = runtime.ranks
    first = data.example
    description = Description(
        arguments,
        moving=first.meta.get("fps") is not None or "T" in (config.data.axes or ""),
        bands=first.bands or None,
        mask=asdict(config.mask),
        classes=data.classes,
        torchmae=torchmae.__version__,
        reading=config.data.of_one_file() or None,
        window=data.window,
        **asdict(data.normalisation),
    )
    start = checkpoint.state["step"] if checkpoint else 0

    def begin() -> None:
        folder.write_text("config.yaml", settings.to_yaml(config))
        folder.remove_results()
        about = {**environment(runtime), **folder.first_start(), **({"job": name} if (name := job_name()) else {})}
        folder.write_json("environment.json", {**about, "data": "; ".join(data.notes)} if data.notes else about)
        write_description(folder.model_json, description)
        folder.rewind_metrics(start if checkpoint else -1)

    ranks.on_main(begin)
    about = [str(runtime.device), runtime.precision, f"{runtime.threads} threads"]
    about += [f"{ranks.world_size} ranks ({config.parallel})"] if ranks.world_size > 1 else []
    about += [f"recipe {config.recipe}"] if config.recipe != "auto" else []
    display.say(f"run folder {folder.path}  ({', '.join(about)})")
    interruption: Interrupted | None = None
    with open_trackers(config.trackers, folder, display, start) if ranks.is_main else Trackers() as tracker:
        masker = Masker(model.encoder, config.mask.strategy, config.mask.ratio)  # the same masks, whatever the schedule
        evaluators, probe = build_evaluators(
            config.eval, masker, model, data, runtime, folder, tracker, look_of(description), fresh=checkpoint is None
        )
        if config.init_from is not None and checkpoint is None:  # after the baselines, which are of random weights
            for line in initialise(model, read_initial(config.init_from, config.model)):
                display.say(line)
        seen: Mapping[str, Seen] = {}
        try:
            state = pretrain(
                pretrain_settings(config, model),
                model=model,
                loader=data.train,
                batch_size=config.batch_size,
                epochs=config.epochs,
                max_minutes=config.max_minutes,
                fingerprint=data.fingerprint,
                runtime=runtime,
                folder=folder,
                tracker=tracker,
                display=display,
                evaluators=evaluators,
                checkpoint=checkpoint,
            )
            if probe is not None and probe.seen[0] == state.step:
                seen = probe.seen[1]
        except Interrupted as error:
            interruption = error
    weights = whole_state(model)
    bad = concatenate(ranks.gather(data.bad.items))

    def end() -> Run:
        whole = model
        if any(map(is_sharded, model.parameters())):
            whole = own.construct(arguments)
            whole.load_state_dict(weights)
        return _finish(config, Pretrained(whole, description), data, bad, runtime, folder, display, seen, interruption)

    return ranks.on_main(end)


def _finish(
    config: PretrainConfig,
    pretrained: Pretrained,
    data: Data,
    bad: Sequence[tuple[str, str]],
    runtime: Runtime,
    folder: RunFolder,
    display: Display,
    seen: Mapping[str, Seen],
    interruption: Interrupted | None,
) -> Run:
    """Writes weights, figures, pictures and the report; raises the interruption if there was one."""
    model, description = pretrained.model, pretrained.description
    if bad:
        folder.write_text("bad_files.txt", "".join(f"{name}\t{reason}\n" for name, reason in bad))
        display.warn(f"{len(bad)} images could not be read and were skipped: see {folder.bad_files}")
    write_weights(folder.weights, model.state_dict())
    state = "interrupted" if interruption else "finished"
    figures = {**summarise(config, model, description, data, folder, state), "bad_files": len(bad)}
    folder.write_json("summary.json", figures)
    if not interruption and data.val is not None:
        try:
            model = model.to(runtime.device).eval()  # of one that was in shards, here for the first time
            write_pictures(folder.path / "pictures", Pretrained(model, description), data, runtime, display, seen)
        except Exception as error:  # the run is done and saved; a picture that cannot be drawn must not hide that
            if not isinstance(error, TorchmaeError) and not ran_out_of_memory(error):
                raise
            display.warn(f"no pictures of the features: {error}")
    report = write_report(folder.path)
    if interruption:
        raise interruption
    return Run(folder.path, figures, report, tuple(hints(folder.read_metrics())))


def summarise(
    config: PretrainConfig,
    model: MaskedAutoencoder,
    description: Description,
    data: Data,
    folder: RunFolder,
    state: str,
) -> dict[str, Any]:
    """The run in one flat record, from what metrics.jsonl holds."""
    records = folder.read_metrics()
    last: dict[str, dict[str, Any]] = {}
    for record in records:
        last[record["kind"]] = {**last.get(record["kind"], {}), **record}
    training, validation, baseline = (last.get(kind, {}) for kind in ("train", "val", "baseline"))
    encoder, rest = parameter_counts(model)
    epoch, arguments = training.get("epoch", 0.0), description.arguments
    seconds = training.get("seconds", 0.0)
    images_seen = round(epoch * len(data.train))
    names = ("loss", "loss_mean_patch", "loss_interpolation", "explained_variance", "explained_variance_interpolation")
    return {
        "state": state,
        "steps": training.get("step", 0),
        "epochs": epoch,
        "images_seen": images_seen,
        "seconds": seconds,
        "images_per_s": images_seen / seconds if seconds else 0.0,
        **{name: validation.get(name) for name in names},
        "knn": validation.get("knn"),
        "knn_untrained": baseline.get("knn_untrained"),
        "knn_pixels": baseline.get("knn_pixels"),
        "linear": validation.get("linear"),
        "linear_untrained": baseline.get("linear_untrained"),
        "linear_pixels": baseline.get("linear_pixels"),
        "num_train": len(data.train),
        "num_val": len(data.val) if data.val is not None else 0,
        "params_encoder": encoder,
        "params_decoder": rest,
        "target": model.target.label,
        "mask_strategy": config.mask.strategy,
        "mask_ratio": config.mask.ratio,
        "data": config.data.source,
        "kind": description.kind,
        "preset": config.model.preset,
        "input_size": list(arguments["input_size"]),
        "patch_size": list(arguments.get("patch_size", ())),
        "in_chans": arguments["in_chans"],
        "bad_files": len(data.bad.items),
    }
