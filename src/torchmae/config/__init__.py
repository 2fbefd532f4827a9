"""Settings: typed dataclasses, one file for each command. No torch here: `torchmae --help` answers at once."""

from torchmae.config.data import DataOptions, PackOptions, ReadOptions
from torchmae.config.pretrain import (
    DataConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RefineConfig,
)

__all__ = [
    "DataConfig",
    "DataOptions",
    "EvalConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "PackOptions",
    "PretrainConfig",
    "ReadOptions",
    "RefineConfig",
]
