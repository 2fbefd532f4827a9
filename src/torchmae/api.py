"""What `torchmae pretrain`, `evaluate` and `embed` do, from Python; objects of the caller's own in place of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torchmae import presets, settings
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.config.base import Settings, make, settings_of
from torchmae.config.evaluate import ComputeOptions, EmbedOptions, EvaluateOptions
from torchmae.config.pretrain import OWN
from torchmae.data.formats import Context
from torchmae.data.layouts import open_splits
from torchmae.data.reading import median_size, probe
from torchmae.data.sources import Source
from torchmae.errors import ConfigError
from torchmae.evaluation import suite
from torchmae.evaluation.embedding import Written, embed_run
from torchmae.nn import MaskedAutoencoder, Strategy
from torchmae.runs import NOTHING, Own, Run, overrides, resume_run, start
from torchmae.training.progress import Display
from torchmae.training.ranks import open_ranks

Data = str | Path | Mapping[str, Any]
_MAX_PATCHES = 256  # in an image, for a suggested patch size: what 224 pixels in patches of 16 come close to
_LARGEST_PATCH = 16  # of pictures, as suggested

PROBED = 16
# The longer side of the images, in pixels, up to which a recipe is the one to start with.
RECIPE_FOR_SIDE = ((16, "digits"), (48, "cifar10"), (128, "images-96"), (float("inf"), "images"))


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
        data: as the option --data: a folder, a .npy file, or a name; or a dictionary of data settings.
        config: all settings at once, in place of `data` and `options`.
        resume: a run folder to go on with. Objects that the run was begun with (`model`, a strategy, `source`) are
            handed over again.
        model: a dictionary of model settings; or a model, of which a copy is trained from the weights that it has.
        source: the images, in place of a path; or a dictionary of them with "train", and "val" for held-out ones.
        **options: any setting of `PretrainConfig` by name, groups as dictionaries. `mask={"strategy": ...}` also takes
            a `Strategy`, or a function (noise (B, L), grid, ratio) -> Mask.

    Returns:
        The finished run.

    Raises:
        TorchmaeError: in place of the command line's one-line errors.
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
    """Measures what a model learned, and appends it to RUN/evaluations.jsonl.

        torchmae.evaluate("runs/a")                                      # kNN, linear and attentive probes
        torchmae.evaluate("runs/a", "cifar10", method="knn", train_images=10_000)
        torchmae.evaluate("random", "cifar10", method="linear", preset="vit_tiny_32_p4")

    Args:
        run: a run folder, an exported model, weights of others, or "random" or "pixels" with `preset`.
        data: the labelled images, as the option --data; or a dictionary of data settings. None: the run's own.
        model: of a run of a model handed over in Python, this model again. Its own weights are the untrained ones that
            method "all" sets beside the run's.
        source: as for `pretrain`, with "test" among the splits.
        **options: any other option of `torchmae evaluate` by name, groups as dictionaries.

    Returns:
        Every figure by name, accuracies in percent, as evaluations.jsonl has them; those of the baselines that
        method "all" sets beside a run as "random.knn20" and "pixels.knn20".

    Raises:
        TorchmaeError: in place of the command line's one-line errors.
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
        data: the images, as the option --data; or a dictionary of data settings. None: the run's own.
        model: as for `evaluate`.
        source: as for `pretrain`.
        **options: any other option of `torchmae embed` by name.

    Returns:
        The file, the number of images in it, and the shape of one image's features.

    Raises:
        TorchmaeError: in place of the command line's one-line errors.
    """
    given = given_settings(data, {"progress": "none", "run": str(run), **options}, EmbedOptions, ComputeOptions)
    splits = splits_of(source)
    given |= {} if splits is None else {"data.source": OWN}
    return embed_run(make(EmbedOptions, given), make(ComputeOptions, given), model=model, splits=splits)


def given_settings(data: Data | None, options: dict[str, Any], *kinds: type[Settings]) -> settings.Given:
    """Options of Python by dotted name."""
    return settings.collect(options if data is None else {**options, "data": data}, settings_of(*kinds))


def splits_of(source: Source | Mapping[str, Source] | None) -> Mapping[str, Source] | None:
    """Sources of a caller's own by split; ConfigError for what is no source."""
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
    """A new run from settings by dotted name. Ranks are connected before one of them opens the data."""
    with open_ranks(settings.from_recipe(given).device):
        return start(configure(given, own.splits), own)


def configure(given: Mapping[str, Any], splits: Mapping[str, Source] | None = None) -> PretrainConfig:
    """The settings of a run: those of a recipe, changed by those that are given by dotted name.

    Without a recipe, the size of the images chooses one. Where the input of that recipe does not suit the images, their
    size chooses the sizes of input and patches too, unless these are given.
    """
    if splits is not None:
        given = {**given, "data.source": OWN}
    config = settings.from_recipe(given)
    if config.recipe != "auto":
        return config
    if config.data.source == "digits":
        return settings.from_recipe({**given, "recipe": "digits"})

    def look() -> tuple[int, ...]:
        display = Display(config.progress)
        try:
            context = Context.of(config.data, progress=display.preparing)
            return typical_size((splits or open_splits(config.data.source, context))["train"])
        finally:
            display.close()

    with open_ranks(config.device) as ranks:
        recipe, shape = recommend(ranks.on_main(look))  # what has to be downloaded is so once
    sizes = {} if config.init_from is not None else proposed(config.model, shape)
    shape = {f"model.{name}": size for name, size in sizes.items()}
    of_others = {}
    if "model.preset" in given:  # the recipe's sizes are those of its own preset
        names = overrides(config).keys() - presets.arguments(config.model.preset).keys()
        of_others = {f"model.{name}": None for name in names}
    return settings.from_recipe({**of_others, **shape, **given, "recipe": recipe})


def proposed(model: ModelConfig, shape: dict[str, Any]) -> dict[str, Any]:
    """Input and patch size as `recommend` gives them, where the settings leave them open.

    An input size is fitted to a patch size that is given.
    """
    if not shape or model.input_size is not None or "patch_size" not in presets.arguments(model.preset):
        return {}
    if model.patch_size is None:
        return shape
    size = shape["input_size"]
    patch = (model.patch_size,) * len(size) if isinstance(model.patch_size, int) else model.patch_size
    if len(patch) != len(size) or min(patch) < 1:
        return {}
    return {"input_size": tuple(max(1, length // p) * p for length, p in zip(size, patch, strict=True))}


def typical_size(train: Source) -> tuple[int, ...]:
    """The median size of a sample of the training images, in pixels."""
    seen = probe(train, sample=PROBED)
    return median_size(seen.sizes)


def recommend(size: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """The recipe to start with for images of a size, in pixels along 1, 2 or 3 axes.

    Returns:
        the recipe; and `input_size` and `patch_size` where its own input does not suit: for signals and volumes,
        elongated images, and tiny images that would have to be reduced.
    """
    recipe = next(name for limit, name in RECIPE_FOR_SIDE if max(size) <= limit)
    config = settings.from_recipe({"recipe": recipe})
    own = presets.arguments(config.model.preset, **overrides(config))
    reduced = recipe == RECIPE_FOR_SIDE[0][1] and max(size) > max(own["input_size"])
    if len(size) == 2 and max(size) <= 2 * min(size) and not reduced:
        return recipe, {}
    input_size, patch_size = suggested_input(size)
    return recipe, {"input_size": input_size, "patch_size": patch_size}


def suggested_input(size: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """An input size close to that of images with `size`, and a patch size that divides it, for any number of axes.

    The patch is the smallest power of two from 2 on that gives no more than 256 patches. Pictures so large that it
    would be above 16 are reduced instead.
    """
    patch = 2  # one pixel has nothing to predict but itself, and no contrast to be normalised by
    while prod(max(1, length // patch) for length in size) > _MAX_PATCHES:
        patch *= 2
    grid = tuple(max(1, length // patch) for length in size)
    patch = min(patch, _LARGEST_PATCH) if len(size) == 2 else patch
    return tuple(length * patch for length in grid), patch
