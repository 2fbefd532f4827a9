"""Every setting of a benchmark and its default. Light: nothing here imports torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchmae.errors import ConfigError, one_of, within

STEP_PEERS = ("transformers", "timm", "lightly")
DATA_PEERS = ("torchvision",)


@dataclass(frozen=True)
class OutputOptions:
    """Where the figures go, beside the table that is printed.

    Attributes:
        json: a file for all figures, rounds, settings, hardware and versions.
        plot: a PNG picture of them.
    """

    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ConfigError(f"plot is {str(self.plot)!r}", "give a name that ends in .png")
        for path in (self.json, self.plot):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"the folder of {path} does not exist", "make it first")


@dataclass(frozen=True)
class StepOptions:
    """How a training step is measured.

    Attributes:
        rounds: each gives one figure; the median of all is reported. In a round every contender has its turn.
        steps: training steps of a turn; null: as many as take about a second.
        against: "transformers" (ViTMAEForPreTraining), "timm" (its blocks, put together as the paper says) or "lightly"
            (its MAE, made of timm's blocks too), of the same sizes on the same images, as their users run them: fp32 on
            a processor, bf16 autocast on CUDA.
    """

    rounds: int = 7
    steps: int | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        within("rounds", self.rounds, 1, 10_000)
        within("steps", self.steps, 1, 1e6)
        if self.against is not None:
            one_of("against", self.against, STEP_PEERS)


@dataclass(frozen=True)
class DataOptions:
    """How the loading of images is measured.

    Attributes:
        rounds: each gives one figure; the median of all is reported. In a round every contender has its turn.
        batches: of a turn, after the first ones, which worker processes have ready when they have started.
        against: "torchvision": Pillow decodes, RandomResizedCrop, flip and normalisation, of the same image files
            with as many workers.
    """

    rounds: int = 5
    batches: int = 10
    against: str | None = None

    def __post_init__(self) -> None:
        within("rounds", self.rounds, 1, 10_000)
        within("batches", self.batches, 1, 1e6)
        if self.against is not None:
            one_of("against", self.against, DATA_PEERS)


@dataclass(frozen=True)
class TrainOptions:
    """How the training loop is measured.

    Attributes:
        rounds: each gives one figure; the median of all is reported. In a round the loop and the bare step take
            turns.
        steps: training steps of a turn.
    """

    rounds: int = 5
    steps: int = 20

    def __post_init__(self) -> None:
        within("rounds", self.rounds, 1, 10_000)
        within("steps", self.steps, 1, 1e6)
