"""The three measurements: one training step, over and over; loading alone; and the real training loop."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from torchmae import presets
from torchmae.bench.contenders import OURS, Contender, build, check_equal, model_arguments, process_of, synchronise
from torchmae.bench.results import Report, Result
from torchmae.building import pretrain_settings
from torchmae.config import PretrainConfig
from torchmae.config.bench import BenchData, BenchStep, BenchTrain
from torchmae.data.items import Progress
from torchmae.data.loader import Plan, start_worker
from torchmae.data.opening import Data, open_data
from torchmae.data.transforms import to_device
from torchmae.errors import ConfigError, Interrupted
from torchmae.machine import num_cores
from torchmae.nn.flops import count_flops
from torchmae.training.pretrain import pretrain
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime, environment, open_runtime
from torchmae.training.trainer import Evaluator

Stream = Callable[[], Generator[Tensor, None, None]]

BARE = "bare step"
_ENDLESS = 1_000_000_000  # more steps, or images, than anyone waits for
_READY_PER_WORKER = 2  # batches that a DataLoader has its workers prepare ahead


def measure_step(configs: Mapping[str, PretrainConfig], options: BenchStep, progress: Progress) -> Report:
    """Times training steps on one batch that stays on the device; contenders take turns, each in its own process.

    `configs` has the settings of every contender by its code (`contenders.build`), ours first, all on one device.
    ConfigError: sizes that do not fit together, a peer that cannot do them, or too little memory.
    """
    for code, config in configs.items():
        check_equal(config, model_arguments(config), code)  # before anything is measured
    calls: dict[str, Callable[..., Any]] = {}
    told: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for code, config in configs.items():  # one after the other: the first steps are timed too
            calls[code] = stack.enter_context(process_of(code, config))
            told[code] = calls[code]("first_steps")
            progress("first steps", len(told), len(configs))
        turns = {code: partial(call, "turn", options.steps) for code, call in calls.items()}
        products = {told[code]["precision"]: partial(call, "matrix_product_rate") for code, call in calls.items()}
        done = partial(progress, "timing steps")
        speeds = take_turns({**turns, **products}, options.rounds, lambda rounds: done(rounds, options.rounds))
        shares = {code: call("shares") for code, call in calls.items()}
    peaks = {precision: max(speeds[precision]) for precision in products}
    results = []
    for code, config in configs.items():
        about, rates = told[code], speeds[code]
        flops = count_flops(presets.weightless(about["arguments"]), config.mask.ratio).training
        figures = {
            "flops_per_image": flops,
            "share_of_peak": median(rates) * flops / peaks[about["precision"]],
            "first_step_s": about["first_step_s"],
            "peak_memory": about["peak_memory"],
        }
        results.append(Result(f"{code}, {about['precision']}", tuple(rates), shares[code], figures))
    counts = {result.name: f"{(result.figures['flops_per_image'] or 0) / 1e9:.3g}" for result in results}
    same = len(set(counts.values())) == 1
    flops_text = counts[results[0].name] if same else ", ".join(" ".join(item) for item in counts.items())
    peaks_text = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in peaks.items())
    return Report(
        title=title(configs[OURS], told[OURS]["shape"]),
        results=results,
        notes=[
            f"GFLOP an image, forward and backward, by formula: {flops_text}.",
            f"Peak: the fastest large matrix product of this run, {peaks_text}.",
        ],
        environment={**told[OURS]["environment"], "peak_flops_per_s": peaks},
        settings={code: asdict(config) for code, config in configs.items()},
    )


def measure_data(config: PretrainConfig, options: BenchData, progress: Progress) -> Report:
    """Times the training batches of a run, without the model.

    ConfigError: a peer that cannot read this data. DataError: data that is missing, empty or unreadable.
    """
    runtime = open_runtime(config.device, config.precision, config.threads)
    workers = num_cores() if config.data.num_workers is None else config.data.num_workers
    config = replace(config, data=replace(config.data, num_workers=workers))
    size = model_arguments(config)["input_size"]
    start = time.perf_counter()
    data = open_data(
        config.data, input_size=size, channels=config.model.in_chans, device=runtime.device, progress=progress
    )
    opening = time.perf_counter() - start
    plan = Plan(len(data.train), config.batch_size, config.seed)
    streams: dict[str, Stream] = {OURS: lambda: (batch.images for batch in data.train.train_batches(plan, 0, _ENDLESS))}
    if options.against is not None:
        streams[options.against] = torchvision_batches(data, config, size, runtime)
    skip = 1 + _READY_PER_WORKER * workers
    try:
        speeds = take_turns(
            {name: partial(turn, stream, skip, options.batches, runtime.device) for name, stream in streams.items()},
            options.rounds,
            lambda done: progress("timing batches", done, options.rounds),
        )
    finally:
        data.train.close()
    in_memory = data.train.held is not None
    results = []
    for name, rates in speeds.items():
        figures = {} if name == OURS and in_memory else {"per_worker": median(rates) / max(workers, 1)}
        results.append(Result(name, tuple(rates), figures=figures))
    where = "memory, in this process" if in_memory else f"files (num_workers {workers})"
    return Report(
        title=f"{config.data.source}: {len(data.train):,} images to {' x '.join(map(str, size))}, "
        f"batch {config.batch_size}",
        results=results,
        notes=[f"{OURS} takes images from {where}; {opening:.1f} s to open the data."],
        environment=environment(runtime),
        settings=asdict(config),
    )


def torchvision_batches(data: Data, config: PretrainConfig, size: tuple[int, ...], runtime: Runtime) -> Stream:
    """The same files through Pillow and torchvision's transforms, cropped, flipped and normalised as configured.

    ConfigError: the training images are not separate files.
    """
    from torchvision import transforms

    options = config.data
    paths = [Path(data.train.source.name(i)) for i in range(len(data.train))]
    if not paths[0].is_file():
        raise ConfigError(
            f"torchvision cannot be timed on {paths[0]}", "give --data a folder of image files, or leave out --against"
        )
    bicubic, (scale, ratio, flip) = transforms.InterpolationMode.BICUBIC, options.augmentation(2)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, ratio, bicubic),
            *([transforms.RandomHorizontalFlip()] if flip else []),
            transforms.ToTensor(),
            transforms.Normalize(data.normalisation.mean, data.normalisation.std),
        ]
    )

    def batches() -> Generator[Tensor, None, None]:
        loader: DataLoader[Any] = DataLoader(
            paths,  # type: ignore[arg-type]
            config.batch_size,
            sampler=RandomSampler(paths, replacement=True, num_samples=_ENDLESS),
            num_workers=options.num_workers or 0,
            collate_fn=partial(_read, transform, "L" if data.channels == 1 else "RGB"),
            worker_init_fn=start_worker,
            pin_memory=runtime.device.type == "cuda",
        )
        return (to_device(images, runtime.device) for images in loader)

    return batches


def turn(stream: Stream, skip: int, batches: int, device: torch.device) -> float:
    """Images a second over `batches` batches of a stream, after its first `skip`."""
    with closing(stream()) as running:  # its workers end with it
        for _ in islice(running, skip):
            pass
        synchronise(device)
        start = time.perf_counter()
        images = sum(len(batch) for batch in islice(running, batches))
        synchronise(device)
        return images / (time.perf_counter() - start)


def _read(transform: Callable[[Image.Image], Tensor], mode: str, paths: Sequence[Path]) -> Tensor:
    """A batch of image files, opened by Pillow."""
    return torch.stack([transform(Image.open(path).convert(mode)) for path in paths])


def measure_train(config: PretrainConfig, options: BenchTrain, progress: Progress) -> Report:
    """Times the loop of `torchmae pretrain`, in turns with bare steps on a fixed batch.

    Evaluations and checkpoints, which come a few times a run, are left out. Errors are those of `torchmae pretrain`.
    """
    runtime = open_runtime(config.device, config.precision, config.threads)
    size = model_arguments(config)["input_size"]
    data = open_data(
        config.data, input_size=size, channels=config.model.in_chans, device=runtime.device, progress=progress
    )
    config = replace(config, model=replace(config.model, in_chans=data.channels))
    bare = build(OURS, config)
    bare.first_steps()
    turns = _Turns(bare, options, progress)
    try:
        _run_loop(config, data, turns, options)
    finally:
        data.train.close()
    loop_rates, bare_rates, waits = zip(*turns.rounds, strict=True)
    speed, waited = median(loop_rates) / median(bare_rates), median(waits)
    step = min(speed, 1 - waited)
    bare_shares = bare.shares()
    shares = {name: share * step for name, share in bare_shares.items()}
    shares |= {"data": waited, "loop": max(0.0, 1 - step - waited)}
    return Report(
        title=title(config, bare.images.shape),
        results=[Result(OURS, loop_rates, shares), Result(BARE, bare_rates, bare_shares)],
        notes=[
            f"The loop runs at {speed:.1%} of the speed of the bare step; {waited:.1%} of its time it waits for data, "
            f"from {'memory' if data.train.held is not None else 'files'}."
        ],
        environment=environment(runtime),
        settings=asdict(config),
    )


def _run_loop(config: PretrainConfig, data: Data, turns: _Turns, options: BenchTrain) -> None:
    """Runs the training loop until `turns` has seen enough."""
    steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
    epochs = math.ceil((options.rounds + 2) * options.steps / steps_per_epoch)
    runtime, model = turns.contender.runtime, presets.construct(turns.contender.arguments)
    settings = replace(pretrain_settings(config, model), checkpoint_minutes=math.inf)
    with tempfile.TemporaryDirectory() as place:
        try:
            pretrain(
                settings,
                model=model.to(runtime.device),
                loader=data.train,
                batch_size=config.batch_size,
                epochs=epochs,
                fingerprint=data.fingerprint,
                runtime=runtime,
                folder=RunFolder(Path(place)),
                tracker=turns,
                display=Display("none"),
                evaluators=[Evaluator(epochs * steps_per_epoch // options.steps, turns.evaluate)],
            )
        except _Enough:
            pass
        except Interrupted as error:
            raise Interrupted("the benchmark was stopped", "run it again", error.exit_status - 128) from error


class _Enough(Exception):
    """Ends the loop."""


class _Turns:
    """A tracker, which takes the loop's speed, and an evaluator, which runs bare steps in between.

    The loop's clock stands still while an evaluator runs. The steps before the first evaluation are a warm-up.
    """

    def __init__(self, contender: Contender, options: BenchTrain, progress: Progress) -> None:
        self.contender, self._options, self._progress = contender, options, progress
        self.rounds: list[tuple[float, float, float]] = []  # images/s of loop and bare step, share of time waited
        self._warm = False
        self._clock = 0.0  # the loop's, seconds
        self._parts: list[tuple[float, float, float]] = []  # of this round: seconds, images, seconds waited

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        del step
        if kind == "train":
            seconds, self._clock = values["seconds"] - self._clock, values["seconds"]
            self._parts.append((seconds, seconds * values["images_per_s"], seconds * values["data_wait"]))

    def log_picture(self, name: str, step: int, path: Path) -> None: ...

    def close(self) -> None: ...

    def evaluate(self, step: int) -> dict[str, float]:
        del step
        seconds, images, waited = (sum(column) for column in zip(*self._parts, strict=True))
        self._parts.clear()
        if self._warm:
            self.rounds.append((images / seconds, self.contender.turn(self._options.steps), waited / seconds))
            self._progress("timing the loop", len(self.rounds), self._options.rounds)
        self._warm = True
        if len(self.rounds) == self._options.rounds:
            raise _Enough
        return {}


def take_turns(
    turns: Mapping[str, Callable[[], float]], rounds: int, after_round: Callable[[int], None]
) -> dict[str, list[float]]:
    """The figures of every turn, one a round: other load on the machine slows all of them alike.

    Every second round goes backwards, so that none always comes first. `after_round` takes the number of rounds done.
    """
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds):
        for name in list(turns)[:: 1 if i % 2 == 0 else -1]:
            figures[name].append(turns[name]())
        after_round(i + 1)
    return figures


def title(config: PretrainConfig, shape: Sequence[int]) -> str:
    """What is measured, in a line."""
    size = " x ".join(str(number) for number in shape[1:])
    compiled = ", compiled" if config.compile else ""
    return f"{config.model.preset}, {size}, batch {config.batch_size}, mask {config.mask.ratio:g}{compiled}"
