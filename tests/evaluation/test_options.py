from __future__ import annotations

from typing import Any

import pytest

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import (
    AttentiveOptions,
    ComputeOptions,
    EmbedOptions,
    EvaluateOptions,
    ReconstructionOptions,
)
from torchmae.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DataOptions, {"max_bad": 2}, "data.max_bad is 2; it must lie in [0, 1]"),
        (DataOptions, {"val_size": 0}, "data.val_size is 0; it must be 1 or more"),
        (ComputeOptions, {"batch_size": 0}, "batch_size is 0"),
        (ComputeOptions, {"precision": "fp16"}, "precision is 'fp16'; did you mean 'bf16'?"),
        (AttentiveOptions, {"lr": 0.0}, "attentive.lr is 0; it must lie in (0, 10]"),
        (AttentiveOptions, {"epochs": 0}, "attentive.epochs is 0"),
        (ReconstructionOptions, {"ratios": (0.5, 1.0)}, "reconstruction.ratios is 1; it must lie in (0, 1)"),
        (ReconstructionOptions, {"ratios": ()}, "reconstruction.ratios is empty"),
        (EvaluateOptions, {"pool": "max"}, "pool is 'max'; did you mean 'mean'? choose from mean, cls, both"),
        (
            EvaluateOptions,
            {"layer": "last-0"},
            "layer is 'last-0'; give the number of a block, such as 5 or -2, or las",
        ),
        (EvaluateOptions, {"layer": 3, "method": "finetune"}, "layer does not apply to method 'finetune'"),
        (EvaluateOptions, {"labels_per_class": 0}, "labels_per_class is 0; it must be 1 or more"),
        (EvaluateOptions, {"labels_per_class": 5, "method": "attentive"}, "labels_per_class does not apply to method"),
        (
            EmbedOptions,
            {"run": "a", "out": "features.csv"},
            "out is 'features.csv'; give a name that ends in .npz or .parquet",
        ),
        (EmbedOptions, {"run": "a", "split": "dev"}, "split is 'dev'"),
    ],
)
def test_values_that_cannot_work(kind: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert message in str(caught.value)


def test_resume_names_the_folder_to_go_on_with() -> None:
    options = EvaluateOptions(method="finetune", resume="runs/a/finetune")
    assert (options.out, options.resume) == ("runs/a/finetune", True)
    assert EvaluateOptions(method="finetune", out="a", resume=True).out == "a"
    with pytest.raises(ConfigError, match="resume is 'a' and out 'b'"):
        EvaluateOptions(method="finetune", out="b", resume="a")
    with pytest.raises(ConfigError, match="does not apply to method 'knn'"):
        EvaluateOptions(method="knn", resume="a")
