from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from inspect import getdoc
from typing import Any

import pytest

from torchmae.config import (
    DataConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    ReadOptions,
)
from torchmae.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    TorchmaeError,
    TrainingError,
    one_of,
    within,
)

CONFIGS = (ReadOptions, DataConfig, ModelConfig, MaskConfig, OptimConfig, EvalConfig, PretrainConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_construct_and_are_frozen(config: type[Any]) -> None:
    made = config()
    assert made == config()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_described(config: type[Any]) -> None:
    lines = (getdoc(config) or "").partition("Attributes:\n")[2].splitlines()
    described = [line.strip().partition(":")[0] for line in lines if line.startswith("    ") and line[4] != " "]
    assert described == list(vars(config)["__annotations__"])


def test_the_defaults_of_the_paper() -> None:
    optim = OptimConfig()
    assert (optim.base_lr, optim.betas, optim.weight_decay, optim.schedule) == (1.5e-4, (0.9, 0.95), 0.05, "cosine")
    assert (MaskConfig().strategy, MaskConfig().ratio) == ("random", 0.75)
    ratio = DataConfig().crop_ratio
    assert DataConfig().augmentation(2) == ((0.2, 1.0), ratio, True)
    assert DataConfig().augmentation(1) == DataConfig().augmentation(3) == ((0.8, 1.0), ratio, False)
    assert DataConfig().augmentation(2, "DICOM") == ((0.2, 1.0), ratio, False)
    assert DataConfig().augmentation(2, "spectrogram") == ((0.8, 1.0), ratio, False)
    assert DataConfig(crop_scale=(0.5, 1), flip=True).augmentation(1) == ((0.5, 1), ratio, True)


def test_parts_are_configs_of_their_own() -> None:
    config = PretrainConfig(mask=MaskConfig(ratio=0.5))
    assert config.mask.ratio == 0.5
    assert config.optim == OptimConfig()
    assert sum(is_dataclass(getattr(config, part.name)) for part in fields(config)) == 6


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (
            DataConfig,
            {"cache": "disk"},
            "data.cache is 'disk'; choose from auto, memory, device, none",
        ),
        (
            DataConfig,
            {"cache": "memry"},
            "data.cache is 'memry'; did you mean 'memory'? choose from auto, memory, device, none",
        ),
        (DataConfig, {"val_size": 0}, "data.val_size is 0; it must be 1 or more"),
        (DataConfig, {"memory_limit": -1.0}, "data.memory_limit is -1; it must be 0 or more"),
        (DataConfig, {"num_workers": -1}, "data.num_workers is -1; it must lie in [0, 256]"),
        (DataConfig, {"num_workers": 257}, "data.num_workers is 257; it must lie in [0, 256]"),
        (DataConfig, {"max_bad": 1.5}, "data.max_bad is 1.5; it must lie in [0, 1]"),
        (DataConfig, {"crop_scale": (0.0, 1.0)}, "data.crop_scale is 0; it must lie in (0, 1]"),
        (DataConfig, {"crop_scale": (0.5, 0.2)}, "data.crop_scale is 0.5; it must lie in (0, 0.2]"),
        (DataConfig, {"crop_scale": (0.5, 1.2)}, "data.crop_scale is 1.2; it must lie in (0, 1]"),
        (DataConfig, {"crop_ratio": (2.0, 1.0)}, "data.crop_ratio is 2; it must lie in (0, 1]"),
        (DataConfig, {"mean": (0.5,), "std": (0.0,)}, "data.std is 0; it must be above 0"),
        (DataConfig, {"mean": (0.5,)}, "only one of data.mean and data.std is given; give both, or neither"),
        (DataConfig, {"std": (0.5,)}, "only one of data.mean and data.std is given; give both, or neither"),
        (DataConfig, {"mean": (0.5, 0.5), "std": (0.5,)}, "data.mean has 2 values and data.std 1; give both one"),
        (MaskConfig, {"strategy": "rand"}, "mask.strategy is 'rand'; did you mean 'random'? choose from random, block"),
        (MaskConfig, {"ratio": 0.0}, "mask.ratio is 0; it must lie in (0, 1)"),
        (MaskConfig, {"ratio": 1.0}, "mask.ratio is 1; it must lie in (0, 1)"),
        (MaskConfig, {"ratio": 75.0}, "mask.ratio is 75; it must lie in (0, 1)"),
        (MaskConfig, {"ratio": float("nan")}, "mask.ratio is nan; it must lie in (0, 1)"),
        (OptimConfig, {"name": "sgd"}, "optim.name is 'sgd'; choose from adamw, adam, muon"),
        (OptimConfig, {"schedule": "cos"}, "optim.schedule is 'cos'; did you mean 'cosine'?"),
        (OptimConfig, {"base_lr": 0.0}, "optim.base_lr is 0; it must lie in (0, 10]"),
        (OptimConfig, {"lr": -1e-3}, "optim.lr is -0.001; it must lie in (0, 10]"),
        (OptimConfig, {"muon_lr": 11.0}, "optim.muon_lr is 11; it must lie in (0, 10]"),
        (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay is -0.1; it must lie in [0, 10]"),
        (OptimConfig, {"warmup": 5.0}, "optim.warmup is 5; it must lie in [0, 1]"),
        (OptimConfig, {"min_lr": 2.0}, "optim.min_lr is 2; it must lie in [0, 1]"),
        (OptimConfig, {"clip_grad": 0.0}, "optim.clip_grad is 0; it must be above 0"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "optim.betas is 1; it must lie in [0, 1)"),
        (EvalConfig, {"count": 0}, "eval.count is 0; it must be 1 or more"),
        (EvalConfig, {"images": 0}, "eval.images is 0; it must be 1 or more"),
        (EvalConfig, {"pictures": -3}, "eval.pictures is -3; it must be 1 or more"),
        (EvalConfig, {"knn_train": 0}, "eval.knn_train is 0; it must be 1 or more"),
        (EvalConfig, {"knn_val": 0}, "eval.knn_val is 0; it must be 1 or more"),
        (EvalConfig, {"knn_count": -1}, "eval.knn_count is -1; it must be 0 or more"),
        (
            PretrainConfig,
            {"precision": "fp16"},
            "precision is 'fp16'; did you mean 'bf16'? choose from auto, bf16, fp32",
        ),
        (PretrainConfig, {"progress": "full"}, "progress is 'full'; choose from auto, plain, epochs, none"),
        (PretrainConfig, {"epochs": 0}, "epochs is 0; it must lie in [1, 1000000]"),
        (PretrainConfig, {"max_minutes": 0.0}, "max_minutes is 0; it must lie in (0, 1000000]"),
        (PretrainConfig, {"batch_size": 0}, "batch_size is 0; it must lie in [1, 1000000]"),
        (PretrainConfig, {"batch_size": 1000001}, "batch_size is 1000001; it must lie in [1, 1000000]"),
        (PretrainConfig, {"batch_size": 8, "accumulate": 9}, "accumulate is 9; it must lie in [1, 8]"),
        (PretrainConfig, {"seed": -1}, "seed is -1; it must lie in [0, 18446744073709551615]"),
        (PretrainConfig, {"seed": 2**64}, "seed is 18446744073709551616; it must lie in [0, 18446744073709551615]"),
        (PretrainConfig, {"threads": 0}, "threads is 0; it must lie in [1, 1024]"),
        (PretrainConfig, {"log_every": 0}, "log_every is 0; it must be 1 or more"),
        (PretrainConfig, {"checkpoint_minutes": -1.0}, "checkpoint_minutes is -1; it must be 0 or more"),
        (
            PretrainConfig,
            {"epochs": 10, "data": DataConfig(repeats=4)},
            "10 epochs cannot be divided by data.repeats 4: some images would be seen more often than others; "
            "use --epochs 12",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_value_and_limit(config: type[Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (
            DataConfig,
            {"num_workers": 0, "max_bad": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "val_size": 1},
        ),
        (DataConfig, {"num_workers": 256, "max_bad": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}),
        (OptimConfig, {"warmup": 0.0, "min_lr": 1.0, "weight_decay": 0.0, "betas": (0.0, 0.999), "clip_grad": 1e-3}),
        (EvalConfig, {"count": 1, "knn_count": 0, "images": 1}),
        (PretrainConfig, {"epochs": 12, "data": DataConfig(repeats=4)}),
        (PretrainConfig, {"epochs": 10, "max_minutes": 5.0, "data": DataConfig(repeats=4)}),
        (PretrainConfig, {"batch_size": 4, "accumulate": 4, "seed": 2**64 - 1, "checkpoint_minutes": 0.0}),
    ],
)
def test_the_limits_themselves(config: type[Any], given: dict[str, Any]) -> None:
    made = config(**given)
    assert {name: getattr(made, name) for name in given} == given


def test_one_of_names_the_nearest_choice() -> None:
    one_of("x", "a", ("a", "b"))
    with pytest.raises(ConfigError, match=r"^x is None; choose from a, b$"):
        one_of("x", None, iter(("a", "b")))
    with pytest.raises(ConfigError, match=r"^x is 'a\\nb'; "):
        one_of("x", "a\nb", ("ab",))


@pytest.mark.parametrize(
    ("value", "low", "high", "ends", "right"),
    [
        (None, 0, 1, {}, True),
        (0, 0, 1, {}, True),
        (1, 0, 1, {}, True),
        (0, 0, 1, {"open_low": True}, False),
        (1, 0, 1, {"open_high": True}, False),
        (0.5, 0, 1, {"open_low": True, "open_high": True}, True),
        (float("nan"), 0, 1, {}, False),
        (-1, 0, float("inf"), {}, False),
    ],
)
def test_within(value: float | None, low: float, high: float, ends: dict[str, bool], right: bool) -> None:
    if right:
        within("x", value, low, high, **ends)
    else:
        with pytest.raises(ConfigError, match=r"^x is "):
            within("x", value, low, high, **ends)


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (lambda: ConfigError("a", "b"), 2),
        (lambda: DataError("a", "b"), 2),
        (lambda: CheckpointError("a", "b"), 2),
        (lambda: TrainingError("a", "b"), 1),
        (lambda: Interrupted("a", "b", 15), 143),
    ],
)
def test_errors_are_problem_and_fix_with_an_exit_status(make: Callable[[], TorchmaeError], status: int) -> None:
    error = make()
    assert str(error) == "a; b"
    assert (error.problem, error.fix, error.exit_status) == ("a", "b", status)


def test_an_error_without_a_fix_is_the_problem_alone() -> None:
    assert str(DataError("no images in x")) == "no images in x"
    assert isinstance(ConfigError("a"), ValueError)
