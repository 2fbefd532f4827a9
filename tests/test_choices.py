"""Settings offer the names of the tables that implement them; `--help` must not import torch for that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from torchmae.app.strings import LANGUAGES
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.config.base import settings_of
from torchmae.config.evaluate import EvaluateOptions
from torchmae.config.export import ExportOptions
from torchmae.config.plan import PlanOptions
from torchmae.config.pretrain import OWN, TRACKERS, Preset, Strategy
from torchmae.config.visualize import AppOptions
from torchmae.evaluation.methods import METHODS
from torchmae.nn.decoder import DECODERS
from torchmae.nn.masking import STRATEGIES
from torchmae.planning.cost import GPUS
from torchmae.presets import PRESETS
from torchmae.publish.export import EXPORTS
from torchmae.tutorial import mlp


@pytest.mark.parametrize(
    ("offered", "table"),
    [
        (get_args(Preset), [*PRESETS, OWN]),
        (settings_of(ModelConfig)["decoder"].choices, DECODERS),
        (get_args(Strategy), [*STRATEGIES, *mlp.STRATEGIES, OWN]),
        (settings_of(EvaluateOptions)["method"].choices, ["all", *METHODS]),
        (settings_of(ExportOptions)["to"].choices, EXPORTS),
        (settings_of(PlanOptions)["gpu"].choices, GPUS),
        (settings_of(AppOptions)["lang"].choices, LANGUAGES),
        (settings_of(PretrainConfig)["trackers"].choices, ["auto", "none", *TRACKERS]),
    ],
    ids=["preset", "decoder", "strategy", "method", "format", "gpu", "lang", "trackers"],
)
def test_choices_are_the_tables(offered: tuple[str, ...], table: Any) -> None:
    assert offered == tuple(table)


@pytest.mark.parametrize("page", ["weights.md", "weights.zh-CN.md"])
def test_the_documents_have_every_format(page: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    table = text.partition("| `--to` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(EXPORTS)
