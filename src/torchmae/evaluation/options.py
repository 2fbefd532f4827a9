"""Every setting of an evaluation and its default. Light: nothing here imports torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchmae.config import ReadOptions
from torchmae.errors import ConfigError, one_of, within
from torchmae.evaluation.finetune_config import FinetuneConfig

POOLS = ("mean", "cls", "both")
UNLIMITED = float("inf")
APPLIES_TO = {
    "labels_per_class": ("knn", "linear", "finetune", "all"),
    "out": ("finetune", "anomaly"),
    "target": ("reconstruction", "anomaly"),
    "resume": ("finetune",),
    "normal": ("anomaly",),
    "test": ("anomaly",),
    "normal_classes": ("anomaly",),
}
"""The methods that an option of an evaluation is for, where it is not for all."""


@dataclass(frozen=True)
class DataOptions(ReadOptions):
    """Where images come from and how they are read.

    Attributes:
        source: what `torchmae pretrain --data` takes: a folder, a file or a name; null: what the run was trained on.
        val_size: how many training images are held out for testing when there is neither a test nor a val split (at
            most a fifth of them): the same ones that pre-training holds out.
        memory_limit: GiB that the decoded images of a split may fill; larger ones are read anew each time.
        num_workers: reader processes when images are not in memory; null: one per core, at most 8.
        max_bad: share of the images that may be unreadable; one more ends the command.
    """

    source: str | None = None
    val_size: int = 2000
    memory_limit: float = 4.0
    num_workers: int | None = None
    max_bad: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        within("data.val_size", self.val_size, 1, UNLIMITED)
        within("data.memory_limit", self.memory_limit, 0, UNLIMITED)
        within("data.num_workers", self.num_workers, 0, 256)
        within("data.max_bad", self.max_bad, 0, 1)


@dataclass(frozen=True)
class ComputeOptions:
    """Where and how fast to compute.

    Attributes:
        batch_size: images that are encoded at a time.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto (bf16 where it is faster, else fp32), bf16 or fp32, of the encoder.
        threads: processor threads; null: every core.
        progress: "auto" (a live line on a terminal, else plain lines), "plain" or "none".
    """

    batch_size: int = 250
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    progress: str = "auto"

    def __post_init__(self) -> None:
        within("batch_size", self.batch_size, 1, 1e6)
        one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        within("threads", self.threads, 1, 1024)
        one_of("progress", self.progress, ("auto", "plain", "none"))


@dataclass(frozen=True)
class AttentiveOptions:
    """How the attentive probe is trained.

    Attributes:
        epochs: passes over the training images; null: 30, or as many more as 2,000 steps take.
        lr: AdamW's peak learning rate; it warms up over a tenth of the steps and falls as a cosine.
        weight_decay: not applied to biases and norms.
        batch_size: images per step.
        memory_limit: GiB that the patch tokens of all training images may fill; beyond it they are encoded anew in
            every epoch, and `--method all` leaves this probe out.
    """

    epochs: int | None = None
    lr: float = 3e-3
    weight_decay: float = 0.05
    batch_size: int = 256
    memory_limit: float = 4.0

    def __post_init__(self) -> None:
        within("attentive.epochs", self.epochs, 1, 1e6)
        within("attentive.lr", self.lr, 0, 10, open_low=True)
        within("attentive.weight_decay", self.weight_decay, 0, 10)
        within("attentive.batch_size", self.batch_size, 1, 1e6)
        within("attentive.memory_limit", self.memory_limit, 0, UNLIMITED)


@dataclass(frozen=True)
class ReconstructionOptions:
    """What is hidden when reconstructions are measured.

    Attributes:
        ratios: shares of the patches that are removed, each in (0, 1).
        strategies: names of mask strategies; null: all that the model has.
        images: test images used, at most.
    """

    ratios: tuple[float, ...] = (0.5, 0.75, 0.9)
    strategies: tuple[str, ...] | None = None
    images: int = 250

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            within("reconstruction.ratios", ratio, 0, 1, open_low=True, open_high=True)
        if not self.ratios:
            raise ConfigError("reconstruction.ratios is empty", "give at least one, such as [0.75]")
        within("reconstruction.images", self.images, 1, UNLIMITED)


@dataclass(frozen=True)
class EvaluateOptions:
    """What `torchmae evaluate` takes beside the run.

    Attributes:
        method: knn, linear, attentive, reconstruction, finetune or anomaly; or all: knn, linear and attentive, beside
            an untrained network and raw pixels (the others have to be asked for).
        data: the labelled images that probes learn from.
        test_data: the labelled images that are classified: "test" or "val" (that split of the data), "held-out" (some
            of the training images), or what --data takes; null: the test split, else val, else held-out.
        train_images: use so many training images, a fixed subset; null: all.
        test_images: use so many test images, a fixed subset; null: all.
        labels_per_class: few-shot: learn from so many images of each class, for knn, linear and finetune.
        draws: few-shot: how many times they are drawn; mean and deviation are given. With finetune each draw is a
            training of its own.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (one after the other);
            null: mean for knn, each of them for linear.
        protocol: of linear: "sweep" (logistic regression, its strength chosen on a part of the training images) or
            "paper" (batch norm and a linear layer, LARS, 90 epochs).
        preset: the network when RUN is random or pixels (for the size of its input).
        target: of reconstruction and anomaly: what weights of others were trained to predict, where they do not say:
            pixels or normalised (patches).
        attentive: how the attentive probe is trained.
        reconstruction: what is hidden.
        finetune: how a classifier is trained end to end; its images are flipped only if the run's were.
        out: folder that finetune makes for the classifier (null: RUN/finetune-...), or that anomaly writes to (null:
            RUN); to be given where RUN is no folder.
        resume: of finetune: go on with the training in that folder.
        normal: of anomaly: images of what is normal; their training split. It needs no labels.
        test: of anomaly: images to test, in one folder for each class: "good", or a class of the normal ones, is normal
            and any other anomalous.
        normal_classes: of anomaly: take only these classes of the normal images, with commas between them.
        seed: of the untrained network, of draws, masks, and whatever starts at random.
    """

    method: str = "all"
    data: DataOptions = field(default_factory=DataOptions)
    test_data: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    labels_per_class: int | None = None
    draws: int = 5
    pool: str | None = None
    protocol: str = "sweep"
    preset: str | None = None
    target: str | None = None
    attentive: AttentiveOptions = field(default_factory=AttentiveOptions)
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    out: str | None = None
    resume: bool = False
    normal: str | None = None
    test: str | None = None
    normal_classes: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pool is not None:
            one_of("pool", self.pool, POOLS)
        one_of("protocol", self.protocol, ("sweep", "paper"))
        for name in ("train_images", "test_images", "labels_per_class"):
            within(name, getattr(self, name), 1, UNLIMITED)
        within("draws", self.draws, 1, 1000)
        within("seed", self.seed, 0, 2**63 - 1)
        if self.method == "anomaly" and (self.normal is None or self.test is None):
            missing = " and ".join(name for name in ("normal", "test") if getattr(self, name) is None)
            raise ConfigError(f"method anomaly has no {missing} images", "give --normal DIR --test DIR")
        for name, methods in APPLIES_TO.items():
            if getattr(self, name) not in (None, False) and self.method not in methods:
                listed = " or ".join(filter(None, [", ".join(methods[:-1]), methods[-1]]))
                raise ConfigError(f"{name} does not apply to method {self.method!r}", f"use --method {listed}")


@dataclass(frozen=True)
class EmbedOptions:
    """What `torchmae embed` takes beside the run.

    Attributes:
        data: the images.
        out: the file to write, .npz or .parquet.
        pool: features of an image: mean (of its patch tokens), cls (the class token), both (one after the other), or
            tokens (every patch token).
        split: train, val, test, or all: whatever the data has.
    """

    data: DataOptions = field(default_factory=DataOptions)
    out: str = "features.npz"
    pool: str = "mean"
    split: str = "all"

    def __post_init__(self) -> None:
        one_of("pool", self.pool, (*POOLS, "tokens"))
        one_of("split", self.split, ("train", "val", "test", "all"))
        if not self.out.endswith((".npz", ".parquet")):
            raise ConfigError(f"out is {self.out!r}", "give a name that ends in .npz or .parquet")
