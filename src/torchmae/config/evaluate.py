"""The settings of `torchmae evaluate` and `torchmae embed`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchmae.config.base import (
    Count,
    DeviceOption,
    Fraction,
    JsonOption,
    Minutes,
    NotNegative,
    Place,
    PositiveShare,
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
Layer = int | str
APPLIES_TO = {
    "layer": ("knn", "linear", "attentive", "segmentation", "anomaly", "all"),
    "labels_per_class": ("knn", "linear", "finetune", "all"),
    "out": ("finetune", "segmentation", "anomaly"),
    "target": ("reconstruction", "anomaly"),
    "resume": ("finetune", "segmentation"),
    "test_data": ("knn", "linear", "attentive", "reconstruction", "finetune", "segmentation", "all"),
    "normal": ("anomaly",),
    "test": ("anomaly",),
    "normal_classes": ("anomaly",),
}
"""The methods of each option that does not apply to all methods."""


@dataclass(frozen=True, kw_only=True)
class LayerOption(Settings):
    """Which layer features are of.

    Attributes:
        layer: number of the block whose output is used, from 0 or, negative, from the end; or last-N: the outputs of
            the last N blocks, concatenated; null: the encoder's output, as -1.
    """

    layer: Layer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, str) and not re.fullmatch(r"last-[1-9]\d{0,3}", self.layer):
            raise ConfigError(f"layer is {self.layer!r}", "give the number of a block, such as 5 or -2, or last-4")


@dataclass(frozen=True)
class ComputeOptions(ProgressOption, DeviceOption):
    """Device, precision and speed.

    Attributes:
        batch_size: images per forward pass.
        precision: precision of the encoder: auto (bf16 where it is faster, else fp32), bf16 or fp32.
        threads: processor threads; null: OMP_NUM_THREADS, else every core.
        rank_timeout: minutes that the ranks of torchrun wait for one that does not start, or gives no sign of life.
    """

    batch_size: Size = 250
    precision: Precision = "auto"
    threads: Threads | None = None
    rank_timeout: Minutes = 10.0


@dataclass(frozen=True)
class AttentiveOptions(Settings, group="attentive."):
    """How the attentive probe is built and trained.

    Attributes:
        queries: number of learned queries, a divisor of the width of the tokens; null: 8, or the divisor next to it.
        epochs: passes over the training images; null: 30, or more to reach 2,000 steps.
        lr: AdamW's peak learning rate, with a warm-up over a tenth of the steps, then a cosine.
        weight_decay: not applied to biases and norms.
        batch_size: images per step.
        memory_limit: GiB for the patch tokens of all training images; if they do not fit, they are encoded again in
            every epoch, and `--method all` leaves this probe out.
    """

    queries: Count | None = None
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
    """The masks and images of the reconstruction metrics.

    Attributes:
        ratios: masked shares of the patches, each in (0, 1).
        strategies: names of mask strategies; null: all strategies of the model.
        images: largest number of test images.
    """

    ratios: tuple[Fraction, ...] = (0.5, 0.75, 0.9)
    strategies: tuple[Strategy, ...] | None = None
    images: Count = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios:
            raise ConfigError("reconstruction.ratios is empty", "give at least one, such as [0.75]")


@dataclass(frozen=True)
class AnomalyOptions(Settings, group="anomaly."):
    """What features of test images are compared with, and what is written.

    Attributes:
        coreset: share of the normal images' patch features that is kept, far from each other (PatchCore's greedy
            coreset); 1: all.
        maps: write the heat map of every test picture, in its own size, into OUT/anomaly_maps.
    """

    coreset: PositiveShare = 0.1
    maps: bool = False


@dataclass(frozen=True)
class EvaluateOptions(LayerOption, TargetOption):
    """Measures what a model learned: nearest neighbours, probes, fine-tuning, segmentation, anomalies.

    Runs on several GPUs with torchrun.

    Attributes:
        method: knn, linear, attentive, reconstruction, finetune (trains a classifier end to end, minutes to hours),
            segmentation (of pictures with masks) or anomaly (of normal images and others, as in MVTec AD); all: knn,
            linear and attentive, beside an untrained network and raw pixels; some of these, such as knn,linear: the
            same with these.
        data: the labelled training images of the probes.
        test_data: the labelled test images: "test" or "val" (a split of the data), "held-out" (some of the training
            images), or a source as for --data; null: the test split, else val, else held-out.
        train_images: number of training images, a fixed subset; null: all.
        test_images: number of test images, a fixed subset; null: all.
        labels_per_class: few-shot: number of training images per class, for knn, linear and finetune.
        draws: few-shot: number of draws, reported as mean and deviation. With finetune each draw is a training.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (concatenated); null: mean
            for knn, all three for linear.
        protocol: linear: "sweep" (logistic regression, its strength chosen on a part of the training images) or
            "paper" (batch norm and a linear layer, LARS, 90 epochs).
        preset: the network if RUN is random, or its input size if RUN is pixels.
        target: reconstruction and anomaly: the training target of others' weights if they do not store it: pixels or
            normalised (patches).
        attentive: how the attentive probe is trained.
        reconstruction: the masks and images of the reconstruction metrics.
        segmentation: what masks mean, and how a segmenter is trained on them.
        anomaly: what features of test images are compared with.
        finetune: how a classifier is trained end to end; its images are flipped if the run's were.
        out: folder for the classifier of finetune (null: RUN/finetune-...) or the results of segmentation and anomaly
            (null: RUN); required if RUN is no folder.
        resume: finetune and segmentation.finetune: continue the training in this folder; without a folder, in `out`.
        normal: anomaly: source of the normal images, its training split; labels are not needed; null: those of data.
        test: anomaly: source of the test images, one folder per class. "good" and the classes of the normal images are
            normal, all others anomalous; null: the test split of data, else some of the normal images and all others.
        normal_classes: anomaly: only these classes are normal, separated by commas.
        seed: seed of the untrained network, draws, masks and initial weights.
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
    anomaly: AnomalyOptions = field(default_factory=AnomalyOptions)
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
        if self.method == "anomaly" and (self.normal is None) != (self.test is None):
            missing = "normal" if self.normal is None else "test"
            raise ConfigError(f"method anomaly has no {missing} images", "give --normal DIR --test DIR, or --data DIR")
        if self.normal is not None and self.data.source is not None:
            raise ConfigError(f"data is {self.data.source!r} and normal {self.normal!r}", "give one of them")
        if self.layer is not None and self.method == "segmentation" and self.segmentation.finetune:
            raise ConfigError("layer is given and segmentation.finetune trains the whole encoder", "leave layer out")
        if self.method == "segmentation" and self.finetune.init == "random":
            problem = "finetune.init is 'random', and segmentation is of the run's weights"
            raise ConfigError(problem, "leave it out: an untrained network is measured beside it")
        for name, methods in APPLIES_TO.items():
            if getattr(self, name) not in (None, False) and not set(self.methods) <= set(methods):
                listed = " or ".join(filter(None, [", ".join(methods[:-1]), methods[-1]]))
                raise ConfigError(f"{name} does not apply to method {self.method!r}", f"use --method {listed}")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, or "all", by name."""
        return tuple(name.strip() for name in self.method.split(","))

    @property
    def with_baselines(self) -> bool:
        """Whether an untrained network and raw pixels are measured too, as with "all"."""
        return self.method == "all" or len(self.methods) > 1


@dataclass(frozen=True, kw_only=True)
class RunOrBaseline(JsonOption, RunArgument):
    """The model or baseline, and the output of figures.

    Attributes:
        run: run folder, exported model, weights of others (also as --init-from), timm:NAME (a vision transformer of
            timm with its pre-trained weights); or random or pixels, with --preset.
    """


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(LayerOption, RunArgument):
    """Writes the features of all images of a data set to a file.

    Nothing is masked. If the command is stopped, run it again to continue. Runs on several GPUs with torchrun.

    Attributes:
        data: the images.
        out: the file to write, .npz or .parquet.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (concatenated), or tokens
            (every patch token).
        split: train, val or test; all: every split of the data.
    """

    data: DataOptions = field(default_factory=DataOptions)
    out: Annotated[Place, ".npz", ".parquet"] = "features.npz"
    pool: Literal["mean", "cls", "both", "tokens"] = "mean"
    split: Literal["train", "val", "test", "all"] = "all"
