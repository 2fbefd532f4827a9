"""Every setting of a pre-training run and its default: the single place where a default lives.

Plain frozen dataclasses; the command line, YAML files and `torchmae.pretrain` are all made of them. Order of
precedence: these defaults < recipe < --config file < options.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torchmae.errors import ConfigError, one_of, within

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class ReadOptions:
    """How data is opened and read, in every command the same.

    Attributes:
        root: where data sets that go by name are kept and downloaded to.
        axes: what the axes of one sample in an array are, a letter each: C for channels, any other (L, H, W, Z, Y, X,
            T) for space and time, such as HWC, CHW, LC, CL, ZYX or TYXC; null: as the shape suggests, where it has one
            reading only.
        pages: of a TIFF with several pages, the "first", "all" (each page is a sample) or a "stack" (all of them are
            one sample with an axis more).
        truncated: what becomes of a JPEG without its last rows: "skip" counts it as unreadable, "keep" takes the rows
            that are there, and grey for the others.
        max_megapixels: pixels, in millions, above which a picture is refused; a JPEG up to ten times as large is read
            at a fraction of its size.
        nodata: a value that means "nothing measured", such as -9999; such places, and those that are not finite
            numbers, get the mean of their channel in the same sample; "nan": those alone; null: there is none.
        member: which picture of tar samples with several: what stands behind the dot after the sample's key ("jpg",
            "seg.png"), or "all" (each picture is a sample); null: no sample has several.
        scale: for each type of stored values, the one that stands for 1; null: 255 for uint8, 65535 for uint16, and
            1 for all others, which are taken as they are.
    """

    root: str = "data"
    axes: str | None = None
    pages: Literal["first", "all", "stack"] = "first"
    truncated: Literal["skip", "keep"] = "skip"
    max_megapixels: float = 100.0
    nodata: float | Literal["nan"] | None = None
    member: str | None = None
    scale: dict[str, float] | None = None

    def filled_from(self, other: ReadOptions) -> dict[str, Any]:
        """The options that are left at their defaults here, as `other` has them."""
        default = ReadOptions()
        names = [item.name for item in fields(ReadOptions) if getattr(self, item.name) == getattr(default, item.name)]
        return {name: getattr(other, name) for name in names}

    def __post_init__(self) -> None:
        one_of("data.pages", self.pages, ("first", "all", "stack"))
        one_of("data.truncated", self.truncated, ("skip", "keep"))
        within("data.max_megapixels", self.max_megapixels, 0, float("inf"), open_low=True)
        if self.axes is not None:
            object.__setattr__(self, "axes", self.axes.upper().removeprefix("N"))
            letters = set(self.axes)
            if not self.axes.isalpha() or len(letters) < len(self.axes) or not 1 <= len(letters - {"C"}) <= 3:
                raise ConfigError(
                    f"data.axes is {self.axes!r}", "give a letter for each axis of a sample, such as HWC, CL or ZYX"
                )
        if self.scale is not None and not isinstance(self.scale, dict):
            raise ConfigError(f"data.scale is {self.scale!r}", 'give a number for each type, such as {"uint16": 4095}')
        for kind, top in (self.scale or {}).items():
            one_of("data.scale", kind, ("uint8", "uint16", "float32"))
            within(f"data.scale of {kind}", top, 0, float("inf"), open_low=True)


@dataclass(frozen=True)
class DataConfig(ReadOptions):
    """What to train on.

    Attributes:
        source: "digits", a folder of images (class sub-folders give labels), a pattern ('photos/**/*.jpg'), a .csv or
            .txt list, .parquet or .tar files (also a folder, or the URL, of them), a .npy, .npz, .h5 or .zarr array, a
            torchvision set by name (cifar10, stl10, ...), or hf: and what the `datasets` library loads (docs/data.md).
        val: held-out images: "auto" (the data's own val split, else val_size of the training images), "none",
            the name of a split ("test"), or a path (its training split).
        val_size: how many training images "auto" holds out when there is no val split; at most a fifth of them.
        cache: "memory" keeps decoded images as integers, "device" keeps them in the GPU's memory, "none" reads files
            in workers, "auto" decides by size.
        memory_limit: GiB that "auto" may fill.
        num_workers: reader processes when images are not in memory; null: one per core, at most 8.
        crop_scale: area of the random crop as a share of the image, from and to (RandomResizedCrop).
        crop_ratio: aspect ratio of the crop, relative to the model's input, from and to.
        flip: mirror left and right half of the time.
        mean: per-channel mean of values in [0, 1] that is subtracted; null: computed from a sample.
        std: per-channel deviation that is divided by; null: computed from a sample.
        repeats: views (crop, flip, mask) of an image that follow each other, for one decoding: those that it would
            have in so many epochs. Their number stays the same; batches are less varied. Epochs are a multiple of it.
        max_bad: share of the files that may be unreadable: each is skipped, counted and named, and one more ends the
            run; 0: none may.
        allow_change: go on with a run whose training images are no longer those it began with.
    """

    source: str = "digits"
    val: str = "auto"
    val_size: int = 2000
    cache: str = "auto"
    memory_limit: float = 4.0
    num_workers: int | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    repeats: int = 1
    max_bad: float = 0.01
    allow_change: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.cache", self.cache, ("auto", "memory", "device", "none"))
        within("data.val_size", self.val_size, 1, float("inf"))
        within("data.memory_limit", self.memory_limit, 0, float("inf"))
        within("data.num_workers", self.num_workers, 0, 256)
        within("data.repeats", self.repeats, 1, 1000)
        within("data.max_bad", self.max_bad, 0, 1)
        within("data.crop_scale", self.crop_scale[0], 0, self.crop_scale[1], open_low=True)
        within("data.crop_scale", self.crop_scale[1], 0, 1, open_low=True)
        within("data.crop_ratio", self.crop_ratio[0], 0, self.crop_ratio[1], open_low=True)
        for value in self.std or ():
            within("data.std", value, 0, float("inf"), open_low=True)
        if (self.mean is None) != (self.std is None):
            raise ConfigError("only one of data.mean and data.std is given", "give both, or neither to compute them")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ConfigError(
                f"data.mean has {len(self.mean)} values and data.std {len(self.std)}", "give both one for each channel"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The network. Null takes the preset's value.

    Attributes:
        preset: a named model: vit_tiny, vit_small, vit_base, vit_large, vit_huge (224 px), vit_tiny_32_p4,
            vit_tiny_32_p2 (32 px), vit_digits (8 px, patch 2), or mlp (the tutorial's fully connected one).
        input_size: image size in pixels, height and width ([224, 224]); 1 to 3 numbers, or one for a square.
        patch_size: patch size in pixels, likewise.
        in_chans: channels; null: what the data has.
        embed_dim: encoder width.
        depth: encoder blocks.
        num_heads: encoder attention heads.
        mlp_ratio: hidden width of a block's MLP over its width.
        class_token: prepend a class token.
        registers: further learned tokens that stand for no patch; 0: none.
        drop_path: stochastic depth rate of the encoder's last block, rising linearly from 0.
        decoder: "self" (the paper's) or "cross" (CrossMAE's: masked patches attend to visible ones only).
        decoder_embed_dim: decoder width.
        decoder_depth: decoder blocks.
        decoder_num_heads: decoder attention heads.
        norm_pix: predict patches normalised by their own mean and deviation (the paper's better target).
        predict_ratio: share of the masked patches that a training step predicts (CrossMAE; needs decoder "cross").
        feature_weights: the "cross" decoder's blocks read learned mixtures of all the encoder's layers (CrossMAE).
        hog_weight: weight of a second loss in training, predicted histograms of gradients (MaskFeat's target); 2-D.
        hidden_dim: width of the mlp preset's one hidden layer.
        output_relu: end the mlp preset in a ReLU, as the tutorial does (negative targets are out of reach).
        loss_on: "hidden" values only, or "all" values; the mlp preset's loss.
    """

    preset: str = "vit_digits"
    input_size: int | tuple[int, ...] | None = None
    patch_size: int | tuple[int, ...] | None = None
    in_chans: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    class_token: bool | None = None
    registers: int | None = None
    drop_path: float | None = None
    decoder: str | None = None
    decoder_embed_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    norm_pix: bool | None = None
    predict_ratio: float | None = None
    feature_weights: bool | None = None
    hog_weight: float | None = None
    hidden_dim: int | None = None
    output_relu: bool | None = None
    loss_on: str | None = None


STRATEGIES = ("random", "block", "grid", "cells2", "cells4", "elements", "elements_inverted")
"""Every encoder's mask strategies, named here too since this module is loaded without torch; a test compares them."""


@dataclass(frozen=True)
class MaskConfig:
    """What is hidden.

    Attributes:
        strategy: "random" patches (the paper's), "block" (contiguous), "grid" (evenly spread), "cells2" or "cells4"
            (random cells of 2 or 4 patches along each axis, which leave larger holes); for the mlp preset "elements"
            (each value alone) or "elements_inverted" (the tutorial's: hides 1 - ratio).
        ratio: share of the patches that is removed, in (0, 1).
        final_ratio: the share at the end of the run, reached in a straight line from `ratio`; null: it stays.
    """

    strategy: str = "random"
    ratio: float = 0.75
    final_ratio: float | None = None

    def __post_init__(self) -> None:
        one_of("mask.strategy", self.strategy, STRATEGIES)
        within("mask.ratio", self.ratio, 0, 1, open_low=True, open_high=True)
        within("mask.final_ratio", self.final_ratio, 0, 1, open_low=True, open_high=True)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule (paper, table 8).

    Attributes:
        name: "adamw", "adam" (no decoupled decay), or "muon" (orthogonalised momentum for the hidden matrices,
            AdamW for the rest).
        base_lr: learning rate for a global batch of 256; the rate used is base_lr * batch_size / 256.
        lr: the learning rate itself, whatever the batch; null: from base_lr.
        muon_lr: learning rate of the hidden matrices with "muon", matched to AdamW's update size.
        betas: AdamW's moment decay rates.
        weight_decay: not applied to biases, norms, class token, mask token.
        schedule: "cosine" (to min_lr) or "constant", after the warm-up.
        warmup: share of all steps over which the rate rises linearly from 0.
        min_lr: rate at the end, as a share of the peak.
        clip_grad: largest gradient norm; null: no clipping.
    """

    name: str = "adamw"
    base_lr: float = 1.5e-4
    lr: float | None = None
    muon_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.05
    min_lr: float = 0.0
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, ("adamw", "adam", "muon"))
        one_of("optim.schedule", self.schedule, ("cosine", "constant"))
        within("optim.base_lr", self.base_lr, 0, 10, open_low=True)
        within("optim.lr", self.lr, 0, 10, open_low=True)
        within("optim.muon_lr", self.muon_lr, 0, 10, open_low=True)
        within("optim.weight_decay", self.weight_decay, 0, 10)
        within("optim.warmup", self.warmup, 0, 1)
        within("optim.min_lr", self.min_lr, 0, 1)
        within("optim.clip_grad", self.clip_grad, 0, float("inf"), open_low=True)
        for beta in self.betas:
            within("optim.betas", beta, 0, 1, open_high=True)


@dataclass(frozen=True)
class EvalConfig:
    """What is measured while training, on held-out images under one fixed mask.

    Attributes:
        count: how many times, evenly spread, the last at the end.
        images: held-out images used, at most.
        knn_count: how many times kNN and the linear probe are run, likewise, where labels exist; `count` at most.
        knn_train: labelled training images that vote, at most.
        knn_val: held-out images that are classified, at most.
        linear_train: of the images that vote, those that the linear probe learns from, at most; 0: no linear probe.
        pictures: images in each reconstruction picture.
    """

    count: int = 10
    images: int = 1000
    knn_count: int = 2
    knn_train: int = 10000
    knn_val: int = 5000
    linear_train: int = 2000
    pictures: int = 8

    def __post_init__(self) -> None:
        for name in ("count", "images", "knn_train", "knn_val", "pictures"):
            within(f"eval.{name}", getattr(self, name), 1, float("inf"))
        within("eval.knn_count", self.knn_count, 0, float("inf"))
        within("eval.linear_train", self.linear_train, 0, float("inf"))


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run.

    Attributes:
        recipe: the named set of values that this run started from (see `torchmae recipes`); "auto" chooses by
            the data.
        data: what to train on.
        model: the network.
        mask: what is hidden.
        optim: the optimiser and its schedule.
        eval: what is measured on the way.
        init_from: weights to start from: a run, an exported model, or others' (a released MAE checkpoint, timm's,
            transformers'; FILE#PART takes one of several encoders in a file); the shape of the network is then theirs.
            Null: random weights.
        out: the run folder; null: runs/<recipe>-<time>.
        epochs: passes over the training images.
        max_minutes: minutes of training steps; the speed of the first steps fixes how many there are (validation
            and start-up come on top). Replaces epochs.
        batch_size: images per optimiser step, over all ranks and accumulation.
        fit_batch: take the largest batch that fits on the GPU, a power of two images on each, in place of
            batch_size; `--batch auto` for short.
        start_size: train on smaller images first, of so many pixels along each axis (the patch divides it); null: no.
        start_share: the share of the run's steps that they take, in (0, 1).
        accumulate: parts that each rank's share of a batch is computed in, one after the other, to save memory.
        seed: of weights, order, crops, flips and masks.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto (bf16 where it is faster, else fp32), bf16 or fp32.
        threads: processor threads; null: every core.
        compile: run the model through torch.compile.
        parallel: how the ranks that torchrun starts share the work: "ddp" (each has the whole model) or "fsdp" (each
            holds a part of every weight, for models that do not fit on one GPU).
        compress_gradients: exchange gradients in bf16 ("ddp" only).
        checkpoint_activations: keep only each block's input for the backward pass and compute the rest again: a third
            more work, a fraction of the memory.
        activation_memory_budget: of a compiled model: the share of the activations that is kept, in [0, 1]; the
            compiler has the rest computed again, the cheapest first.
        max_skipped: steps in a row whose loss or gradient is not finite, each left out, at which the run goes back to
            its last checkpoint and halves the learning rate.
        log_every: optimiser steps between two lines of progress.
        checkpoint_minutes: minutes between two checkpoints; the last two are kept.
        progress: "auto" (a live line on a terminal, else plain lines), "plain", "epochs" (one line an epoch on
            standard output) or "none".
        trackers: where figures and pictures go besides the run folder: "auto" (TensorBoard where it is installed),
            "none", or tensorboard, wandb (Weights & Biases) and trackio, joined by commas.
    """

    recipe: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init_from: str | None = None
    out: str | None = None
    epochs: int = 100
    max_minutes: float | None = None
    batch_size: int = 256
    fit_batch: bool = False
    start_size: int | tuple[int, ...] | None = None
    start_share: float = 0.5
    accumulate: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    compile: bool = False
    parallel: str = "ddp"
    compress_gradients: bool = False
    checkpoint_activations: bool = False
    activation_memory_budget: float = 1.0
    max_skipped: int = 3
    log_every: int = 10
    checkpoint_minutes: float = 5.0
    progress: str = "auto"
    trackers: str = "auto"

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        trackers = [name.strip() for name in self.trackers.split(",")]
        for name in trackers:
            one_of("trackers", name, TRACKERS if len(trackers) > 1 else ("auto", "none", *TRACKERS))
        one_of("parallel", self.parallel, ("ddp", "fsdp"))
        one_of("progress", self.progress, ("auto", "plain", "epochs", "none"))
        within("epochs", self.epochs, 1, 1e6)
        within("max_minutes", self.max_minutes, 0, 1e6, open_low=True)
        within("batch_size", self.batch_size, 1, 1e6)
        within("accumulate", self.accumulate, 1, self.batch_size)
        within("start_share", self.start_share, 0, 1, open_low=True, open_high=True)
        sizes = self.start_size if isinstance(self.start_size, tuple) else (self.start_size,)
        for size in sizes:
            within("start_size", size, 1, float("inf"))
        within("seed", self.seed, 0, 2**64 - 1)
        within("threads", self.threads, 1, 1024)
        within("activation_memory_budget", self.activation_memory_budget, 0, 1)
        if self.activation_memory_budget < 1 and not self.compile:
            raise ConfigError(
                f"activation_memory_budget is {self.activation_memory_budget:g}, and only a compiled model has one",
                "add --compile true, or use --checkpoint_activations true",
            )
        if self.max_minutes is None and self.epochs % self.data.repeats:
            raise ConfigError(
                f"{self.epochs} epochs cannot be divided by data.repeats {self.data.repeats}: some images would be "
                "seen more often than others",
                f"use --epochs {(self.epochs // self.data.repeats + 1) * self.data.repeats}",
            )
        within("max_skipped", self.max_skipped, 1, float("inf"))
        within("log_every", self.log_every, 1, float("inf"))
        within("checkpoint_minutes", self.checkpoint_minutes, 0, float("inf"))
