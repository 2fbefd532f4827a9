"""One evaluation from the options to the figures: what is opened, which methods measure which subjects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmae import settings
from torchmae.config import DataConfig
from torchmae.data.loader import Batch
from torchmae.data.reading import probe
from torchmae.errors import CheckpointError, ConfigError, one_of
from torchmae.evaluation import anomaly, attentive, few_shot, finetune, knn, linear
from torchmae.evaluation.images import EvaluationData, ImageSet, Normalisation, check_sizes, open_evaluation_data
from torchmae.evaluation.options import ComputeOptions, DataOptions, EvaluateOptions
from torchmae.evaluation.records import append_record
from torchmae.evaluation.scores import Labelled, Result, combine, score
from torchmae.evaluation.subject import PIXELS, RANDOM, Subject, extract_features, pixels, untrained
from torchmae.nn import presets
from torchmae.random import Purpose, permutation
from torchmae.training.pretrained import load
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime, environment, open_runtime
from torchmae.training.saved_model import Description

ALL = "all"
ANOMALY = "anomaly"


class Bench:
    """Data, a place to compute, and the features computed so far: each image is encoded once a subject.

    Args:
        data: the images.
        runtime: where to compute.
        display: shows progress.
        run: what is evaluated: a folder, "random" or "pixels".
        mask_ratio: share of the patches that was hidden when the model was trained.
    """

    def __init__(
        self, data: EvaluationData, runtime: Runtime, display: Display, run: str, mask_ratio: float = 0.75
    ) -> None:
        self.data = data
        self.runtime = runtime
        self.display = display
        self.run = run
        self.mask_ratio = mask_ratio
        self._cache: dict[tuple[str, str], Labelled] = {}

    def features(self, subject: Subject, pool: str) -> tuple[Labelled, Labelled]:
        """Features of the training and of the test images."""
        return self._features(subject, "train", pool), self._features(subject, "test", pool)

    def _features(self, subject: Subject, split: str, pool: str) -> Labelled:
        widest = subject.pools[-1]  # "both" holds the other two: one pass over the images serves all three
        if (subject.name, split) not in self._cache:
            images: ImageSet = getattr(self.data, split)
            batches = self._shown(images, f"encoding {split} images, {subject.name}")
            self._cache[subject.name, split] = extract_features(subject, batches, self.runtime, widest)
        held = self._cache[subject.name, split]
        if pool == widest:
            return held
        width = held.features.shape[1] // 2
        part = held.features[:, :width] if pool == "mean" else held.features[:, width:]
        return Labelled(part, held.labels)

    def _shown(self, images: ImageSet, what: str) -> Iterator[Batch]:
        done = 0
        for batch in images.batches():
            yield batch
            done += len(batch.labels)
            self.display.preparing(what, done, len(images))


Method = Callable[[Bench, Subject, EvaluateOptions], Result]


def _knn(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    train, test = bench.features(subject, chosen_pool(subject, options) or "mean")
    return _classified(train, test, knn.classify, bench, options)


def _linear(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    pool = chosen_pool(subject, options)
    results = []
    for kind in (pool,) if pool else subject.pools:

        def classify(train: Labelled, test: Labelled, num_classes: int, kind: str = kind) -> dict[str, Tensor]:
            if options.protocol == "paper":
                return {f"linear_paper_{kind}": linear.classify_paper(train, test, num_classes, seed=options.seed)}
            guesses = {f"linear_{kind}": linear.classify(train, test, num_classes, seed=options.seed)}
            if kind == "mean":
                guesses[f"linear_c{linear.FIXED_C}"] = linear.classify(train, test, num_classes, c=linear.FIXED_C)
            return guesses

        results.append(_classified(*bench.features(subject, kind), classify, bench, options))
    return _joined(results)


def _attentive(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    if not subject.has_tokens:
        raise ConfigError("attentive probing needs patch tokens", "evaluate a vit model, or use knn or linear")
    classes = bench.data.classes
    ranking, labels = attentive.classify(
        subject,
        bench.data.train,
        bench.data.test,
        len(classes),
        runtime=bench.runtime,
        options=options.attentive,
        seed=options.seed,
        progress=bench.display.preparing,
    )
    return combine({"attentive": score(ranking, labels, len(classes))}, classes)


def _reconstruction(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    from torchmae.evaluation import quality  # scikit-image is optional

    if subject.model is None:
        raise ConfigError("pixels reconstruct nothing", "evaluate a run, or random with --preset")
    data = bench.data
    mixed = np.sort(permutation(0, 0, len(data.test), Purpose.SUBSET)[: options.reconstruction.images])
    images = torch.cat([batch.images for batch in data.test.batches(mixed)])
    return quality.measure(
        subject.model,
        images,
        mean=data.normalisation.mean,
        std=data.normalisation.std,
        runtime=bench.runtime,
        ratios=options.reconstruction.ratios,
        strategies=options.reconstruction.strategies,
        seed=options.seed,
    )


def _finetune(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    if subject.model is None:
        raise ConfigError("pixels cannot be fine-tuned", "evaluate a run, or random with --preset")
    model, data, config = subject.model, bench.data, options.finetune
    out = finetune_folder(bench.run, options)
    augmentation = finetune.data_settings(run_data(bench.run) or DataConfig(), config, model, data.normalisation)
    check_folder(out, options.resume)
    train = data.train.augmented(augmentation)

    def trained(folder: Path, draw: int, resume: bool) -> Result:
        return finetune.finetune(
            model,
            data.normalisation,
            train,
            data.test.loader,
            config=config,
            runtime=bench.runtime,
            out=folder,
            labels_per_class=options.labels_per_class,
            draw=draw,
            seed=options.seed,
            resume=resume,
            display=bench.display,
        )

    if options.labels_per_class is None:
        figures, details, _ = trained(out, 0, options.resume)
    else:
        folders = [out / f"draw-{draw}" for draw in range(options.draws)]
        results = [
            trained(folder, draw, options.resume and (folder / "finetune.json").exists())
            for draw, folder in enumerate(folders)
        ]
        figures, details = over_draws([result.figures for result in results])
    count = f"{figures[f'{finetune.NAME}_images']:,.0f}"
    left = "the classifier is" if options.labels_per_class is None else "the classifier of each draw is"
    notes: tuple[str, ...] = (f"fine-tuned on {count} labelled images; {left} in {out}",)
    if config.init == "random":
        # Under a name of its own: in a report it must not be taken for what the pre-trained weights gave.
        figures, details = (
            {name.replace(finetune.NAME, f"{finetune.NAME}_random", 1): value for name, value in item.items()}
            for item in (figures, details)
        )
        notes += ("trained from random weights: of the model only its architecture is used",)
    return Result(figures, details, notes)


def _anomaly(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    assert subject.model is not None
    out = Path(bench.run if options.out is None else options.out)
    figures = anomaly.run(
        subject.model,
        bench.data.train,
        bench.data.test,
        runtime=bench.runtime,
        ratio=bench.mask_ratio,
        seed=options.seed,
        normalisation=bench.data.normalisation,
        out=out,
        display=bench.display,
    )
    written = [name for name in ("anomaly.png", "anomaly_scores.csv") if (out / name).exists()]
    return Result(figures, {}, (f"{' and '.join(written)} {'are' if len(written) > 1 else 'is'} in {out}",))


METHODS: dict[str, Method] = {
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
    "reconstruction": _reconstruction,
    "finetune": _finetune,
    ANOMALY: _anomaly,
}
"""Every method by name: what `--method` takes, beside "all"."""

WITHOUT_LABELS = frozenset({"reconstruction"})


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


def run(
    run: str | Path, options: EvaluateOptions | None = None, compute: ComputeOptions | None = None
) -> dict[str, float]:
    """Evaluates and records: the figures in one flat dictionary, those of baselines as "random.knn20".

    Arguments and errors as for `evaluate`.
    """
    evaluation = evaluate(run, options or EvaluateOptions(), compute or ComputeOptions(progress="none"))
    record_evaluation(run, evaluation)
    by_subject = evaluation.figures()
    first = next(iter(by_subject))
    return {
        (key if name == first else f"{name}.{key}"): value
        for name, figures in by_subject.items()
        for key, value in figures.items()
    }


def evaluate(run: str | Path, options: EvaluateOptions, compute: ComputeOptions) -> Evaluation:
    """Measures a run.

    Args:
        run: a run folder, or a folder with model.json and model.safetensors; or "random" or "pixels" with
            `options.preset`, which go through the very same code.
        options: what to measure, on which images.
        compute: where.

    Raises:
        TorchmaeError: a run, options or data that do not fit.
    """
    one_of("method", options.method, (*METHODS, ALL))
    runtime = open_runtime(compute.device, compute.precision, compute.threads)
    display = Display(compute.progress)
    try:
        bench, subjects, options = open_bench(str(run), options, compute.batch_size, runtime, display)
        results, left_out = measure(bench, subjects, options)
    finally:
        display.close()
    bad = list(dict.fromkeys([*bench.data.train.bad.items, *bench.data.test.bad.items]))
    unread = (f"{len(bad)} images could not be read, the first: {': '.join(bad[0])}",) if bad else ()
    of_methods = (note for by_subject in results.values() for result in by_subject.values() for note in result.notes)
    notes = tuple(dict.fromkeys([*bench.data.notes, *unread, *left_out, *of_methods]))
    return Evaluation(results, bench.data, notes, make_record(str(run), bench, subjects, options, results, notes))


def record_evaluation(run: str | Path, evaluation: Evaluation) -> None:
    """Adds the evaluation to RUN/evaluations.jsonl, where there is a run; CheckpointError when that cannot be done."""
    if str(run) not in (RANDOM, PIXELS):
        append_record(Path(run), evaluation.record)


def open_bench(
    run: str, options: EvaluateOptions, batch_size: int, runtime: Runtime, display: Display
) -> tuple[Bench, list[Subject], EvaluateOptions]:
    """Opens what is evaluated and the images, and says which data the options came to mean.

    The first subject is the one asked for; with the method "all" an untrained network and pixels stand beside a run.
    """
    arguments: dict[str, Any]
    description: Description | None = None
    if run in (RANDOM, PIXELS):
        if options.method == ANOMALY:
            raise ConfigError(f"{run!r} is no trained model", "give anomaly a run folder")
        if options.preset is None:
            raise ConfigError(f"{run!r} needs a preset", "add --preset vit_tiny_32_p4, or another name")
        arguments, trained = presets.arguments(options.preset), None
    else:
        pretrained = load(run)
        description, arguments = pretrained.description, pretrained.description.arguments
        trained = Subject("model", pretrained.model.to(runtime.device))
    if options.method == ANOMALY:
        assert description is not None
        assert trained is not None
        normal_and_test = open_normal_and_test(options, batch_size, description, runtime)
        return Bench(normal_and_test, runtime, display, run, mask_ratio(description)), [trained], options
    options = replace(options, data=own_data(run, options.data))
    data = open_evaluation_data(
        options,
        batch_size=batch_size,
        input_size=tuple(arguments["input_size"]),
        channels=None if trained is None else arguments["in_chans"],
        normalisation=None if description is None else Normalisation(description.mean, description.std),
        device=runtime.device,
        labelled=options.method not in WITHOUT_LABELS,
        progress=display.preparing,
    )
    labels = data.train.source.labels
    if options.labels_per_class is not None and labels is not None:
        few_shot.check_counts(labels, data.classes, options.labels_per_class)  # before hours of encoding, not after
    arguments = {**arguments, "in_chans": data.channels}
    if run == PIXELS:
        subjects = [pixels()]
    elif run == RANDOM:
        subjects = [untrained(arguments, options.seed, runtime.device)]
    else:
        assert trained is not None
        baselines = [untrained(arguments, options.seed, runtime.device), pixels()] if options.method == ALL else []
        subjects = [trained, *baselines]
    return Bench(data, runtime, display, run), subjects, options


def open_normal_and_test(
    options: EvaluateOptions, batch_size: int, description: Description, runtime: Runtime
) -> EvaluationData:
    """The images of anomaly detection, the normal ones as training images; errors as of `open_anomaly_data`."""
    assert options.normal is not None
    assert options.test is not None
    normalisation, channels = Normalisation(description.mean, description.std), description.arguments["in_chans"]
    names = None if options.normal_classes is None else [name.strip() for name in options.normal_classes.split(",")]
    normal, test = anomaly.open_anomaly_data(
        options.normal,
        options.test,
        names,
        options=options.data,
        input_size=description.input_size,
        channels=channels,
        normalisation=normalisation,
        device=runtime.device,
        batch_size=batch_size,
    )
    resampled = (check_sizes(probe(part.source), part.source, description.input_size) for part in (normal, test))
    notes = next(filter(None, resampled), ())
    return EvaluationData(normal, test, normalisation, channels, ("normal", "anomalous"), notes, test.bad)


def mask_ratio(description: Description) -> float:
    """The share of the patches that was hidden in training; 0.75 where that is not known."""
    return float(description.mask.get("ratio", 0.75))


def finetune_folder(run: str, options: EvaluateOptions) -> Path:
    """The folder of a fine-tuning: the one asked for, or one in the run that is named after the main settings."""
    if options.out is not None:
        return Path(options.out)
    if run == RANDOM:
        raise ConfigError("out is not given, and random has no folder", "add --out DIR")
    count = options.labels_per_class
    parts = [options.finetune.init, *([f"{count}-per-class"] if count else [])]
    return Path(run) / "-".join([finetune.NAME, *parts, *([f"seed{options.seed}"] if options.seed else [])])


def check_folder(out: Path, resume: bool) -> None:
    """Raises unless `out` holds a fine-tuning when one is resumed, and nothing when one is begun."""
    begun = out.is_dir() and any(not item.name.startswith(".") for item in out.iterdir())
    if begun and not resume:
        raise ConfigError(f"{out} exists already", "go on with --resume, or choose another --out")
    if resume and not begun:
        raise CheckpointError(f"{out} holds no fine-tuning to go on with", "leave --resume out to begin one")


def over_draws(draws: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of several fine-tunings as their means, the deviation of top-1, and as details its values."""
    names = [name for name in draws[0] if not name.endswith(("_low", "_high"))]
    figures = {name: mean(figures[name] for figures in draws) for name in names}
    shares = [figures[finetune.NAME] for figures in draws]
    deviation = {f"{finetune.NAME}_std": stdev(shares) if len(shares) > 1 else 0.0}
    return figures | deviation, {finetune.NAME: {"draws": shares}}


def run_data(run: str) -> DataConfig | None:
    """The data that a run was trained on; None where that is not known."""
    config = Path(run) / "config.yaml"
    return None if run in (RANDOM, PIXELS) or not config.is_file() else settings.parse(["--config", str(config)]).data


def own_data(run: str, data: DataOptions) -> DataOptions:
    """The options with the run's own data in place of none; ConfigError where the run does not say."""
    if data.source is not None:
        return data
    own = run_data(run)
    if own is None:
        raise ConfigError(f"data is not given and {run} does not say which", "add --data PATH_OR_NAME")
    return replace(data, source=own.source, root=own.root, val_size=own.val_size)


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


def chosen_pool(subject: Subject, options: EvaluateOptions) -> str | None:
    """The pool asked for, which a baseline that has only one kind of features does not have to have.

    Raises:
        ConfigError: the evaluated model does not have it.
    """
    if options.pool is None or options.pool in subject.pools:
        return options.pool
    if subject.model is None:
        return "mean"
    raise ConfigError(f"pool is {options.pool!r} but the model has no class token", "use --pool mean")


def _classified(
    train: Labelled, test: Labelled, classify: few_shot.Classify, bench: Bench, options: EvaluateOptions
) -> Result:
    """A probe's result: on all training images, or few-shot."""
    classes = bench.data.classes
    if options.labels_per_class is not None:
        return few_shot.run(
            train,
            test,
            classify,
            classes=classes,
            labels_per_class=options.labels_per_class,
            draws=options.draws,
            seed=options.seed,
        )
    guesses = classify(train, test, len(classes))
    return combine({name: score(item, test.labels, len(classes)) for name, item in guesses.items()}, classes)


def _joined(results: Sequence[Result]) -> Result:
    """Several results of one subject as one."""
    figures = {name: value for result in results for name, value in result.figures.items()}
    return Result(figures, {name: value for result in results for name, value in result.details.items()})
