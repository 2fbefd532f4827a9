"""One evaluation, from the options to its record: opens the data, measures each subject by each method."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torchmae import presets
from torchmae.config.evaluate import APPLIES_TO, ComputeOptions, EvaluateOptions
from torchmae.data.sources import Source
from torchmae.errors import CheckpointError, ConfigError, one_of
from torchmae.evaluation.bench import Bench, Method, check_counts, opened, output_folder
from torchmae.evaluation.images import (
    EvaluationData,
    ModelInput,
    open_evaluation_data,
    own_data,
    read_alike,
    run_data,
)
from torchmae.evaluation.methods import METHODS
from torchmae.evaluation.scores import Result, chance_note, majority
from torchmae.evaluation.subject import PIXELS, RANDOM, Subject, network, pixels, untrained
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.paths import user_path
from torchmae.report.panels import Look
from torchmae.training.pretrained import load
from torchmae.training.progress import Display
from torchmae.training.ranks import concatenate, ranks_from_environment, share_of_cores
from torchmae.training.runtime import Runtime, environment
from torchmae.words import in_words

ALL = "all"
RECORDS = "evaluations.jsonl"
"""A file of the run folder with all evaluations of the run, one JSON object a line."""


@dataclass(frozen=True)
class Evaluation:
    """Results by method and subject, the images, notes for a reader, and all of it as a record of evaluations.jsonl."""

    results: dict[str, dict[str, Result]]
    data: EvaluationData
    notes: tuple[str, ...]
    record: dict[str, Any]
    kind: str = "image"  # of the samples, as in `words.kind_of`

    def figures(self) -> dict[str, dict[str, float]]:
        """All figures of each subject by name."""
        merged: dict[str, dict[str, float]] = {}
        for by_subject in self.results.values():
            for name, result in by_subject.items():
                merged.setdefault(name, {}).update(result.figures)
        return merged


def run(run: str | Path, options: EvaluateOptions, compute: ComputeOptions, **own: Any) -> dict[str, float]:
    """Runs `evaluate` and records it. Returns the figures by name, those of baselines as "random.knn20"."""
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
    """Measures a run. Each rank that torchrun has started computes on a share of the images.

    Args:
        run: as for `load`; or "random" or "pixels", with `options.preset`.
        options: what to measure, on which images.
        compute: device, precision, threads, batch size.
        model: the caller's own model of the run, untrained.
        splits: the caller's own images, by split, for data "own".

    Raises:
        TorchmaeError: a run, options or data that do not fit; a ConfigError on all ranks.
    """
    for name in options.methods:
        one_of("method", name, (*METHODS, ALL))
        if len(options.methods) > 1 and (name == ALL or not METHODS[name].beside):
            joined = ", ".join(other for other, row in METHODS.items() if row.beside)
            raise ConfigError(f"method is {options.method!r}, and {name} stands alone", f"join some of {joined}")
    with opened(compute, "give the same command again") as (runtime, display):
        ranks = runtime.ranks
        workers = share_of_cores(options.data.num_workers, ranks)
        options = replace(options, data=replace(options.data, num_workers=workers))
        bench, subjects, options = ranks.main_first(
            lambda: open_bench(str(run), options, compute.batch_size, runtime, display, model, splits)
        )
        results, left_out = measure(bench, subjects, options)
        bad = concatenate(ranks.gather(bench.data.test.bad.items))
    unread = (f"{len(bad)} images could not be read, the first: {': '.join(bad[0])}",) if bad else ()
    of_methods = (note for by_subject in results.values() for result in by_subject.values() for note in result.notes)
    own = {name: value for by in results.values() for name, value in by[subjects[0].name].figures.items()}
    train, test = bench.data.train.source.labels, bench.data.test.source.labels
    chance: tuple[str, ...] = ()
    if train is not None and test is not None and any(name.endswith(("_low", "_std")) for name in own):
        chance = chance_note(own, train, test, bench.data.classes)
        for result in next(iter(results.values())).values():
            result.figures["majority"] = majority(train, test)[1]
    said, kind = dict.fromkeys([*bench.data.notes, *unread, *left_out, *of_methods, *chance]), bench.look.kind
    notes = tuple(in_words(note, kind) for note in said)
    record = make_record(str(run), bench, subjects, options, results, notes)
    return Evaluation(results, bench.data, notes, record, kind)


def record_evaluation(run: str | Path, evaluation: Evaluation) -> Path | None:
    """Adds the evaluation to RUN/evaluations.jsonl; CheckpointError if it cannot be written.

    Does nothing and returns None for a run without a folder ("random", "pixels", a file), and on all ranks but the
    first.
    """
    if not ranks_from_environment().is_main or str(run) in (RANDOM, PIXELS) or not user_path(run).is_dir():
        return None
    return append_record(user_path(run), evaluation.record)


def append_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Adds a line to `RECORDS` by a single write and returns the file; CheckpointError if it cannot be written.

    Ends an incomplete last line of an earlier write first.
    """
    path = folder / RECORDS
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


def chosen_methods(options: EvaluateOptions) -> dict[str, Method]:
    """The methods of the options; for "all", those with baselines that take all options that are set."""
    if options.method != ALL:
        return {name: METHODS[name] for name in options.methods}
    given = [takers for name, takers in APPLIES_TO.items() if getattr(options, name) not in (None, False)]
    return {name: row for name, row in METHODS.items() if row.beside and all(name in takers for takers in given)}


def open_bench(
    run: str,
    options: EvaluateOptions,
    batch_size: int,
    runtime: Runtime,
    display: Display,
    own: MaskedAutoencoder | None = None,
    splits: Mapping[str, Source] | None = None,
) -> tuple[Bench, list[Subject], EvaluateOptions]:
    """Opens the images and the subjects, and returns the options with the data that was opened.

    The first subject is `run`; the method "all" adds an untrained network and pixels to a run.
    """
    methods = chosen_methods(options)
    pretrained = None if run in (RANDOM, PIXELS) else load(run, target=options.target, model=own)
    if pretrained is None:
        if options.preset is None:
            raise ConfigError(f"{run!r} needs a preset", "add --preset vit_tiny_32_p4, or another name")
        if options.target is not None:
            raise ConfigError(f"target is given and {run!r} was trained for none", "leave --target out")
        arguments = presets.arguments(options.preset)
    else:
        arguments = pretrained.description.arguments
        if options.method in APPLIES_TO["out"]:
            output_folder(run, options)  # an error comes before the images are opened
    description = None if pretrained is None else pretrained.description
    model = ModelInput(
        tuple(arguments["input_size"]),
        None if description is None else arguments["in_chans"],
        None if description is None else description.normalisation,
        runtime.device,
        batch_size,
        display.preparing,
        splits,
        "auto" if description is None else description.window or "none",
    )
    opener = next((method.open for method in methods.values() if method.open is not None), None)
    own_or_other = own_data(run, options.data) if options.normal is None else read_alike(options.data, run_data(run))
    options = replace(options, data=own_or_other)
    if opener is not None:
        data = opener(options, model)
    else:
        data = open_evaluation_data(options, model, labelled=any(method.labelled for method in methods.values()))
        if data.train.source.tags is not None:
            check_several(options, methods)
        if options.labels_per_class is not None and data.train.source.labels is not None:
            # Before hours of encoding.
            check_counts(data.train.source.labels, data.classes, options.labels_per_class)
    arguments = {**arguments, "in_chans": len(data.normalisation.mean)}
    fresh: Callable[[], MaskedAutoencoder] = partial(presets.construct, arguments)
    if own is not None:
        fresh = partial(copy.deepcopy, own)
    elif pretrained is not None and pretrained.fresh is not None:
        fresh = pretrained.fresh
    baselines: dict[str, Callable[[], Subject]] = {
        RANDOM: lambda: untrained(fresh, options.seed, runtime.device, options.layer),
        PIXELS: lambda: pixels(tuple(arguments.get("patch_size", ()))),
    }
    beside = {name for method in methods.values() for name in method.baselines(options)}
    if pretrained is None:
        subjects = [baselines[run]()]
    else:
        trained = network("model", pretrained.model, runtime.device, options.layer)
        subjects = [trained, *(make() for name, make in baselines.items() if name in beside)]
        data = replace(data, notes=(*pretrained.notes, *data.notes))
    ratio = 0.75 if description is None else float(description.mask.get("ratio", 0.75))  # 0.75: unknown
    look = Look()
    if description is not None:
        look = Look.of(description.kind, len(data.normalisation.mean), description.bands or ())
    return Bench(data, runtime, display, run, ratio, look), subjects, options


def check_several(options: EvaluateOptions, methods: Mapping[str, Method]) -> None:
    """ConfigError for a method or an option that images of several classes each do not go with."""
    able = [name for name, row in METHODS.items() if row.several is not None]
    if not any(row.several is not None or not row.labelled for row in methods.values()):
        raise ConfigError(
            f"the images have several classes each, and method {options.method!r} needs one class an image",
            f"use --method {' or '.join(able)}",
        )
    if options.labels_per_class is not None or options.protocol != "sweep":
        name = "labels_per_class" if options.labels_per_class is not None else "protocol"
        raise ConfigError(
            f"{name} is {getattr(options, name)!r} and the images have several classes each", "leave it out"
        )


def measure(
    bench: Bench, subjects: Sequence[Subject], options: EvaluateOptions
) -> tuple[dict[str, dict[str, Result]], tuple[str, ...]]:
    """Results by method and subject, and sentences on the methods that "all" left out."""
    results: dict[str, dict[str, Result]] = {}
    left_out = []
    several = bench.data.train.source.tags is not None
    for name, method in chosen_methods(options).items():
        if options.method != ALL:
            method.check(name, subjects[0], bench.run)
        elif several and method.several is None:
            left_out.append(f"{name} is left out: the images have several classes each")
            continue
        elif not method.suits(subjects[0]):
            continue
        elif why := method.left_out(bench, subjects[0], options):
            left_out.append(why)
            continue
        fitting = [item for item in subjects[1:] if item.name in method.baselines(options) and method.suits(item)]
        shown = [item for item in fitting if not method.left_out(bench, item, options)]
        call = method.several if several and method.several is not None else method.measure
        results[name] = {item.name: call(bench, item, options) for item in (subjects[0], *shown)}
    return results, tuple(left_out)


def make_record(
    run: str,
    bench: Bench,
    subjects: Sequence[Subject],
    options: EvaluateOptions,
    results: dict[str, dict[str, Result]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Figures, their details, and everything that decided them, as JSON values."""
    return {
        "run": run,
        "method": options.method,
        "options": asdict(replace(options, resume=False)),  # interrupted or not, the figures are the same
        "data": {
            "train_images": len(bench.data.train),
            "test_images": len(bench.data.test),
            "classes": list(bench.data.classes),
            "twins": bench.data.twins._asdict(),
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
