from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import summary, train_records

from torchmae.report.run import Run, duration, short_count

FINISHED = Run(
    path=Path("runs/a"),
    config={"mask": {"strategy": "random", "ratio": 0.75}, "model": {"preset": "vit_digits"}},
    train=tuple(train_records()),
    val=(),
    baseline=(),
    summary=summary(),
    environment={"device": "cpu"},
    pictures=(),
    feature_pictures=(),
    evaluations=(),
    bad_files=(),
)


def test_one_sentence_says_what_was_trained() -> None:
    assert FINISHED.sentence == (
        "A masked autoencoder (vit_digits) was pre-trained on 1,500 images from digits (8×8 pixels), "
        "with 75% of their 2×2-pixel patches masked, for 2 epochs in 1 min 15 s on the CPU."
    )


@pytest.mark.parametrize(
    ("size", "patch", "words"),
    [
        ([400], [20], "signals from digits (400 samples), with 75% of their 20-sample patches masked"),
        (
            [4, 8, 8],
            [2, 2, 2],
            "volumes from digits (4×8×8 voxels), with 75% of their 2×2×2-voxel patches masked",
        ),
        ([32, 64], [4, 8], "images from digits (32×64 pixels), with 75% of their 4×8-pixel patches masked"),
    ],
)
def test_other_dimensions_have_other_names(size: list[int], patch: list[int], words: str) -> None:
    assert words in replace(FINISHED, summary=summary(input_size=size, patch_size=patch)).sentence


@pytest.mark.parametrize(("strategy", "share"), [("elements", 75), ("elements_inverted", 25)])
def test_element_wise_masks_hide_values(strategy: str, share: int) -> None:
    run = replace(FINISHED, config={"mask": {"strategy": strategy, "ratio": 0.75}}, summary=summary(patch_size=[]))
    assert f"with {share}% of their values masked" in run.sentence


def test_an_unfinished_run_is_described_from_its_configuration_and_progress() -> None:
    config = {
        "data": {"source": "/photos/cats"},
        "model": {"preset": "vit_tiny", "input_size": 64, "patch_size": [8, 8]},
        "mask": {"ratio": 0.6},
    }
    run = replace(FINISHED, config=config, summary={})
    assert run.sentence == (
        "A masked autoencoder (vit_tiny) was pre-trained on the images from /photos/cats (64×64 pixels), "
        "with 60% of their 8×8-pixel patches masked, for 2 epochs in 50 s on the CPU."
    )
    assert run.title == "vit_tiny on cats"
    assert run.facts == [("Steps", "100", ""), ("Training time", "50 s", "400 images per second")]


def test_nothing_known_is_still_a_sentence() -> None:
    run = replace(FINISHED, config={}, train=(), summary={}, environment={})
    assert run.sentence == "A masked autoencoder was pre-trained on the images from unknown data."
    assert run.facts == []


def test_facts_of_a_finished_run() -> None:
    assert FINISHED.facts == [
        ("Training set", "1,500", "1,000 held out"),
        ("Encoder parameters", "1.23M", "decoder 45.6k"),
        ("Steps", "100", "3k images seen"),
        ("Training time", "1 min 15 s", "40 images per second"),
    ]


def test_the_state_is_said_unless_finished() -> None:
    assert FINISHED.state == ""
    assert "was interrupted at step 40" in replace(FINISHED, summary=summary(state="interrupted", steps=40)).state
    assert "has not finished: it stands at step 100" in replace(FINISHED, summary={}).state
    assert "before its first figures" in replace(FINISHED, summary={}, train=()).state


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.12, "4.1 s"), (9.97, "10 s"), (59.7, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(950, "950"), (12_340, "12.3k"), (5_410_000, "5.41M"), (2e9, "2G")])
def test_counts(count: float, text: str) -> None:
    assert short_count(count) == text
