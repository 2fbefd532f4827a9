"""torchmae: masked autoencoder pre-training in PyTorch.

The public names, imported on first use so that `import torchmae` stays quick:

- `pretrain(...)`: trains a masked autoencoder and leaves a run folder; the command line's `torchmae pretrain`.
- `evaluate(run, ...)`: measures what a model learned; the command line's `torchmae evaluate`.
- `embed(run, ...)`: features of many images, in a file; the command line's `torchmae embed`.
- `load(run)`: the model of a run folder, ready to encode and reconstruct.
- `build(preset, ...)`: a network by name, with fresh weights.
- `PretrainConfig` and its parts: every setting and its default.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "build": "torchmae.presets",
    "embed": "torchmae.api",
    "evaluate": "torchmae.api",
    "load": "torchmae.training.pretrained",
    "pretrain": "torchmae.api",
    "DataConfig": "torchmae.config",
    "EvalConfig": "torchmae.config",
    "MaskConfig": "torchmae.config",
    "ModelConfig": "torchmae.config",
    "OptimConfig": "torchmae.config",
    "PretrainConfig": "torchmae.config",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchmae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
