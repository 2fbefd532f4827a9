"""The settings of `torchmae bench`."""

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
    """Output of figures besides the printed table.

    Attributes:
        plot: PNG file to draw the figures in.
    """

    plot: Annotated[Path, ".png"] | None = None


@dataclass(frozen=True)
class BenchStep(Settings):
    """Times one training step on random images.

    Without --recipe, --config and --model.preset: vit_tiny_32_p4 with the default settings.

    Attributes:
        rounds: number of rounds, in which the contenders take turns; the median over rounds is reported.
        steps: training steps per turn; null: about one second of steps.
        against: "transformers" (ViTMAEForPreTraining) or "lightly" (its MAE, made of timm's blocks), with the same
            sizes and images, as their users run them: fp32 on a processor, bf16 autocast on CUDA; or "timm-blocks":
            torchmae with timm's blocks instead of its own (timm has no MAE).
    """

    rounds: Rounds = 7
    steps: Size | None = None
    against: StepPeer | None = None


@dataclass(frozen=True)
class BenchData(Settings):
    """Times the loading of images: reading, decoding, cropping, batches.

    Attributes:
        rounds: number of rounds, in which the contenders take turns; the median over rounds is reported.
        batches: batches per turn. The first batches, which worker processes prepare as they start, are not counted.
        against: "torchvision": decoding by Pillow, RandomResizedCrop, flip and normalisation, for the same image files
            and number of workers.
    """

    rounds: Rounds = 5
    batches: Size = 10
    against: Literal["torchvision"] | None = None


@dataclass(frozen=True)
class BenchTrain(Settings):
    """Times the training loop on real data, beside the bare step.

    Attributes:
        rounds: number of rounds, in which the loop and the bare step take turns; the median over rounds is reported.
        steps: training steps per turn.
    """

    rounds: Rounds = 5
    steps: Size = 20
