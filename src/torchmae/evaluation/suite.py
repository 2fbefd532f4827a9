"""One evaluation from the options to its record: what is opened, which methods measure which subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchmae import presets
from torchmae.config.data import DataOptions
from torchmae.config.evaluate import APPLIES_TO, ComputeOptions, EvaluateOptions
from torchmae.data.loader import one_line_when_a_worker_ends
from torchmae.data.sources import Source
from torchmae.errors import ConfigError, Interrupted, one_of
from torchmae.evaluation import attentive, few_shot
from torchmae.evaluation.anomaly_data import open_anomaly_data
from torchmae.evaluation.images import EvaluationData, ModelInput, open_evaluation_data
from torchmae.evaluation.methods import ANOMALY, METHODS, WITHOUT_LABELS, Bench, output_folder, run_data
from torchmae.evaluation.records import append_record
from torchmae.evaluation.scores import Result, chance_note
from torchmae.evaluation.subject import PIXELS, RANDOM, Subject, pixels, untrained
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.paths import user_path
from torchmae.training.pretrained import load
from torchmae.training.progress import Display
from torchmae.training.ranks import concatenate, one_line_when_lost, open_ranks, ranks_from_environment, share_of_cores
from torchmae.training.runtime import Runtime, environment, open_runtime
from torchmae.training.saved_model import Description

ALL = "all"


@dataclass(frozen=True)
class Evaluation:
    """Figures and all that made them.

    Attributes:
        results: of each method, of each subject.
        data: the images.
        notes: what a reader of the figures should know, a sentence each.
        record: the same as JSON values, as evaluations.jsonl has it.
    """

    results: dict[str, dict[str, Result]]
    data: EvaluationData
    notes: tuple[str, ...]
    record: dict[str, Any]

    def figures(self) -> dict[str, dict[str, float]]:
        """Of each subject, every figure by name."""
        merged: dict[str, dict[str, float]] = {}
        for by_subject in self.results.values():
            for name, result in by_subject.items():
                merged.setdefault(name, {}).update(result.figures)
        return merged


def run(run: str | Path, options: EvaluateOptions, compute: ComputeOptions, **own: Any) -> dict[str, float]:
    """Evaluates and records: the figures in one flat dictionary, those of baselines as "random.knn20".

    Arguments and errors as for `evaluate`.
    """
    evaluation = evaluate(run, options, compute, **own)
    record_evaluation(run, evaluation)
    by_subject = evaluation.figures()
    first = next(iter(by_subject))
    return {
        (key if name == first else f"{name}.{key}"): value
        for name, figures in by_subject.items()
        for key, value in figures.items()
    }


def evaluate(
    run: str | Path,
    options: EvaluateOptions,
    compute: ComputeOptions,
    *,
    model: MaskedAutoencoder | None = None,
    splits: Mapping[str, Source] | None = None,
) -> Evaluation:
    """Measures a run. Of several ranks that torchrun has started, each looks at a share of the images.

    Args:
        run: whatever `load` takes; or "random" or "pixels" with `options.preset`, which go through the very same code.
        options: what to measure, on which images.
        compute: where.
        model: of a run of a model handed over in Python, this model again, untrained.
        splits: images of the caller's own, by split, for data "own".

    Raises:
        TorchmaeError: a run, options or data that do not fit.
    """
    one_of("method", options.method, (*METHODS, ALL))
    with open_ranks(compute.device) as ranks, one_line_when_lost(ranks, "give the same command again"):
        runtime = open_runtime(compute.device, compute.precision, compute.threads, ranks)
        options = replace(
            options, data=replace(options.data, num_workers=share_of_cores(options.data.num_workers, ranks))
        )
        display = Display(compute.progress if ranks.is_main else "none")
        try:
            with one_line_when_a_worker_ends():
                bench, subjects, options = ranks.main_first(
                    lambda: open_bench(str(run), options, compute.batch_size, runtime, display, model, splits)
                )
                results, left_out = measure(bench, subjects, options)
                bad = concatenate(ranks.gather([*bench.data.train.bad.items, *bench.data.test.bad.items]))
        except (ConfigError, Interrupted) as error:  # the same on all ranks: one says it
            if ranks.is_main:
                raise
            raise SystemExit(error.exit_status) from None
        finally:
            display.close()
    unread = (f"{len(bad)} images could not be read, the first: {': '.join(bad[0])}",) if bad else ()
    of_methods = (note for by_subject in results.values() for result in by_subject.values() for note in result.notes)
    own = {name: value for by in results.values() for name, value in by[subjects[0].name].figures.items()}
    train, test = bench.data.train.source.labels, bench.data.test.source.labels
    chance: tuple[str, ...] = ()
    if options.method not in (*WITHOUT_LABELS, ANOMALY) and train is not None and test is not None:
        chance = chance_note(own, train, test, bench.data.classes)
    notes = tuple(dict.fromkeys([*bench.data.notes, *unread, *left_out, *of_methods, *chance]))
    return Evaluation(results, bench.data, notes, make_record(str(run), bench, subjects, options, results, notes))


def record_evaluation(run: str | Path, evaluation: Evaluation) -> Path | None:
    """Adds the evaluation to RUN/evaluations.jsonl; None for what has no folder ("random", "pixels", a file), and on
    all ranks but the first.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if not ranks_from_environment().is_main or str(run) in (RANDOM, PIXELS) or not user_path(run).is_dir():
        return None
    return append_record(user_path(run), evaluation.record)


def open_bench(
    run: str,
    options: EvaluateOptions,
    batch_size: int,
    runtime: Runtime,
    display: Display,
    own: MaskedAutoencoder | None = None,
    splits: Mapping[str, Source] | None = None,
) -> tuple[Bench, list[Subject], EvaluateOptions]:
    """Opens what is evaluated and the images, and says which data the options came to mean.

    The first subject is the one asked for; with the method "all" an untrained network and pixels stand beside a run.
    """
    arguments: dict[str, Any]
    description: Description | None = None
    notes: tuple[str, ...] = ()
    if run in (RANDOM, PIXELS):
        if options.method == ANOMALY:
            raise ConfigError(f"{run!r} is no trained model", "give anomaly a run folder")
        if options.preset is None:
            raise ConfigError(f"{run!r} needs a preset", "add --preset vit_tiny_32_p4, or another name")
        if options.target is not None:
            raise ConfigError(f"target is given and {run!r} was trained for none", "leave --target out")
        arguments, trained = presets.arguments(options.preset), None
    else:
        pretrained = load(run, target=options.target, model=own)
        if options.method in APPLIES_TO["out"]:
            output_folder(run, options)  # one that is missing is said before the images are opened
        description, arguments = pretrained.description, pretrained.description.arguments
        trained = Subject("model", pretrained.model.to(runtime.device))
        notes = pretrained.notes
    model = ModelInput(
        tuple(arguments["input_size"]),
        None if trained is None else arguments["in_chans"],
        None if description is None else description.normalisation,
        runtime.device,
        batch_size,
        display.preparing,
        splits,
    )
    if options.method == ANOMALY:
        assert description is not None
        assert trained is not None
        assert options.normal is not None
        assert options.test is not None
        names = None if options.normal_classes is None else [name.strip() for name in options.normal_classes.split(",")]
        pair = open_anomaly_data(options.normal, options.test, names, options.data, model)
        pair = replace(pair, notes=(*notes, *pair.notes))
        return Bench(pair, runtime, display, run, mask_ratio(description)), [trained], options
    options = replace(options, data=own_data(run, options.data))
    data = open_evaluation_data(options, model, labelled=options.method not in WITHOUT_LABELS)
    data = replace(data, notes=(*notes, *data.notes))
    labels = data.train.source.labels
    if options.labels_per_class is not None and labels is not None:
        few_shot.check_counts(labels, data.classes, options.labels_per_class)  # before hours of encoding, not after
    arguments = {**arguments, "in_chans": len(data.normalisation.mean)}
    if run == PIXELS:
        subjects = [pixels()]
    elif run == RANDOM:
        subjects = [untrained(arguments, options.seed, runtime.device)]
    else:
        assert trained is not None
        baselines = [untrained(arguments, options.seed, runtime.device, own), pixels()] if options.method == ALL else []
        subjects = [trained, *baselines]
    return Bench(data, runtime, display, run), subjects, options


def mask_ratio(description: Description) -> float:
    """The share of the patches that was hidden in training; 0.75 where that is not known."""
    return float(description.mask.get("ratio", 0.75))


def own_data(run: str, data: DataOptions) -> DataOptions:
    """The options with the run's own data in place of none, read as the run did where nothing else is said.

    Raises:
        ConfigError: there is no data, and the run does not say which.
    """
    own = run_data(run)
    if own is None and data.source is None:
        raise ConfigError(f"data is not given and {run} does not say which", "add --data PATH_OR_NAME")
    if own is None:
        return data
    same = data.filled_from(own)  # a model sees other data as it saw its own
    if data.source is None:
        return replace(data, **same, source=own.source, val_size=own.val_size)
    return replace(data, **{**same, "root": data.root})


def measure(
    bench: Bench, subjects: Sequence[Subject], options: EvaluateOptions
) -> tuple[dict[str, dict[str, Result]], tuple[str, ...]]:
    """Results by method and subject; with the method "all" also what was left out and why, a sentence each."""
    if options.method != ALL:
        method = METHODS[options.method]
        return {options.method: {item.name: method(bench, item, options) for item in subjects}}, ()
    left_out: tuple[str, ...] = ()
    methods = ["knn", "linear"]
    if options.labels_per_class is None and subjects[0].has_tokens:
        need = attentive.token_gib(subjects[0], len(bench.data.train))
        if need <= options.attentive.memory_limit:
            methods.append("attentive")
        else:
            left_out = (f"attentive is left out: its tokens take {need:.1f} GiB; run it alone with --method attentive",)
    results = {
        name: {
            item.name: METHODS[name](bench, item, options)
            for item in subjects
            if name != "attentive" or item.has_tokens
        }
        for name in methods
    }
    return results, left_out


def make_record(
    run: str,
    bench: Bench,
    subjects: Sequence[Subject],
    options: EvaluateOptions,
    results: dict[str, dict[str, Result]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Figures, what is behind them, and all that made them, as JSON values."""
    return {
        "run": run,
        "method": options.method,
        "options": asdict(replace(options, resume=False)),  # interrupted or not, the figures are the same
        "data": {
            "train_images": len(bench.data.train),
            "test_images": len(bench.data.test),
            "classes": list(bench.data.classes),
            **{f"{split}_fingerprint": value for split, value in bench.data.fingerprints().items()},
        },
        "weights": {item.name: item.fingerprint() for item in subjects},
        "environment": environment(bench.runtime),
        "notes": list(notes),
        "results": [
            {"method": method, "subject": name, "figures": result.figures, "details": result.details}
            for method, by_subject in results.items()
            for name, result in by_subject.items()
        ],
    }
