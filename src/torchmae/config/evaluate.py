"""The settings of `torchmae evaluate` and `torchmae embed`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchmae.config.base import (
    Count,
    DeviceOption,
    Fraction,
    JsonOption,
    NotNegative,
    Place,
    Precision,
    ProgressOption,
    Range,
    Rate,
    RunArgument,
    Settings,
    Size,
    TargetOption,
    Threads,
)
from torchmae.config.data import DataOptions
from torchmae.config.finetune import FinetuneConfig
from torchmae.config.pretrain import Preset, Strategy
from torchmae.errors import ConfigError

Method = Literal["all", "knn", "linear", "attentive", "reconstruction", "finetune", "segmentation", "anomaly"]
APPLIES_TO = {
    "labels_per_class": ("knn", "linear", "finetune", "all"),
    "out": ("finetune", "segmentation", "anomaly"),
    "target": ("reconstruction", "anomaly"),
    "resume": ("finetune", "segmentation"),
    "normal": ("anomaly",),
    "test": ("anomaly",),
    "normal_classes": ("anomaly",),
}
"""The methods that an option is for, where it is not for all."""


@dataclass(frozen=True)
class ComputeOptions(ProgressOption, DeviceOption):
    """Where and how fast to compute.

    Attributes:
        batch_size: images that are encoded at a time.
        precision: auto (bf16 where it is faster, else fp32), bf16 or fp32, of the encoder.
        threads: processor threads; null: every core.
    """

    batch_size: Size = 250
    precision: Precision = "auto"
    threads: Threads | None = None


@dataclass(frozen=True)
class AttentiveOptions(Settings, group="attentive."):
    """How the attentive probe is trained.

    Attributes:
        epochs: passes over the training images; null: 30, or as many more as 2,000 steps take.
        lr: AdamW's peak learning rate; it warms up over a tenth of the steps and falls as a cosine.
        weight_decay: not applied to biases and norms.
        batch_size: images per step.
        memory_limit: GiB that the patch tokens of all training images may fill; beyond it they are encoded anew in
            every epoch, and `--method all` leaves this probe out.
    """

    epochs: Size | None = None
    lr: Rate = 3e-3
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    batch_size: Size = 256
    memory_limit: NotNegative = 4.0


@dataclass(frozen=True)
class SegmentationOptions(Settings, group="segmentation."):
    """What masks mean, and how a segmenter is trained on them.

    Attributes:
        finetune: train the encoder and a light decoder end to end, as the options of finetune say (its learning rate,
            epochs, batch size), instead of a linear head on frozen patch tokens.
        blocks: so many last blocks of the encoder, whose patch tokens the head gets one after the other.
        classes: number of classes; ids go from 0 to classes - 1; null: as the masks have them.
        ignore: id of pixels that do not count, such as 255; of masks in colours, 65536 * red + 256 * green + blue.
        threshold: what is above it is foreground, the rest background; for masks with soft edges, 127.
        instances: masks number objects: whatever is above 0 is foreground.
        epochs: passes over the training windows; null: 10, or as many more as 1,000 steps take.
        lr: AdamW's peak learning rate; it warms up over a tenth of the steps and falls as a cosine.
        weight_decay: not applied to biases.
        batch_size: windows per step.
        memory_limit: GiB that the patch tokens of the training windows (fine-tuning: their pixels) may fill; of more
            windows, a fixed and evenly mixed part is learned from.
    """

    finetune: bool = False
    blocks: Count = 1
    classes: Annotated[int, Range(2, 255)] | None = None
    ignore: Annotated[int, Range(0, 2**24 - 1)] | None = None
    threshold: Annotated[int, Range(0, 65534)] | None = None
    instances: bool = False
    epochs: Size | None = None
    lr: Rate = 3e-3
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    batch_size: Size = 32
    memory_limit: NotNegative = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instances and self.threshold is not None:
            raise ConfigError("segmentation.instances and segmentation.threshold are given", "give one of them")


@dataclass(frozen=True)
class ReconstructionOptions(Settings, group="reconstruction."):
    """Which masks the reconstruction is measured under.

    Attributes:
        ratios: shares of the patches that are masked, each in (0, 1).
        strategies: names of mask strategies; null: all that the model has.
        images: test images used, at most.
    """

    ratios: tuple[Fraction, ...] = (0.5, 0.75, 0.9)
    strategies: tuple[Strategy, ...] | None = None
    images: Count = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios:
            raise ConfigError("reconstruction.ratios is empty", "give at least one, such as [0.75]")


@dataclass(frozen=True)
class EvaluateOptions(TargetOption):
    """Measures what a model learned: nearest neighbours, probes, fine-tuning, segmentation, anomalies.

    torchrun starts it on several GPUs.

    Attributes:
        method: knn, linear, attentive, reconstruction, finetune (a classifier trained end to end, for minutes to
            hours), segmentation (of pictures with masks) or anomaly (with --normal DIR --test DIR); or all: knn, linear
            and attentive, beside an untrained network and raw pixels.
        data: the labelled images that probes learn from.
        test_data: the labelled images that are classified: "test" or "val" (that split of the data), "held-out" (some
            of the training images), or what --data takes; null: the test split, else val, else held-out.
        train_images: number of training images, a fixed subset; null: all.
        test_images: number of test images, a fixed subset; null: all.
        labels_per_class: few-shot: number of images of each class to learn from, for knn, linear and finetune.
        draws: few-shot: number of draws, whose mean and deviation are given. With finetune each draw is a training.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (one after the other);
            null: mean for knn, each of them for linear.
        protocol: of linear: "sweep" (logistic regression, its strength chosen on a part of the training images) or
            "paper" (batch norm and a linear layer, LARS, 90 epochs).
        preset: the network when RUN is random or pixels (for the size of its input).
        target: of reconstruction and anomaly: what weights of others were trained to predict, where they do not say:
            pixels or normalised (patches).
        attentive: how the attentive probe is trained.
        reconstruction: which masks the reconstruction is measured under.
        segmentation: what masks mean, and how a segmenter is trained on them.
        finetune: how a classifier is trained end to end; its images are flipped only if the run's were.
        out: folder that finetune makes for the classifier (null: RUN/finetune-...), or that segmentation and anomaly
            write to (null: RUN); to be given where RUN is no folder.
        resume: of finetune and segmentation.finetune: go on with the training in this folder; without a folder, with
            the one in `out`.
        normal: of anomaly: images of what is normal; their training split. It needs no labels.
        test: of anomaly: images to test, in one folder for each class: "good", or a class of the normal ones, is normal
            and any other anomalous.
        normal_classes: of anomaly: take only these classes of the normal images, with commas between them.
        seed: of the untrained network, draws, masks and initial weights.
    """

    method: Method | str = "all"
    data: DataOptions = field(default_factory=DataOptions)
    test_data: Place | None = None
    train_images: Count | None = None
    test_images: Count | None = None
    labels_per_class: Count | None = None
    draws: Annotated[int, Range(1, 1000)] = 5
    pool: Literal["mean", "cls", "both"] | None = None
    protocol: Literal["sweep", "paper"] = "sweep"
    preset: Preset | None = None
    attentive: AttentiveOptions = field(default_factory=AttentiveOptions)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    segmentation: SegmentationOptions = field(default_factory=SegmentationOptions)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    out: Place | None = None
    resume: bool | Place = False
    normal: Place | None = None
    test: Place | None = None
    normal_classes: str | None = None
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.resume, str):
            if self.out not in (None, self.resume):
                raise ConfigError(f"resume is {self.resume!r} and out {self.out!r}", "give one of them")
            object.__setattr__(self, "out", self.resume)
            object.__setattr__(self, "resume", True)
        if self.method == "anomaly" and (self.normal is None or self.test is None):
            missing = " and ".join(name for name in ("normal", "test") if getattr(self, name) is None)
            raise ConfigError(f"method anomaly has no {missing} images", "give --normal DIR --test DIR")
        for name, methods in APPLIES_TO.items():
            if getattr(self, name) not in (None, False) and self.method not in methods:
                listed = " or ".join(filter(None, [", ".join(methods[:-1]), methods[-1]]))
                raise ConfigError(f"{name} does not apply to method {self.method!r}", f"use --method {listed}")


@dataclass(frozen=True, kw_only=True)
class RunOrBaseline(JsonOption, RunArgument):
    """What `torchmae evaluate` measures, and where the figures go.

    Attributes:
        run: run folder, exported model, weights of others (also as --init-from); or random or pixels, with --preset.
    """


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(RunArgument):
    """Writes the features of all images of a data set to a file.

    Nothing is masked. A command that was stopped goes on where it was when it is given again. torchrun starts it on
    several GPUs.

    Attributes:
        data: the images.
        out: the file to write, .npz or .parquet.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (one after the other), or
            tokens (every patch token).
        split: train, val, test, or all: whatever the data has.
    """

    data: DataOptions = field(default_factory=DataOptions)
    out: Annotated[Place, ".npz", ".parquet"] = "features.npz"
    pool: Literal["mean", "cls", "both", "tokens"] = "mean"
    split: Literal["train", "val", "test", "all"] = "all"
