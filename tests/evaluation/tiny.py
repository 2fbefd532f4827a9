"""A network small enough for tests, and digits for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchmae import presets
from torchmae.config import DataConfig, PretrainConfig
from torchmae.config.data import DataOptions
from torchmae.data.layouts import open_splits
from torchmae.data.reading import BadFiles
from torchmae.data.sources import Source, Subset
from torchmae.data.transforms import Normalisation
from torchmae.evaluation.bench import Bench
from torchmae.evaluation.images import EvaluationData, ImageSet, ModelInput
from torchmae.evaluation.subject import Subject, untrained
from torchmae.random import Purpose, permutation
from torchmae.settings import to_yaml
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime
from torchmae.training.saved_model import Description, write_description, write_weights

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, "fp32", 1)
NORMALISATION = Normalisation((0.3,), (0.38,))


def arguments(**overrides: Any) -> dict[str, Any]:
    """Of a network with 16 values a token, of digits."""
    tiny = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
    return presets.arguments("vit_digits", **{**tiny, **overrides})


def subject(**overrides: Any) -> Subject:
    """An untrained network."""
    return untrained(partial(presets.construct, arguments(**overrides)), seed=0, device=CPU)


def some(source: Source, count: int) -> Source:
    """`count` images, evenly mixed."""
    return Subset(source, permutation(0, 0, len(source), Purpose.SUBSET)[:count])


def digits(split: str, count: int) -> ImageSet:
    """Some of the digits."""
    return image_set(some(open_splits("digits")[split], count))


def image_set(source: Source, *, batch_size: int = 50, max_bad: float = 0.5) -> ImageSet:
    """Any images, 8 x 8 for the network."""
    return ImageSet(
        source,
        data=DataOptions(num_workers=0),
        model=ModelInput((8, 8), 1, NORMALISATION, CPU, batch_size),
        normalisation=NORMALISATION,
        bad=BadFiles(len(source), max_bad),
    )


def bench(train: ImageSet, test: ImageSet) -> Bench:
    """What a method is given, of images of ten classes."""
    return Bench(EvaluationData(train, test, tuple("0123456789"), ()), RUNTIME, Display("none"), "run")


def write_run(folder: Path, *, source: str | None = "digits", **overrides: Any) -> Path:
    """The folder of a run on `source` that learned nothing; None: as exported, without config.yaml."""
    folder.mkdir(parents=True)
    if source is not None:
        config = PretrainConfig(data=DataConfig(source=source))
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    model = subject(**overrides).model
    assert model is not None
    description = Description(
        arguments(**overrides), NORMALISATION.mean, NORMALISATION.std, {"strategy": "random", "ratio": 0.75}, None, "0"
    )
    write_description(folder / "model.json", description)
    write_weights(folder / "model.safetensors", model.state_dict())
    return folder
