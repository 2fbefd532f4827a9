"""The settings of a pre-training run and their defaults. Order of precedence: defaults < recipe < file < options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from torchmae.config.base import (
    Count,
    Device,
    Fraction,
    JsonOption,
    Minutes,
    Momentum,
    NotNegative,
    Place,
    Positive,
    PositiveShare,
    Precision,
    Range,
    Rate,
    Settings,
    Share,
    Size,
    Threads,
)
from torchmae.config.data import DataOptions
from torchmae.errors import ConfigError, one_of, within

Preset = Literal[
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "vit_tiny_32_p4",
    "vit_tiny_32_p2",
    "vit_digits",
    "convnext_atto",
    "convnext_32",
    "mlp",
    "own",
]
Strategy = Literal["random", "block", "grid", "cells2", "cells4", "elements", "elements_inverted", "own"]
OWN: Final = "own"
"""The value of a setting whose object was handed over in Python (docs/extending.md)."""
TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")


@dataclass(frozen=True)
class DataConfig(DataOptions, group="data."):
    """The training images and how they are augmented.

    Attributes:
        source: "digits", a folder of images (class sub-folders give labels), a pattern ('photos/**/*.jpg'), a .csv or
            .txt list, .parquet or .tar files (also a folder or URL of such files), a .npy, .npz, .h5 or .zarr array, a
            torchvision set by name (cifar10, stl10, ...), or hf:NAME from the `datasets` library (docs/data.md).
        val: held-out images: "auto" (the data's val split, else val_size of the training images), "none", "held-out"
            (val_size training images), the name of a split ("test"), or a path (its training split).
        cache: "memory" keeps decoded images as integers, "device" keeps them in the GPU's memory, "none" reads files
            in workers, "auto" decides by size and `memory_limit`.
        crop_scale: range of the random crop's area as a share of the image (RandomResizedCrop); null: [0.2, 1] for
            images, [0.8, 1] for signals, spectrograms, volumes and clips, whose scale and tempo mean something.
        crop_ratio: range of the crop's aspect ratio, relative to the model's input.
        flip: mirror the last axis of half of the samples; null: true for pictures, false for medical ones (DICOM,
            NIfTI), signals, spectrograms, volumes and clips.
        normalise: "dataset" (mean and deviation of each channel over the training images; values far beyond the 0.5th
            and 99.5th percentile are clipped unless they are 8-bit or shares of 1), "sample" (those of each crop or
            window, which takes away its brightness or amplitude), or "none" (values divided by `scale` alone).
        mean: mean of each channel, of values divided by `scale`, to subtract; null: computed from a sample.
        std: standard deviation of each channel to divide by; null: computed from a sample.
        repeats: repeated augmentation: views (crop, flip, mask) per decoded image. The number of views in the run does
            not change, but batches are less varied. It must divide the number of epochs.
        allow_change: continue a run although its training images have changed.
    """

    source: Place = "digits"
    val: Place = "auto"
    cache: Literal["auto", "memory", "device", "none"] = "auto"
    crop_scale: tuple[PositiveShare, PositiveShare] | None = None
    crop_ratio: tuple[Positive, float] = (0.75, 1.3333)
    flip: bool | None = None
    normalise: Literal["dataset", "sample", "none"] = "dataset"
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    repeats: Annotated[int, Range(1, 1000)] = 1
    allow_change: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_scale is not None:
            within("data.crop_scale", self.crop_scale[0], 0, self.crop_scale[1], open_low=True)
        within("data.crop_ratio", self.crop_ratio[0], 0, self.crop_ratio[1], open_low=True)
        if (self.mean is None) != (self.std is None):
            raise ConfigError("only one of data.mean and data.std is given", "give both, or neither to compute them")
        if self.mean is not None and self.normalise != "dataset":
            problem = f"data.mean is given and data.normalise is {self.normalise!r}, which has no use for it"
            raise ConfigError(problem, "leave one of them out")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ConfigError(
                f"data.mean has {len(self.mean)} values and data.std {len(self.std)}", "give both one for each channel"
            )

    def augmentation(self, axes: int, form: str = "") -> tuple[tuple[float, float], tuple[float, float], bool]:
        """`crop_scale`, `crop_ratio` and `flip` for samples with so many spatial axes, of a format by name."""
        scale = self.crop_scale or ((0.2, 1.0) if axes == 2 and form != "spectrogram" else (0.8, 1.0))
        mirrored = axes == 2 and form not in ("DICOM", "NIfTI", "spectrogram")
        return scale, self.crop_ratio, mirrored if self.flip is None else self.flip


@dataclass(frozen=True)
class ModelConfig(Settings, group="model."):
    """The network; null takes the preset's value.

    Attributes:
        preset: a named model: vit_tiny, vit_small, vit_base, vit_large, vit_huge (224 px), vit_tiny_32_p4,
            vit_tiny_32_p2 (32 px), vit_digits (8 px, patch 2), convnext_atto (ConvNeXt V2, 224 px), convnext_32
            (32 px), mlp (the tutorial's fully connected network); own: a model handed over in Python.
        input_size: image size in pixels, height and width ([224, 224]); 1 to 3 numbers, or one number for all axes.
        patch_size: patch size in pixels, in the same form.
        in_chans: number of channels; null: the data's.
        embed_dim: encoder width.
        depth: number of encoder blocks.
        num_heads: number of encoder attention heads.
        depths: convnext presets: number of blocks of each stage ([2, 2, 6, 2]).
        dims: convnext presets: number of channels of each stage.
        mlp_ratio: hidden width of a block's MLP over its width.
        class_token: prepend a class token.
        registers: number of register tokens: learned tokens that belong to no patch.
        drop_path: stochastic depth rate of the encoder's last block, rising linearly from 0.
        decoder: "self" (the paper's) or "cross" (CrossMAE's: masked patches attend to visible ones only).
        decoder_embed_dim: decoder width.
        decoder_depth: number of decoder blocks.
        decoder_num_heads: number of decoder attention heads.
        norm_pix: predict patches normalised by their own mean and deviation (the paper's better target).
        predict_ratio: share of the masked patches that a training step predicts (CrossMAE; needs decoder "cross").
        feature_weights: blocks of the "cross" decoder read learned mixtures of all encoder layers (CrossMAE).
        hog_weight: weight of a second training loss on histograms of gradients (MaskFeat's target); 2-D only.
        teacher: frozen network for a further training loss on its patch features: a run, an exported model, others'
            weights, or timm:NAME, a vision transformer of timm with its pre-trained weights; null: none.
        teacher_weight: weight of the teacher's loss.
        hidden_dim: mlp preset: width of the hidden layer.
        output_relu: mlp preset: end in a ReLU, as in the tutorial (negative values cannot be predicted).
        loss_on: mlp preset: loss on "hidden" (masked) values only, or on "all" values.
    """

    preset: Preset = "vit_digits"
    input_size: int | tuple[int, ...] | None = None
    patch_size: int | tuple[int, ...] | None = None
    in_chans: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    depths: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    mlp_ratio: float | None = None
    class_token: bool | None = None
    registers: int | None = None
    drop_path: float | None = None
    decoder: Literal["self", "cross"] | None = None
    decoder_embed_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    norm_pix: bool | None = None
    predict_ratio: float | None = None
    feature_weights: bool | None = None
    hog_weight: float | None = None
    teacher: Place | None = None
    teacher_weight: float | None = None
    hidden_dim: int | None = None
    output_relu: bool | None = None
    loss_on: Literal["hidden", "all"] | None = None


@dataclass(frozen=True)
class MaskConfig(Settings, group="mask."):
    """Which patches are masked.

    Attributes:
        strategy: "random" patches (the paper's), "block" (contiguous), "grid" (evenly spaced), "cells2" or "cells4"
            (random cells of 2 or 4 patches along each axis: larger holes); mlp preset: "elements" (single values) or
            "elements_inverted" (the tutorial's: masks 1 - ratio); "own": a function handed over in Python.
        ratio: masked share of the patches, in (0, 1).
        final_ratio: masked share at the end of the run, reached linearly from `ratio`; null: constant.
    """

    strategy: Strategy = "random"
    ratio: Fraction = 0.75
    final_ratio: Fraction | None = None


@dataclass(frozen=True)
class OptimConfig(Settings, group="optim."):
    """The optimiser and its schedule (paper, table 8).

    Attributes:
        name: "adamw", "adam" (no decoupled decay), or "muon" (orthogonalised momentum for the hidden matrices,
            AdamW for all other parameters).
        base_lr: learning rate for a global batch of 256; the rate used is base_lr * batch_size / 256.
        lr: learning rate for any batch size; null: from base_lr.
        muon_lr: learning rate of the hidden matrices with "muon", matched to AdamW's update size.
        betas: AdamW's moment decay rates.
        weight_decay: not applied to biases, norms, class token, mask token.
        schedule: "cosine" (to min_lr) or "constant", after the warm-up.
        warmup: share of all steps over which the rate rises linearly from 0.
        min_lr: rate at the end, as a share of the peak.
        clip_grad: largest gradient norm; null: no clipping.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    base_lr: Rate = 1.5e-4
    lr: Rate | None = None
    muon_lr: Rate = 3e-3
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Share = 0.05
    min_lr: Share = 0.0
    clip_grad: Positive | None = None


@dataclass(frozen=True)
class RefineConfig(Settings, group="refine."):
    """The second stage of the run: a contrastive loss between views, while masked patches are still predicted.

    It comes after masked pre-training, as in MIM-Refiner (Alkin et al. 2024, arXiv 2402.10093). A projection
    head (SimCLR) reads the mean of a view's visible patch tokens. The learning rate goes through its schedule again.
    A view is compared with those of the other images of its micro-batch and rank.

    Attributes:
        share: share of the run's minutes, or else of its steps, that refines; 0: none.
        views: number of views of each image; the time of a step grows with it.
        lr_ratio: factor on the peak learning rates in this stage.
        temperature: divides the cosines between views; lower ones weigh the most similar images more.
        mask_ratio: masked share of a view's patches, in (0, 1): the encoder reads the others alone.
        crop_scale: range of a view's area as a share of the training crop.
        colour: strength of the random changes of brightness, contrast, saturation and channels; 0: none.
        grey: share of the views whose channels all become their mean.
        masked_share: share of each batch whose masked patches are predicted too, so that the decoder keeps up.
    """

    share: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    views: Annotated[int, Range(2)] = 2
    lr_ratio: Positive = 1.0
    temperature: Positive = 0.1
    mask_ratio: Fraction = 0.5
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.4, 1.0)
    colour: NotNegative = 1.0
    grey: Share = 0.2
    masked_share: PositiveShare = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        within("refine.crop_scale", self.crop_scale[0], 0, self.crop_scale[1], open_low=True)


@dataclass(frozen=True)
class EvalConfig(Settings, group="eval."):
    """Measurements during training, on held-out images under one fixed mask.

    Attributes:
        count: number of measurements, evenly spaced, the last at the end.
        images: largest number of held-out images.
        knn_count: number of kNN and linear probe measurements if there are labels; at most `count`.
        knn_train: largest number of labelled training images of kNN.
        knn_val: largest number of held-out images to classify.
        linear_train: largest number of labelled training images of the linear probe; 0: no linear probe.
        pictures: images in each reconstruction picture.
    """

    count: Count = 10
    images: Count = 1000
    knn_count: Annotated[int, Range(0)] = 2
    knn_train: Count = 10000
    knn_val: Count = 5000
    linear_train: Annotated[int, Range(0)] = 2000
    pictures: Count = 8


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """One pre-training run.

    Attributes:
        recipe: a named set of settings (`torchmae recipes`), which other options override; "auto" chooses by the data.
        data: the training images and how they are augmented.
        model: the network.
        mask: which patches are masked.
        optim: the optimiser and its schedule.
        refine: the second stage, a contrastive loss between views of each image.
        eval: measurements during training.
        init_from: weights to start from, which also give the network's shape: a run, an exported model, a released MAE
            checkpoint, or timm's or transformers' weights (FILE#PART selects one of several encoders in a file); null:
            random weights.
        out: the run folder; null: runs/<recipe>-<time>.
        epochs: passes over the training images.
        max_minutes: minutes of training steps, in place of epochs. The speed of the first steps sets the number of
            steps. The last stage corrects it each time half of the steps or minutes left are used up, so that the run
            ends on time. A resumed stage keeps the number of its checkpoint. Start-up and validation are not counted.
        batch_size: images per optimiser step, over all ranks and micro-batches.
        fit_batch: use the largest batch that fits on the GPU, a power of two images on each, in place of batch_size;
            `--batch auto` for short.
        max_tokens: largest number of patches in an optimiser step, for which a larger batch_size is lowered; null: no
            limit.
        start_size: smaller image size in pixels for the start of the run, a multiple of the patch; null: none.
        start_share: share of the first stage's steps that have `start_size`, in (0, 1).
        accumulate: number of micro-batches per batch and rank, to save memory.
        seed: seed of weights, order, crops, flips and masks.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto (bf16 where it is faster, else fp32), bf16 or fp32.
        threads: processor threads; null: OMP_NUM_THREADS, else every core.
        compile: train the model with torch.compile.
        parallel: how the ranks of torchrun share the work: "ddp" (each rank has the whole model) or "fsdp" (each rank
            has a shard of every weight, for models that do not fit on one GPU).
        rank_timeout: minutes that the ranks of torchrun wait for one that does not start, or gives no sign of life.
        compress_gradients: exchange gradients in bf16 ("ddp" only).
        checkpoint_activations: keep only each block's input for the backward pass and compute the rest again: a third
            more work, a fraction of the memory.
        activation_memory_budget: share of the activations that a compiled model keeps, in [0, 1]; the compiler
            recomputes the others, the cheapest first.
        max_skipped: number of steps in a row with a loss or gradient that is not finite, after which the run returns
            to its last checkpoint and halves the learning rate.
        log_every: optimiser steps between two lines of the log.
        checkpoint_minutes: minutes between two checkpoints; the last two are kept.
        progress: "auto" (a live line on a terminal, else plain lines), "plain", "epochs" (one line an epoch on
            standard output) or "none".
        trackers: further destinations of figures and pictures: "auto" (TensorBoard if it is installed), "none", or
            tensorboard, wandb (Weights & Biases), trackio and swanlab, separated by commas.
    """

    recipe: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init_from: Place | None = None
    out: Place | None = None
    epochs: Size = 100
    max_minutes: Annotated[float, Range(0, 1_000_000, open_low=True)] | None = None
    batch_size: Size = 256
    fit_batch: bool = False
    max_tokens: Count | None = None
    start_size: Count | tuple[Count, ...] | None = None
    start_share: Fraction = 0.5
    accumulate: Count = 1
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    device: Device = "auto"
    precision: Precision = "auto"
    threads: Threads | None = None
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    rank_timeout: Minutes = 10.0
    compress_gradients: bool = False
    checkpoint_activations: bool = False
    activation_memory_budget: Share = 1.0
    max_skipped: Count = 3
    log_every: Count = 10
    checkpoint_minutes: NotNegative = 5.0
    progress: Literal["auto", "plain", "epochs", "none"] = "auto"
    trackers: Literal["auto", "none", "tensorboard", "wandb", "trackio", "swanlab"] | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        trackers = [name.strip() for name in self.trackers.split(",")]
        for name in trackers:
            one_of("trackers", name, TRACKERS if len(trackers) > 1 else ("auto", "none", *TRACKERS))
        within("accumulate", self.accumulate, 1, self.batch_size)
        if self.activation_memory_budget < 1 and not self.compile:
            raise ConfigError(
                f"activation_memory_budget is {self.activation_memory_budget:g}, and only a compiled model has one",
                "add --compile true, or use --checkpoint_activations true",
            )
        if self.model.teacher is not None and self.data.normalise == "sample":
            problem = "data.normalise is 'sample', after which model.teacher cannot tell the values of the images"
            raise ConfigError(problem, "use --data.normalise dataset")
        if self.max_minutes is None and self.epochs % self.data.repeats:
            raise ConfigError(
                f"{self.epochs} epochs cannot be divided by data.repeats {self.data.repeats}: some images would be "
                "seen more often than others",
                f"use --epochs {(self.epochs // self.data.repeats + 1) * self.data.repeats}",
            )


@dataclass(frozen=True)
class PretrainOptions(JsonOption):
    """Trains a masked autoencoder on images and writes a run folder with a backbone, pictures and a report.

    Attributes:
        resume: continue the run in this folder with its settings.
        print_config: print all settings as YAML instead of training.
    """

    resume: Place | None = None
    print_config: bool = False


@dataclass(frozen=True)
class RecipesOptions(Settings):
    """Lists the recipes: named sets of settings for `torchmae pretrain --recipe NAME`."""
