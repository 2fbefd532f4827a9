"""What `torchmae pretrain` and `torchmae evaluate` do, from Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmae import presets, settings
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.data.formats import Context
from torchmae.data.inspecting import median_size, suggested_input
from torchmae.data.layouts import open_splits
from torchmae.data.reading import probe
from torchmae.errors import ConfigError
from torchmae.evaluation import suite
from torchmae.evaluation.options import ComputeOptions, EvaluateOptions
from torchmae.runs import Run, overrides, resume_run, start
from torchmae.training.progress import Display
from torchmae.training.ranks import open_ranks, ranks_from_environment

PROBED = 16
# The longer side of the images, in pixels, up to which a recipe is the one to start with.
RECIPE_FOR_SIDE = ((16, "digits"), (48, "cifar10"), (128, "images-96"), (float("inf"), "images"))


def pretrain(
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    config: PretrainConfig | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> Run:
    """Pre-trains a masked autoencoder.

        torchmae.pretrain()                                              # digits
        torchmae.pretrain("my_images", epochs=20, mask={"ratio": 0.6})
        torchmae.pretrain(resume="runs/a")

    Args:
        data: as the option --data: a folder, a .npy file, or a name; or a dictionary of data settings.
        config: all settings at once, in place of `data` and `options`.
        resume: a run folder to go on with.
        **options: any setting of `PretrainConfig` by name, groups as dictionaries.

    Returns:
        The finished run.

    Raises:
        TorchmaeError: in place of the command line's one-line errors.
    """
    if config is not None:
        if data is not None or options or resume is not None:
            raise ConfigError("config is given beside other settings", "give either config or the settings")
        return start(config)
    if data is not None:
        options["data"] = data if isinstance(data, Mapping) else {"source": data}
    args = settings.as_options(options)
    return resume_run(Path(resume), args) if resume is not None else begin(args)


def evaluate(run: str | Path, data: str | Path | Mapping[str, Any] | None = None, **options: Any) -> dict[str, float]:
    """Measures what a model learned, and appends it to RUN/evaluations.jsonl.

        torchmae.evaluate("runs/a")                                      # kNN, linear and attentive probes
        torchmae.evaluate("runs/a", "cifar10", method="knn", train_images=10_000)
        torchmae.evaluate("random", "cifar10", method="linear", preset="vit_tiny_32_p4")

    Args:
        run: a run folder, an exported model, weights of others, or "random" or "pixels" with `preset`.
        data: the labelled images, as the option --data; or a dictionary of data settings. None: the run's own.
        **options: any other option of `torchmae evaluate` by name, groups as dictionaries.

    Returns:
        Every figure by name, accuracies in percent, as evaluations.jsonl has them; those of the baselines that
        method "all" sets beside a run as "random.knn20" and "pixels.knn20".

    Raises:
        TorchmaeError: in place of the command line's one-line errors.
    """
    if data is not None:
        options["data"] = data if isinstance(data, Mapping) else {"source": data}
    options.setdefault("progress", "none")
    parser = settings.Parser(prog="torchmae.evaluate", allow_abbrev=False)
    _, chosen, compute = settings.read_options(parser, settings.as_options(options), EvaluateOptions, ComputeOptions)
    return suite.run(run, chosen, compute)


def begin(args: Sequence[str]) -> Run:
    """A new run from command-line options. Ranks are connected before the data is opened, which one of them does."""
    if ranks_from_environment().world_size == 1:
        return start(configure(args))
    with open_ranks(settings.parse(args, settings.peek(args)[0]).device):
        return start(configure(args))


def configure(args: Sequence[str]) -> PretrainConfig:
    """Command-line options to settings.

    Without --recipe one is chosen by the data; and where the sizes of the model's input and patches are not said, so
    are they, should that recipe's not suit.
    """
    recipe, source = settings.peek(args)
    if recipe is not None:
        return settings.parse(args, recipe)
    if source == "digits":
        return settings.parse(args, "digits")
    given = settings.parse(args)  # so that a mistake is said before the data is opened, which may take minutes

    def look() -> tuple[int, ...]:
        display = Display(given.progress)
        try:
            return typical_size(source, Context.of(given.data, progress=display.preparing))
        finally:
            display.close()

    with open_ranks(given.device) as ranks:
        recipe, shape = recommend(ranks.on_main(look))  # what has to be downloaded is so once
    if given.init_from is None:
        args = [*settings.as_options({"model": proposed(given.model, shape)}), *args]
    return settings.parse(args, recipe)


def proposed(model: ModelConfig, shape: dict[str, Any]) -> dict[str, Any]:
    """The part of a shape, as `recommend` gives it, that settings leave open: an input size fits a patch size given."""
    if not shape or model.input_size is not None or "patch_size" not in presets.arguments(model.preset):
        return {}
    if model.patch_size is None:
        return shape
    size = shape["input_size"]
    patch = (model.patch_size,) * len(size) if isinstance(model.patch_size, int) else model.patch_size
    if len(patch) != len(size) or min(patch) < 1:
        return {}
    return {"input_size": tuple(max(1, length // p) * p for length, p in zip(size, patch, strict=True))}


def typical_size(source: str, context: Context) -> tuple[int, ...]:
    """The median size of a sample of the training images, in pixels."""
    seen = probe(open_splits(source, context)["train"], sample=PROBED)
    return median_size(Counter(seen.sizes))


def recommend(size: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """What to start with for images of a size, in pixels along 1, 2 or 3 axes.

    Returns:
        the recipe; and, where its own input does not suit (other axes, elongated images, tiny ones that would lose by
        being reduced), `input_size` and `patch_size`.
    """
    recipe = next(name for limit, name in RECIPE_FOR_SIDE if max(size) <= limit)
    config = settings.parse([], recipe)
    own = presets.arguments(config.model.preset, **overrides(config))
    reduced = recipe == RECIPE_FOR_SIDE[0][1] and max(size) > max(own["input_size"])
    if len(size) == 2 and max(size) <= 2 * min(size) and not reduced:
        return recipe, {}
    input_size, patch_size = suggested_input(size)
    return recipe, {"input_size": input_size, "patch_size": patch_size}
