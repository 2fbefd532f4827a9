"""Loading alone: images a second that are read, decoded, cropped and put into batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from torchmae.bench.contenders import OURS, model_arguments
from torchmae.bench.results import Report, Result
from torchmae.bench.timing import synchronise, take_turns
from torchmae.config import PretrainConfig
from torchmae.config.bench import BenchData
from torchmae.data.formats import Progress
from torchmae.data.loader import Plan, start_worker
from torchmae.data.opening import Data, open_data
from torchmae.data.transforms import to_device
from torchmae.errors import ConfigError
from torchmae.threads import num_cores
from torchmae.training.runtime import Runtime, environment, open_runtime

ENDLESS = 1_000_000_000
"""More steps, or images, than anyone waits for."""

_READY_PER_WORKER = 2  # batches that a DataLoader has its workers prepare ahead


def measure_data(config: PretrainConfig, options: BenchData, progress: Progress) -> Report:
    """Times the training batches of a run, up to where the model would take them.

    Args:
        config: data, batch size and the model's input.
        options: how to measure.
        progress: told how far it is.

    Raises:
        ConfigError: a peer that cannot read this data.
        DataError: data that is missing, empty or unreadable.
    """
    runtime = open_runtime(config.device, config.precision, config.threads)
    workers = num_cores() if config.data.num_workers is None else config.data.num_workers
    config = replace(config, data=replace(config.data, num_workers=workers))
    arguments = model_arguments(config)
    size = arguments["input_size"]
    start = time.perf_counter()
    data = open_data(
        config.data, input_size=size, channels=config.model.in_chans, device=runtime.device, progress=progress
    )
    opening = time.perf_counter() - start
    streams: dict[str, Callable[[], Generator[Tensor, None, None]]] = {OURS: lambda: our_batches(data, config)}
    if options.against is not None:
        paths = image_files(data)
        streams[options.against] = lambda: torchvision_batches(paths, data, config, size, runtime)
    skip = 1 + _READY_PER_WORKER * workers
    try:
        speeds = take_turns(
            {name: turn(stream, skip, options.batches, runtime.device) for name, stream in streams.items()},
            options.rounds,
            lambda done: progress("timing batches", done, options.rounds),
        )
    finally:
        data.train.close()
    in_memory = data.train.in_memory
    results = []
    for name, rates in speeds.items():
        from_files = name != OURS or not in_memory
        figures = {"per_worker": median(rates) / max(workers, 1)} if from_files else {}
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


def our_batches(data: Data, config: PretrainConfig) -> Generator[Tensor, None, None]:
    """The training images of a run, epoch after epoch, in batches on the device."""
    plan = Plan(len(data.train), config.batch_size, config.seed)
    for batch in data.train.train_batches(plan, 0, ENDLESS):
        yield batch.images


def torchvision_batches(
    paths: Sequence[Path], data: Data, config: PretrainConfig, size: tuple[int, ...], runtime: Runtime
) -> Generator[Tensor, None, None]:
    """The same files through Pillow and torchvision's transforms, cropped, flipped and normalised as configured."""
    from torchvision import transforms

    options = config.data
    steps: list[Any] = [
        transforms.RandomResizedCrop(
            size, options.crop_scale, options.crop_ratio, transforms.InterpolationMode.BICUBIC
        ),
        *([transforms.RandomHorizontalFlip()] if options.flip else []),
        transforms.ToTensor(),
        transforms.Normalize(data.normalisation.mean, data.normalisation.std),
    ]
    files = _Files(paths, transforms.Compose(steps), "L" if data.channels == 1 else "RGB")
    loader = DataLoader(
        files,
        batch_size=config.batch_size,
        sampler=RandomSampler(files, replacement=True, num_samples=ENDLESS),
        num_workers=options.num_workers or 0,
        worker_init_fn=start_worker,
        pin_memory=runtime.device.type == "cuda",
    )
    for images in loader:
        yield to_device(images, runtime.device)


def image_files(data: Data) -> list[Path]:
    """The files of the training images.

    Raises:
        ConfigError: they are not image files of their own.
    """
    paths = [Path(data.train.source.name(i)) for i in range(len(data.train))]
    if not paths[0].is_file():
        raise ConfigError(
            f"torchvision cannot be timed on {paths[0]}", "give --data a folder of image files, or leave out --against"
        )
    return paths


def turn(
    stream: Callable[[], Generator[Tensor, None, None]], skip: int, batches: int, device: torch.device
) -> Callable[[], float]:
    """A function that starts a stream of batches, passes over `skip` of them and times the next `batches`.

    It returns images a second.
    """

    def run() -> float:
        running = stream()
        try:
            for _ in islice(running, skip):
                pass
            synchronise(device)
            start = time.perf_counter()
            images = sum(len(batch) for batch in islice(running, batches))
            synchronise(device)
            return images / (time.perf_counter() - start)
        finally:
            running.close()

    return run


class _Files(Dataset[Tensor]):
    """Image files, opened by Pillow."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor], mode: str) -> None:
        self._paths, self._transform, self._mode = paths, transform, mode

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._paths[index]) as image:
            return self._transform(image.convert(self._mode))
