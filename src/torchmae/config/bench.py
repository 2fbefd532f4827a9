"""Every setting of a benchmark and its default. Light: nothing here imports torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from torchmae.config.base import JsonOption, Range, Settings, Size

Rounds = Annotated[int, Range(1, 10_000)]
StepPeer = Literal["transformers", "timm-blocks", "lightly"]
STEP_PEERS: tuple[str, ...] = get_args(StepPeer)


@dataclass(frozen=True)
class OutputOptions(JsonOption):
    """Where the figures go, beside the table that is printed.

    Attributes:
        plot: a PNG picture of the figures.
    """

    plot: Annotated[Path, ".png"] | None = None


@dataclass(frozen=True)
class BenchStep(Settings):
    """Times one training step on random images.

    Without --recipe, --config and --model.preset: vit_tiny_32_p4 with the default settings.

    Attributes:
        rounds: each gives one figure; the median of all is reported. In a round every contender has its turn.
        steps: training steps of a turn; null: as many as take about a second.
        against: "transformers" (ViTMAEForPreTraining) or "lightly" (its MAE, made of timm's blocks), of the same sizes
            on the same images, as their users run them: fp32 on a processor, bf16 autocast on CUDA; or "timm-blocks":
            torchmae itself, with timm's blocks in place of its own (timm has no MAE).
    """

    rounds: Rounds = 7
    steps: Size | None = None
    against: StepPeer | None = None

    def __post_init__(self) -> None:
        if str(self.against) == "timm":  # an earlier name
            object.__setattr__(self, "against", "timm-blocks")
        super().__post_init__()


@dataclass(frozen=True)
class BenchData(Settings):
    """Times the loading of images: reading, decoding, cropping, batches.

    Attributes:
        rounds: each gives one figure; the median of all is reported. In a round every contender has its turn.
        batches: of a turn, after the first ones, which worker processes have ready when they have started.
        against: "torchvision": Pillow decodes, RandomResizedCrop, flip and normalisation, of the same image files
            with as many workers.
    """

    rounds: Rounds = 5
    batches: Size = 10
    against: Literal["torchvision"] | None = None


@dataclass(frozen=True)
class BenchTrain(Settings):
    """Times the training loop on real data, beside the bare step.

    Attributes:
        rounds: each gives one figure; the median of all is reported. In a round the loop and the bare step take
            turns.
        steps: training steps of a turn.
    """

    rounds: Rounds = 5
    steps: Size = 20
