"""The three measurements on the smallest of networks: what they count, not how fast this machine is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from torchmae.bench import measure
from torchmae.bench.contenders import OURS, PHASES
from torchmae.bench.measure import BARE, measure_data, measure_step, measure_train, take_turns
from torchmae.config import DataConfig, ModelConfig, PretrainConfig
from torchmae.config.bench import BenchData, BenchStep, BenchTrain
from torchmae.errors import ConfigError, Interrupted
from torchmae.nn.flops import count_flops
from torchmae.presets import build

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
CONFIG = PretrainConfig(
    model=ModelConfig(preset="vit_digits", in_chans=1, **SIZES),  # type: ignore[arg-type]
    batch_size=64,
    threads=1,
    precision="fp32",
    log_every=3,
)


class Heard:
    """Progress that is kept."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.lines.append((what, done, total))


def test_a_step_beside_others_whose_settings_may_differ() -> None:
    pytest.importorskip("timm")
    heard = Heard()
    deep = replace(CONFIG, model=replace(CONFIG.model, depth=2), precision="bf16")
    configs = {OURS: CONFIG, "timm-blocks": deep}
    report = measure_step(configs, BenchStep(rounds=2, steps=1), heard)
    names = ["torchmae, fp32", "timm-blocks, bf16"]
    assert [result.name for result in report.results] == names
    flops = [count_flops(build("vit_digits", **SIZES | {"depth": depth}), 0.75).training for depth in (1, 2)]
    peaks = report.environment["peak_flops_per_s"]
    assert peaks.keys() == {"fp32", "bf16"}
    for result, expected, precision in zip(report.results, flops, ("fp32", "bf16"), strict=True):
        assert len(result.images_per_s) == 2 and min(result.images_per_s) > 0
        assert tuple(result.shares) == PHASES and sum(result.shares.values()) == pytest.approx(1)
        assert result.figures["flops_per_image"] == expected
        assert result.figures["share_of_peak"] == pytest.approx(result.median * expected / peaks[precision])
        assert (result.figures["first_step_s"] or 0) > 0
    assert heard.lines == [("first steps", i, 2) for i in (1, 2)] + [("timing steps", i, 2) for i in (1, 2)]
    assert report.title == "vit_digits, 1 x 8 x 8, batch 64, mask 0.75"
    assert report.settings.keys() == configs.keys()
    counts = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in zip(names, flops, strict=True))
    assert report.notes[0].endswith(f": {counts}.")


def test_what_a_peer_cannot_do_is_said_before_anything_is_measured() -> None:
    heard = Heard()
    config = replace(CONFIG, model=replace(CONFIG.model, decoder="cross"))
    for code in ("lightly", "timm-blocks"):
        with pytest.raises(ConfigError, match=f"{code} has no equal of this model.decoder"):
            measure_step({OURS: config, code: config}, BenchStep(), heard)
    assert heard.lines == []


def test_turns_alternate_and_every_round_gives_each_a_figure() -> None:
    order: list[str] = []
    rounds: list[int] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    figures = take_turns({"a": lambda: turn("a"), "b": lambda: turn("b")}, 3, rounds.append)
    assert "".join(order) == "abbaab"
    assert figures == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert rounds == [1, 2, 3]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(20):
        pixels = noise.integers(0, 256, (12 + i % 3, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_loading_beside_torchvision(photographs: Path) -> None:
    config = replace(
        CONFIG,
        model=ModelConfig(preset="vit_digits"),
        data=DataConfig(source=str(photographs), num_workers=0),
        batch_size=4,
    )
    heard = Heard()
    report = measure_data(config, BenchData(rounds=2, batches=2, against="torchvision"), heard)
    assert [result.name for result in report.results] == ["torchmae", "torchvision"]
    for result in report.results:
        assert len(result.images_per_s) == 2
        assert result.figures == {"per_worker": result.median}
    assert report.title == f"{photographs}: 16 images to 8 x 8, batch 4"  # a fifth is held out
    assert report.notes[0].startswith("torchmae takes images from files (num_workers 0); ")
    assert heard.lines[-1] == ("timing batches", 2, 2)


def test_torchvisions_batches_are_like_ours(photographs: Path) -> None:
    seen: dict[str, torch.Tensor] = {}
    config = replace(
        CONFIG,
        model=ModelConfig(preset="vit_digits"),
        data=DataConfig(source=str(photographs), num_workers=0, crop_scale=(1.0, 1.0)),
        batch_size=16,
    )

    def first(stream: object, skip: int, batches: int, device: torch.device) -> float:
        batch = next(stream())  # type: ignore[operator]
        seen[str(len(seen))] = batch
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "turn", first)
        measure_data(config, BenchData(rounds=1, against="torchvision"), Heard())
    ours, theirs = seen.values()
    assert ours.shape == theirs.shape == (16, 3, 8, 8)
    assert ours.dtype == theirs.dtype == torch.float32
    assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=0.1)
    assert theirs.std().item() == pytest.approx(ours.std().item(), rel=0.15)


def test_images_in_memory_have_no_workers_and_no_peer() -> None:
    report = measure_data(CONFIG, BenchData(rounds=1, batches=2), Heard())
    assert report.results[0].figures == {}
    assert "from memory, in this process" in report.notes[0]
    with pytest.raises(ConfigError, match=r"torchvision cannot be timed on digits/\d+; give --data a folder"):
        measure_data(CONFIG, BenchData(rounds=1, batches=2, against="torchvision"), Heard())


def test_the_loop_beside_the_bare_step() -> None:
    heard = Heard()
    report = measure_train(CONFIG, BenchTrain(rounds=2, steps=3), heard)
    loop, bare = report.results
    assert (loop.name, bare.name) == ("torchmae", BARE)
    assert len(loop.images_per_s) == len(bare.images_per_s) == 2
    assert tuple(loop.shares) == (*PHASES, "data", "loop")
    assert sum(loop.shares.values()) == pytest.approx(1) and min(loop.shares.values()) >= 0
    assert heard.lines[-1] == ("timing the loop", 2, 2)
    assert report.settings["model"]["in_chans"] == 1


def test_the_loops_clock_counts_what_lies_between_evaluations() -> None:
    bare = SimpleNamespace(turn=lambda steps: 200.0)
    turns = measure._Turns(bare, BenchTrain(rounds=2), Heard())  # type: ignore[arg-type]

    def window(seconds: float, images_per_s: float, wait: float) -> None:
        turns.log("train", 0, {"seconds": seconds, "images_per_s": images_per_s, "data_wait": wait})

    window(10.0, 1.0, 1.0)  # warm-up: not counted
    turns.log("val", 0, {"loss": 1.0})
    assert turns.evaluate(1) == {}
    window(12.0, 100.0, 0.5)
    window(14.0, 50.0, 0.0)
    assert turns.evaluate(2) == {}
    window(18.0, 160.0, 0.25)
    with pytest.raises(measure._Enough):
        turns.evaluate(3)
    assert turns.rounds == [(75.0, 200.0, 0.25), (160.0, 200.0, 0.25)]


def test_a_stopped_loop_does_not_offer_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretrain(*args: object, **kwargs: object) -> None:
        raise Interrupted("stopped", "go on with: torchmae pretrain --resume nowhere", 15)

    monkeypatch.setattr(measure, "pretrain", pretrain)
    with pytest.raises(Interrupted, match="^the benchmark was stopped; run it again$") as caught:
        measure_train(CONFIG, BenchTrain(rounds=1, steps=1), Heard())
    assert caught.value.exit_status == 128 + 15
