"""What `torchmae pretrain` does, from Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import torchmae
from torchmae import settings
from torchmae.config import PretrainConfig
from torchmae.data.layouts import open_splits
from torchmae.data.loader import Batch, Data, ImageLoader, open_data
from torchmae.data.reading import probe
from torchmae.errors import ConfigError, DataError, Interrupted, TorchmaeError
from torchmae.evaluation.diagnostics import effective_rank
from torchmae.evaluation.features import extract, pixels
from torchmae.evaluation.knn import knn_accuracy
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.nn import presets
from torchmae.nn.autoencoder import Autoencoder
from torchmae.nn.mae import parameter_counts
from torchmae.random import Purpose, permutation, uniform
from torchmae.report.hints import hints
from torchmae.report.html import write_report
from torchmae.report.pictures import reconstruction_grid
from torchmae.training.checkpoint import Checkpoint, load_checkpoint
from torchmae.training.pretrain import Evaluator
from torchmae.training.pretrain import pretrain as train
from torchmae.training.pretrained import Pretrained, denormalise
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime, environment, open_runtime
from torchmae.training.saved_model import Description, write_description, write_weights
from torchmae.training.tracking import Tracker, open_trackers
from torchmae.visualize import write_pictures

EVAL_BATCH = 250
PICTURE_COUNT = 4
PROBED = 16
# The longer side of the images, in pixels, up to which a recipe is the one to start with.
RECIPE_FOR_SIDE = ((48, "cifar10"), (128, "images-96"), (float("inf"), "images"))
# Validation masks are drawn from this seed, whatever the run's, so that runs can be compared.
VALIDATION_SEED = 0
# What a resumed run may be given anew: where and how fast it computes, and the learning rate, for runs that diverged.
MAY_CHANGE = frozenset({
    *("device", "threads", "compile", "precision", "log_every", "checkpoint_minutes", "progress"),
    *("data.num_workers", "data.cache", "data.memory_limit", "data.root", "data.max_bad"),
    *("optim.lr", "optim.base_lr", "optim.muon_lr", "optim.clip_grad"),
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        path: its folder.
        figures: what summary.json holds.
        report: the HTML report.
        hints: what in the figures looks wrong, in plain words.
    """

    path: Path
    figures: dict[str, Any]
    report: Path
    hints: tuple[str, ...] = ()


def pretrain(
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    config: PretrainConfig | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> Run:
    """Pre-trains a masked autoencoder.

        torchmae.pretrain()                                              # digits
        torchmae.pretrain("my_images", epochs=20, mask={"ratio": 0.6})
        torchmae.pretrain(resume="runs/a")

    Args:
        data: as the option --data: a folder, a .npy file, or a name; or a dictionary of data settings.
        config: all settings at once, in place of `data` and `options`.
        resume: a run folder to go on with.
        **options: any setting of `PretrainConfig` by name, groups as dictionaries.

    Returns:
        The finished run.

    Raises:
        TorchmaeError: in place of the command line's one-line errors.
    """
    if config is not None:
        if data is not None or options or resume is not None:
            raise ConfigError("config is given beside other settings", "give either config or the settings")
        return start(config)
    if data is not None:
        options["data"] = data if isinstance(data, Mapping) else {"source": data}
    args = settings.as_options(options)
    return resume_run(Path(resume), args) if resume is not None else start(configure(args))


def configure(args: Sequence[str]) -> PretrainConfig:
    """Command-line options to settings; without --recipe, one is chosen by the data."""
    recipe, source, root = settings.peek(args)
    return settings.parse(args, recipe or choose_recipe(source, root))


def choose_recipe(source: str, root: str) -> str:
    """The recipe for a data source, by the size of its images."""
    if source == "digits":
        return "digits"
    sizes = probe(open_splits(source, root)["train"], sample=PROBED).sizes
    side = sorted(max(size) for size in sizes)[len(sizes) // 2]
    return next(recipe for limit, recipe in RECIPE_FOR_SIDE if side <= limit)


def start(config: PretrainConfig) -> Run:
    """Runs `config` in a new folder."""
    name = config.recipe if config.recipe != "auto" else "run"
    path = Path(config.out) if config.out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _run(config, path, resume=False)


def resume_run(path: Path, args: Sequence[str] = ()) -> Run:
    """Goes on with a run from its newest whole checkpoint, or from the start if it had none.

    Args:
        path: the run folder.
        args: options that may differ from the run's own (`MAY_CHANGE`).

    Raises:
        CheckpointError: no run, or all its checkpoints damaged.
        ConfigError: an option that would make it another run.
    """
    folder = RunFolder.open(path)
    saved = settings.parse(["--config", str(folder.config)], None)
    config = settings.parse(["--config", str(folder.config), *args], None)
    for name in sorted(differences(saved, config) - MAY_CHANGE):
        raise ConfigError(
            f"{name} cannot change in a resumed run", f"drop --{name}, or start a new run in another folder"
        )
    return _run(config, path, resume=True)


def differences(one: Any, other: Any, prefix: str = "") -> set[str]:
    """The dotted names of the settings in which two configurations differ."""
    names = set()
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if is_dataclass(a):
            names |= differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            names.add(f"{prefix}{field.name}")
    return names


def _run(config: PretrainConfig, path: Path, *, resume: bool) -> Run:
    display = Display(config.progress)
    folder = RunFolder(path) if resume else RunFolder.create(path)
    try:
        checkpoint = load_checkpoint(folder.checkpoints, display.warn) if resume else None
        # A resumed run keeps what "auto" meant when it began.
        saved_precision = checkpoint.state["precision"] if checkpoint is not None else "auto"
        precision = saved_precision if config.precision == "auto" else config.precision
        runtime = open_runtime(config.device, precision, config.threads)
        arguments = presets.arguments(config.model.preset, **overrides(config))
        check_model(config, arguments)
        data = open_data(
            config.data,
            input_size=arguments["input_size"],
            channels=config.model.in_chans,
            device=runtime.device,
            progress=display.preparing,
        )
        if checkpoint is not None and checkpoint.state["data"] != data.fingerprint:
            raise DataError(
                f"the images of {config.data.source} have changed since the checkpoint",
                "bring the same images back, or start a new run in another folder",
            )
        torch.manual_seed(config.seed)
        arguments["in_chans"] = data.channels
        model = presets.construct(arguments).to(runtime.device)
        try:
            return _train(config, model, arguments, data, runtime, folder, display, checkpoint)
        finally:
            data.train.close()
    finally:
        display.close()
        folder.discard()


def check_model(config: PretrainConfig, arguments: dict[str, Any]) -> None:
    """ConfigError where sizes or the mask strategy do not fit; without data and without memory for weights."""
    with torch.device("meta"):
        model = presets.construct(arguments)
    try:
        model.noise_count(config.mask.strategy)
    except ConfigError as error:
        raise ConfigError(f"{error.problem} and the preset {config.model.preset!r}", error.fix) from error


def _train(
    config: PretrainConfig,
    model: Autoencoder,
    arguments: dict[str, Any],
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    display: Display,
    checkpoint: Checkpoint | None,
) -> Run:
    """Writes the run folder around one call of the training loop."""
    folder.write_text("config.yaml", settings.to_yaml(config))
    folder.remove_results()
    folder.write_json("environment.json", {**environment(runtime), **folder.first_start()})
    description = Description(arguments, data.mean, data.std, asdict(config.mask), data.classes, torchmae.__version__)
    write_description(folder.model_json, description)
    start = checkpoint.state["step"] if checkpoint else 0
    folder.rewind_metrics(start if checkpoint else -1)
    display.say(f"run folder {folder.path}  ({runtime.device}, {runtime.precision}, {runtime.threads} threads)")
    interruption: Interrupted | None = None
    with open_trackers(folder.metrics, folder.path / "tensorboard", start) as tracker:
        evaluators = build_evaluators(config, model, data, runtime, folder, tracker, fresh=checkpoint is None)
        try:
            train(
                config,
                model=model,
                loader=data.train,
                fingerprint=data.fingerprint,
                runtime=runtime,
                folder=folder,
                tracker=tracker,
                display=display,
                evaluators=evaluators,
                checkpoint=checkpoint,
            )
        except Interrupted as error:
            interruption = error
    if data.bad.items:
        folder.write_text("bad_files.txt", "".join(f"{name}\t{reason}\n" for name, reason in data.bad.items))
        display.warn(f"{len(data.bad.items)} images could not be read and were skipped: see {folder.bad_files}")
    write_weights(folder.weights, model.state_dict())
    figures = summarise(config, model, arguments, data, folder, "interrupted" if interruption else "finished")
    folder.write_json("summary.json", figures)
    if not interruption and data.val is not None:
        try:
            write_pictures(folder.path / "pictures", Pretrained(model.eval(), description), data, runtime)
        except TorchmaeError as error:  # the run is done and saved; a picture that cannot be drawn must not hide that
            display.warn(f"no pictures of the features: {error}")
    report = write_report(folder.path)
    if interruption:
        raise interruption
    return Run(folder.path, figures, report, tuple(hints(folder.read_metrics())))


def build_evaluators(
    config: PretrainConfig,
    model: Autoencoder,
    data: Data,
    runtime: Runtime,
    folder: RunFolder,
    tracker: Tracker,
    *,
    fresh: bool,
) -> list[Evaluator]:
    """What is measured on the way: reconstruction figures, pictures, and kNN where labels exist.

    With `fresh` the model is untrained: its kNN accuracy, and that of raw pixels, are logged as baselines.
    """
    if data.val is None:
        return []
    batches = [
        (batch.images, validation_mask(model, config, batch.indices, runtime))
        for batch in data.val.eval_batches(spread(len(data.val), config.eval.images), EVAL_BATCH)
    ]
    hold_out = HoldOut(model, batches, runtime)
    images = torch.cat([images for images, _ in batches])[: config.eval.pictures]
    picture_mask = validation_mask(model, config, spread(len(data.val), config.eval.images)[: len(images)], runtime)

    def pictures(step: int) -> dict[str, float]:
        draw_pictures(model, data, images, picture_mask, folder.reconstructions / f"step-{step:08d}.png")
        return {}

    evaluators = [
        Evaluator(config.eval.count, lambda _: hold_out.run()),
        Evaluator(min(PICTURE_COUNT, config.eval.count), pictures),
    ]
    probe = knn_probe(config, data)
    if probe is not None and config.eval.knn_count:
        bank, queries = probe

        def measure_features(_: int = 0) -> dict[str, float]:
            classified = extract(model, queries(), runtime)
            accuracy = knn_accuracy(*extract(model, bank(), runtime), *classified)
            rank = {"effective_rank": effective_rank(classified[0])} if len(classified[0]) > 1 else {}
            return {"knn": accuracy, **rank}

        if fresh:
            by_pixels = knn_accuracy(*pixels(bank()), *pixels(queries()))
            untrained = {f"{name}_untrained": value for name, value in measure_features().items()}
            tracker.log("baseline", 0, {"knn_pixels": by_pixels, **untrained})

        evaluators.append(Evaluator(min(config.eval.knn_count, config.eval.count), measure_features))
    return evaluators


def knn_probe(
    config: PretrainConfig, data: Data
) -> tuple[Callable[[], Iterator[Batch]], Callable[[], Iterator[Batch]]] | None:
    """Fixed labelled images, unaugmented: those that vote and those that are classified; None without labels."""
    assert data.val is not None
    train_indices = labelled(data.train, config.eval.knn_train)
    val_indices = labelled(data.val, config.eval.knn_val)
    if not len(train_indices) or not len(val_indices):
        return None
    val = data.val
    return (
        lambda: data.train.eval_batches(train_indices, EVAL_BATCH),
        lambda: val.eval_batches(val_indices, EVAL_BATCH),
    )


def labelled(loader: ImageLoader, count: int) -> npt.NDArray[np.int64]:
    """At most `count` indices of images with a label: the same ones in every run."""
    if loader.labels is None:
        return np.empty(0, dtype=np.int64)
    order = permutation(VALIDATION_SEED, 0, len(loader), Purpose.SUBSET)
    return np.sort(order[loader.labels[order] >= 0][:count])


def spread(length: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` indices below `length`: the same ones in every run, in an order that mixes classes."""
    return permutation(VALIDATION_SEED, 0, length, Purpose.SUBSET)[:count]


def validation_mask(
    model: Autoencoder, config: PretrainConfig, indices: npt.NDArray[np.int64], runtime: Runtime
) -> Any:
    """The fixed mask of held-out images."""
    count = model.noise_count(config.mask.strategy)
    noise = torch.from_numpy(uniform(VALIDATION_SEED, 0, indices, Purpose.MASK, count)).to(runtime.device)
    return model.draw_mask(config.mask.strategy, noise, config.mask.ratio)


@torch.no_grad()
def draw_pictures(model: Autoencoder, data: Data, images: Tensor, mask: Any, path: Path) -> None:
    """Saves masked | reconstructed | original."""
    model.eval()
    result = model.reconstruct(images, mask)
    original = denormalise(images, data.mean, data.std)
    masked = original.masked_fill(result.removed.cpu(), torch.nan)
    filled = denormalise(result.images, data.mean, data.std)
    reconstruction_grid(masked, filled, original, path, note=result.note)


def summarise(
    config: PretrainConfig, model: Autoencoder, arguments: dict[str, Any], data: Data, folder: RunFolder, state: str
) -> dict[str, Any]:
    """The run in one flat record, from what metrics.jsonl holds."""
    records = folder.read_metrics()
    last: dict[str, dict[str, Any]] = {}
    for record in records:
        last[record["kind"]] = {**last.get(record["kind"], {}), **record}
    training, validation, baseline = (last.get(kind, {}) for kind in ("train", "val", "baseline"))
    encoder, rest = parameter_counts(model)
    epoch = training.get("epoch", 0.0)
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
        "num_train": len(data.train),
        "num_val": len(data.val) if data.val is not None else 0,
        "params_encoder": encoder,
        "params_decoder": rest,
        "target": "normalised patches" if model.norm_pix else "pixels",
        "mask_strategy": config.mask.strategy,
        "mask_ratio": config.mask.ratio,
        "data": config.data.source,
        "preset": config.model.preset,
        "input_size": list(arguments["input_size"]),
        "patch_size": list(arguments.get("patch_size", ())),
        "in_chans": arguments["in_chans"],
        "bad_files": len(data.bad.items),
    }


def overrides(config: PretrainConfig) -> dict[str, Any]:
    """The model settings that replace the preset's values."""
    return {name: value for name, value in asdict(config.model).items() if name != "preset"}
