"""Settings: typed dataclasses, one file for each command. No torch here: `torchmae --help` answers at once."""

from torchmae.config.data import ReadOptions
from torchmae.config.pretrain import DataConfig, EvalConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig

__all__ = ["DataConfig", "EvalConfig", "MaskConfig", "ModelConfig", "OptimConfig", "PretrainConfig", "ReadOptions"]
