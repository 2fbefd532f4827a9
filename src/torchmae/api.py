"""The Python API: `torchmae pretrain`, `evaluate` and `embed`, also with the caller's own models, masks and sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

from torchmae import presets, settings
from torchmae.building import NOTHING, Own, overrides
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.config.base import Settings, make, settings_of
from torchmae.config.evaluate import ComputeOptions, EmbedOptions, EvaluateOptions
from torchmae.config.pretrain import OWN
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.reading import is_sound, median_size, probe
from torchmae.data.sources import Source
from torchmae.errors import ConfigError
from torchmae.evaluation import suite
from torchmae.evaluation.embedding import Written, embed_run
from torchmae.nn import MaskedAutoencoder, Strategy
from torchmae.runs import Run, resume_run, start
from torchmae.training.compilation import check_compiler
from torchmae.training.progress import Display
from torchmae.training.ranks import open_ranks
from torchmae.training.runtime import find_device
from torchmae.words import kind_of

Data = str | Path | Mapping[str, Any]
_MAX_PATCHES = 256  # per image, for a suggested patch size; 224 pixels in patches of 16 give 196
_LARGEST_PATCH = 16  # pixels, suggested for pictures

_BANDS = 64  # of the recipe "sound"
PROBED = 16  # images, to find the typical size and kind
# The recommended recipes: by kind of data, and for images by the longer side, in pixels up to which a recipe is for;
# on a processor, those that learn something in minutes.
RECIPE_FOR_KIND = {"signal": "signals", "volume": "volumes", "clip": "video"}
RECIPE_FOR_SIDE = {16: "digits", 48: "cifar10", 128: "images-96", float("inf"): "images"}
RECIPE_FOR_SIDE_ON_CPU = {
    16: "digits",
    48: "cifar10-cpu",
    float("inf"): "photos-64-cpu",
}
ENCODER = {"embed_dim", "depth", "num_heads"}  # of a recipe, which a preset given beside it replaces


def pretrain(
    data: Data | None = None,
    *,
    config: PretrainConfig | None = None,
    resume: str | Path | None = None,
    model: MaskedAutoencoder | Mapping[str, Any] | None = None,
    source: Source | Mapping[str, Source] | None = None,
    **options: Any,
) -> Run:
    """Pre-trains a masked autoencoder.

        torchmae.pretrain()                                              # digits
        torchmae.pretrain("my_images", epochs=20, mask={"ratio": 0.6})
        torchmae.pretrain(resume="runs/a")
        torchmae.pretrain("my_images", model=MaskedAutoencoder(...), mask={"strategy": my_strategy})

    Args:
        data: a folder, file or name, as for --data; or a dictionary of data settings.
        config: all settings, instead of `data` and `options`.
        resume: the folder of a run to continue. If the run began with objects (`model`, a strategy, `source`), give
            them again.
        model: a dictionary of model settings; or a model, whose copy is trained from its present weights.
        source: a `Source` of images instead of a path; or a dictionary of sources with "train" and perhaps "val".
        **options: any setting of `PretrainConfig` by name, groups as dictionaries. `mask={"strategy": ...}` also takes
            a `Strategy`, or a function (noise (B, L), grid, ratio) -> Mask.

    Returns:
        The finished run.

    Raises:
        TorchmaeError: where the command line prints an error.
    """
    if config is not None:
        if options or any(item is not None for item in (data, resume, model, source)):
            raise ConfigError("config is given beside other settings", "give either config or the settings")
        return start(config)
    strategy = None
    if isinstance(mask := options.get("mask"), Mapping) and not isinstance(mask.get("strategy", ""), str):
        rule = mask["strategy"]
        strategy = rule if isinstance(rule, Strategy) else Strategy(rule, prod)
        options["mask"] = {name: value for name, value in mask.items() if name != "strategy"}
    if isinstance(model, MaskedAutoencoder):
        own = Own(model, strategy, splits_of(source))
    else:
        own = Own(None, strategy, splits_of(source))
        options |= {} if model is None else {"model": model}
    given = given_settings(data, options, PretrainConfig)
    return resume_run(Path(resume), given, own) if resume is not None else begin(given, own)


def evaluate(
    run: str | Path,
    data: Data | None = None,
    *,
    model: MaskedAutoencoder | None = None,
    source: Source | Mapping[str, Source] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Measures what a model learned, and appends the figures to RUN/evaluations.jsonl.

        torchmae.evaluate("runs/a")                                      # kNN, linear and attentive probes
        torchmae.evaluate("runs/a", "cifar10", method="knn", train_images=10_000)
        torchmae.evaluate("random", "cifar10", method="linear", preset="vit_tiny_32_p4")

    Args:
        run: a run folder, an exported model, weights of others, or "random" or "pixels" with `preset`.
        data: the labelled images, as for --data; or a dictionary of data settings. None: the run's.
        model: the model of a run that began with a model in Python. Its weights serve as the untrained network of
            method "all".
        source: as for `pretrain`; splits may include "test".
        **options: any other option of `torchmae evaluate` by name, groups as dictionaries.

    Returns:
        Every figure by its name in evaluations.jsonl, accuracies in percent. Method "all" adds those of the baselines,
        such as "random.knn20" and "pixels.knn20".

    Raises:
        TorchmaeError: where the command line prints an error.
    """
    given = given_settings(data, {"progress": "none", **options}, EvaluateOptions, ComputeOptions)
    splits = splits_of(source)
    given |= {} if splits is None else {"data.source": OWN}
    return suite.run(run, make(EvaluateOptions, given), make(ComputeOptions, given), model=model, splits=splits)


def embed(
    run: str | Path,
    data: Data | None = None,
    *,
    model: MaskedAutoencoder | None = None,
    source: Source | Mapping[str, Source] | None = None,
    **options: Any,
) -> Written:
    """Writes the features of all images of a data set to a file, as `torchmae embed` does.

        torchmae.embed("runs/a", "my_images", out="features.npz")

    Args:
        run: a run folder, an exported model, or weights of others.
        data: the images, as for --data; or a dictionary of data settings. None: the run's.
        model: as for `evaluate`.
        source: as for `pretrain`.
        **options: any other option of `torchmae embed` by name.

    Returns:
        The file, the number of images in it, and the shape of one image's features.

    Raises:
        TorchmaeError: where the command line prints an error.
    """
    given = given_settings(data, {"progress": "none", "run": str(run), **options}, EmbedOptions, ComputeOptions)
    splits = splits_of(source)
    given |= {} if splits is None else {"data.source": OWN}
    return embed_run(make(EmbedOptions, given), make(ComputeOptions, given), model=model, splits=splits)


def given_settings(data: Data | None, options: dict[str, Any], *kinds: type[Settings]) -> settings.Given:
    """Options from Python by dotted name."""
    return settings.collect(options if data is None else {**options, "data": data}, settings_of(*kinds))


def splits_of(source: Source | Mapping[str, Source] | None) -> Mapping[str, Source] | None:
    """The caller's sources by split; ConfigError if an object is no source."""
    if source is None:
        return None
    splits = source if isinstance(source, Mapping) else {"train": source}
    if "train" not in splits or not all(isinstance(item, Source) for item in splits.values()):
        raise ConfigError(
            f"source is {type(source).__name__} {', '.join(splits) if isinstance(source, Mapping) else ''}".rstrip(),
            "give a torchmae.data.sources.Source, or a dictionary of them with 'train' among its names",
        )
    return splits


def begin(given: Mapping[str, Any], own: Own = NOTHING) -> Run:
    """Starts a new run from settings by dotted name. Ranks are connected before rank 0 opens the data."""
    config = settings.from_recipe(given)
    with open_ranks(config.device, config.rank_timeout):
        return start(configure(given, own.splits), own)


def configure(given: Mapping[str, Any], splits: Mapping[str, Source] | None = None) -> PretrainConfig:
    """The settings of a run: a recipe's, overridden by the given ones (by dotted name).

    Without a recipe, kind and size of the images and the device choose one, and also sizes of input and patches if the
    recipe's do not suit the images and none are given. A recipe that is chosen so compiles the model only where that is
    possible.
    """
    if splits is not None:
        given = {**given, "data.source": OWN}
    config = settings.from_recipe(given)
    if config.recipe != "auto":
        return settings.from_recipe({**as_long_as_clips(config), **given})
    if config.data.source == "digits":
        return settings.from_recipe({**given, "recipe": "digits"})

    def look() -> tuple[str, dict[str, Any]]:
        with closing(Display(config.progress)) as display:
            context = Context.of(config.data, progress=display.preparing)
            seen = probe((splits or open_splits(config.data.source, context))["train"], sample=PROBED)
            return recommend(median_size(seen.sizes), seen.example.meta, config.device)

    with open_ranks(config.device, config.rank_timeout) as ranks:
        recipe, shape = ranks.on_main(look)  # rank 0 alone, so that data is downloaded once
    sizes = {} if config.init_from is not None else proposed(config.model, shape)
    below: settings.Given = {f"model.{name}": length for name, length in sizes.items()}
    if "model.preset" in given:  # the recipe's encoder belongs to its own preset
        own = presets.arguments(config.model.preset)
        names = [name for name in overrides(config) if name not in own or name in ENCODER]
        below = {**{f"model.{name}": None for name in names}, **below}
    try:
        check_compiler()
    except ConfigError:
        below["compile"] = False
    below = {**as_long_as_clips(settings.from_recipe({**below, **given, "recipe": recipe})), **below}
    return settings.from_recipe({**below, **given, "recipe": recipe})


def as_long_as_clips(config: PretrainConfig) -> settings.Given:
    """The setting that makes the input as long as `data.clip`, in whole patches; {} without clips and for pictures."""
    if (clip := config.data.clip) is None:
        return {}
    length = clip[0] if isinstance(clip, tuple) else clip
    model = presets.arguments(config.model.preset, **overrides(config))
    size, patch = model["input_size"], model.get("patch_size", 1)
    along = patch if isinstance(patch, int) else patch[0]
    return {} if len(size) == 2 else {"model.input_size": (max(1, length // along) * along, *size[1:])}


def proposed(model: ModelConfig, shape: dict[str, Any]) -> dict[str, Any]:
    """The sizes of input and patches from `recommend` if the settings leave them open; fits a given patch size."""
    if not shape or model.input_size is not None or "patch_size" not in presets.arguments(model.preset):
        return {}
    if model.patch_size is None:
        return shape
    size = shape["input_size"]
    patch = (model.patch_size,) * len(size) if isinstance(model.patch_size, int) else model.patch_size
    if len(patch) != len(size) or min(patch) < 1:
        return {}
    return {"input_size": tuple(max(1, length // p) * p for length, p in zip(size, patch, strict=True))}


def recommend(size: tuple[int, ...], meta: Mapping[str, Any], device: str = "auto") -> tuple[str, dict[str, Any]]:
    """The recommended recipe for images of a median size, in pixels along 1, 2 or 3 axes, with the `meta` of an `Item`.

    `device` is as in `PretrainConfig`: a processor gets a small encoder of small pictures. Also returns `input_size`
    and `patch_size` if the recipe's own input does not suit: for signals and volumes that are smaller, spectrograms of
    another number of bands, elongated images, and tiny images that would be reduced.
    """
    if is_sound(size, meta):
        if len(size) == 1 or size[0] == _BANDS:
            return "sound", {}
        patch = 8 if size[0] < 2 * _BANDS else 16
        return "sound", {"input_size": (size[0] // patch * patch, 64), "patch_size": patch}
    if "crs" in meta:
        return "satellite", {}
    sides = RECIPE_FOR_SIDE_ON_CPU if find_device(device).type == "cpu" else RECIPE_FOR_SIDE
    by_side = next(name for limit, name in sides.items() if max(size) <= limit)
    kind = kind_of(len(size), moving="fps" in meta)
    recipe = RECIPE_FOR_KIND.get(kind, by_side)
    config = settings.from_recipe({"recipe": recipe})
    own = presets.arguments(config.model.preset, **overrides(config))["input_size"]
    if kind == "image":
        reduced = recipe == "digits" and max(size) > max(own)
        suits = max(size) <= 2 * min(size) and not reduced
    else:
        suits = kind == "clip" or all(length >= least for length, least in zip(size, own, strict=True))
    return recipe, {} if suits else dict(zip(("input_size", "patch_size"), suggested_input(size), strict=True))


def suggested_input(size: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """An input size close to `size`, and a patch size that divides it, for any number of axes.

    The patch size is the smallest power of two from 2 on with at most 256 patches. Pictures that would need more than
    16 are reduced instead.
    """
    patch = 2  # a patch of one pixel has no contrast to normalise by
    while prod(max(1, length // patch) for length in size) > _MAX_PATCHES:
        patch *= 2
    grid = tuple(max(1, length // patch) for length in size)
    patch = min(patch, _LARGEST_PATCH) if len(size) == 2 else patch
    return tuple(length * patch for length in grid), patch
