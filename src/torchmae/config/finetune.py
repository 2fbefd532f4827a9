"""The settings of a fine-tuning, with defaults for small and large images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from torchmae.config.base import Count, Momentum, NotNegative, PositiveShare, Range, Rate, Settings, Share
from torchmae.errors import within

Strength = Annotated[float, Range(0, 10)]

SMALL_SIDE = 64
"""The largest longer side of a small image, in pixels."""


class InputSettings(NamedTuple):
    """The settings of `FinetuneConfig` that depend on the model's input."""

    batch_size: int
    crop_scale: tuple[float, float]
    randaugment: int
    mixup: float
    cutmix: float


PAPER = InputSettings(batch_size=1024, crop_scale=(0.08, 1.0), randaugment=9, mixup=0.8, cutmix=1.0)
# Neither a crop of 8% nor strong distortion leaves enough of a small image.
SMALL = InputSettings(batch_size=128, crop_scale=(0.6, 1.0), randaugment=3, mixup=0.8, cutmix=1.0)


@dataclass(frozen=True)
class FinetuneConfig(Settings, group="finetune."):
    """How a classifier is trained end to end. The defaults are the paper's (table 9, ViT-B).

    The value for null, in brackets, depends on the input: the paper's, or a milder one for images of up to 64 pixels.

    Attributes:
        init: "pretrained" weights, or "random" weights: the same network from scratch, for comparison.
        epochs: passes over the labelled images.
        batch_size: images per optimiser step, at most all images (1024; small images 128).
        accumulate: number of micro-batches per batch, to save memory.
        base_lr: learning rate of the head for a batch of 256; the rate used is base_lr * batch_size / 256.
        layer_decay: factor on the learning rate from each layer to the one below it; 1: the same for all.
        betas: AdamW's moment decay rates.
        weight_decay: not applied to biases, norms and the class token.
        warmup: share of all steps over which the rate rises linearly from 0; then it falls as a cosine.
        min_lr: rate at the end, as a share of the peak.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        label_smoothing: share of the target that is spread over all classes.
        mixup: parameter of the Beta distribution for blending images; 0: none (0.8).
        cutmix: parameter of the Beta distribution for the area from another image; 0: none (1). A batch gets either
            mixup or cutmix.
        randaugment: strength of RandAugment's two operations, 0 (none) to 10 (9; small images 3). Values become
            256 levels between those that pictures show black and white.
        crop_scale: range of the random crop's area as a share of the image ([0.08, 1]; small images [0.6, 1]).
        ema: decay of a moving average of the weights, which is evaluated and saved; null: no average.
        evaluations: number of evaluations on the test images, evenly spaced, the last at the end.
        compile: train the classifier with torch.compile.
        checkpoint_minutes: minutes between two checkpoints.
    """

    init: Literal["pretrained", "random"] = "pretrained"
    epochs: Count = 100
    batch_size: Count | None = None
    accumulate: Count = 1
    base_lr: Rate = 1e-3
    layer_decay: PositiveShare = 0.75
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: Strength = 0.05
    warmup: Share = 0.05
    min_lr: Share = 0.0
    drop_path: Momentum = 0.1
    label_smoothing: Momentum = 0.1
    mixup: Strength | None = None
    cutmix: Strength | None = None
    randaugment: Annotated[int, Range(0, 10)] | None = None
    crop_scale: tuple[PositiveShare, PositiveShare] | None = None
    ema: Momentum | None = None
    evaluations: Count = 1
    compile: bool = False
    checkpoint_minutes: NotNegative = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_scale is not None:
            within("finetune.crop_scale", self.crop_scale[0], 0, self.crop_scale[1], open_low=True)

    def for_input(self, input_size: Sequence[int], in_chans: int) -> InputSettings:
        """Fills in null values for a model's input.

        Mixup, cutmix and RandAugment, which torchvision has for pictures only, are off for input without 2 spatial
        axes; RandAugment also without 1 or 3 channels.
        """
        values = (SMALL if max(input_size) <= SMALL_SIDE else PAPER)._asdict()
        if len(input_size) != 2:
            values |= {"mixup": 0.0, "cutmix": 0.0}
        if len(input_size) != 2 or in_chans not in (1, 3):
            values["randaugment"] = 0
        given = {name: getattr(self, name) for name in values}
        return InputSettings(**values | {name: value for name, value in given.items() if value is not None})
