from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import RUNTIME, images, mlp, train, vit

from torchmae.building import check_progression, pretrain_settings
from torchmae.config import MaskConfig, PretrainConfig
from torchmae.data.loader import Batch
from torchmae.errors import ConfigError
from torchmae.nn.masking import Masker
from torchmae.training.pretrain_task import PretrainTask


def config(**values: Any) -> PretrainConfig:
    return PretrainConfig(batch_size=4, epochs=4, **values)


def test_the_ratio_goes_in_a_straight_line() -> None:
    changing = Masker(vit().encoder, "random", 0.5, final_ratio=0.9)
    assert [changing.at(step, 5).ratio for step in range(5)] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert changing.at(0, 1).ratio == 0.5
    assert replace(changing, final_ratio=None).at(3, 5).ratio == 0.5


def test_small_images_come_first() -> None:
    model, full = vit(), torch.full((2, 1, 8, 8), 3.0)
    batch = Batch(full, torch.zeros(2), torch.arange(2).numpy(), 0)

    def given(step: int, **values: Any) -> torch.Tensor:
        found = PretrainTask(pretrain_settings(config(**values), model), model, RUNTIME, 4).inputs(batch, step, 8)[0]
        assert isinstance(found, torch.Tensor)
        return found

    sizes = [given(step, start_size=4, start_share=0.25).shape[2:] for step in range(8)]
    assert sizes == [(4, 4)] * 2 + [(8, 8)] * 6
    assert torch.allclose(given(0, start_size=4), torch.tensor(3.0))
    assert given(0) is full
    assert given(0, start_size=(4, 8)).shape[2:] == (4, 8)


def test_a_run_sees_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    seen: list[tuple[int, int, int]] = []
    forward = type(model).forward

    def noted(self: Any, batch: torch.Tensor, mask: Any) -> Any:
        seen.append((batch.shape[-1], mask.ids_keep.shape[1], mask.ids_masked.shape[1]))
        return forward(self, batch, mask)

    monkeypatch.setattr(type(model), "forward", noted)
    progressing = config(start_size=4, mask=MaskConfig(ratio=0.5, final_ratio=0.75))
    state, tracker = train(progressing, model, images(8), tmp_path)
    assert state.step == 8
    assert [size for size, _, _ in seen] == [4] * 4 + [8] * 4
    assert [keep + masked for _, keep, masked in seen] == [4] * 4 + [16] * 4
    assert seen[-1][1] == 4  # a quarter of 16 in the end
    assert seen[4][1] > 4
    assert all(record["loss"] > 0 for record in tracker.of("epoch"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_size": 16}, "larger than the input"),
        ({"start_size": 3}, "patch"),
        ({"start_size": (4, 4, 4)}, "2 axes"),
        ({"mask": MaskConfig(final_ratio=0.5), "compile": True}, "--compile false"),
    ],
)
def test_what_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_progression(config(**values), vit())


def test_a_model_without_patches_has_one_size() -> None:
    with pytest.raises(ConfigError, match="no patches"):
        check_progression(config(start_size=4), mlp())
    check_progression(config(), mlp())


@pytest.mark.parametrize("values", [{"start_share": 1.0}, {"start_share": 0.0}, {"start_size": 0}])
def test_impossible_values(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        config(**values)
