from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchmae.cli import main
from torchmae.config.plan import PlanOptions
from torchmae.planning.cost import GIB, plan


def test_a_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "vit_large", "--images", "1.28M", "--epochs", "400", "--gpus", "8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "vit_large, 329 M parameters; 1.28M images, 400 epochs, batch 4,096\n8 x H100 80 GB on 1 machine"
    )
    names = ["operations", "memory", "accumulate", "step", "speed", "data", "time", "bound by"]
    assert [line[:12].strip() for line in out.splitlines()[3:]] == names


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    words, printed = re.search(r"\$ torchmae (plan .*)\n((?:.|\n)*?)```", page).groups()  # type: ignore[union-attr]
    assert main(words.split()) == 0
    assert capsys.readouterr().out == printed
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| vit_")]
    assert len(rows) == 16
    for model, gpus, *figures in rows:
        cost = plan(PlanOptions(model=model, gpus=int(gpus)))
        memory = (cost.state_bytes + cost.activation_bytes) / GIB
        assert figures == [
            *(f"{cost.flops_per_image / 1e9:.1f}", f"{memory:.0f}", str(cost.accumulate), f"{cost.step_s * 1e3:,.0f}"),
            *(f"{cost.images_per_s:,.0f}", f"{cost.read_bytes_per_s / 1e9:.1f}", f"{cost.hours:,.1f}"),
            *(f"{cost.gpu_hours:,.0f}", cost.bound),
        ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h10"], "torchmae: gpu is 'h10'; did you mean 'h100'? choose from "),
        (["--gpus", "0"], "torchmae: gpus is 0; it must lie in [1, 100000]"),
        (["--model", "vit_larg"], "torchmae: model is 'vit_larg'; did you mean 'vit_large'?"),
        (["--images", "some"], "torchmae: images is 'some'; give a count"),
        (["--batch_size", "4"], "torchmae: batch_size is 4; it must lie in [8, 1000000]"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1
