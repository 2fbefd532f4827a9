"""The tutorial's fully connected system (docs/tutorial.md), composed of the same parts as every other model."""

from torchmae.tutorial.mlp import PRESETS, compose

__all__ = ["PRESETS", "compose"]
