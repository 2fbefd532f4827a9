from __future__ import annotations

import os

import pytest
import torch

from torchmae.bench import processes
from torchmae.bench.contenders import OURS
from torchmae.bench.processes import Process, Stage
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.errors import ConfigError
from torchmae.threads import SPIN_COUNT

CONFIG = PretrainConfig(
    model=ModelConfig(
        preset="vit_digits", in_chans=1, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1
    ),
    batch_size=64,
    threads=1,
    precision="fp32",
)


def test_a_mistake_in_the_other_process_is_said_here() -> None:
    config = PretrainConfig(model=ModelConfig(preset="vit_tiny_32_p4", num_heads=5), threads=1)
    with Process(OURS, config, 1) as process:
        with pytest.raises(ConfigError, match="192 cannot be divided among 5 heads"):
            process.introduce()
        with pytest.raises(ConfigError, match="192 cannot be divided among 5 heads"):
            process.turn()


def test_a_process_that_the_kernel_killed_is_said_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with Process(OURS, CONFIG, 1) as process:
        process._process.kill()
        with pytest.raises(ConfigError, match="^batches of 64 do not fit into memory; lower batch_size$"):
            process.introduce()


def test_memory_that_does_not_suffice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(processes, "build", build)
    with pytest.raises(ConfigError, match="^batches of 64 do not fit into memory; lower batch_size$"):
        Stage(OURS, CONFIG, 1)


def test_without_a_number_of_steps_a_turn_takes_about_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def seconds_of(work: object, times: int, device: torch.device) -> float:
        taken.append(times)
        return 0.01

    monkeypatch.setattr(processes, "seconds_of", seconds_of)
    stage = Stage(OURS, CONFIG, None)
    assert [stage.turn(), stage.turn()] == [6400.0, 6400.0]
    assert taken == [1, 2, 1, 100, 100]  # the first step, warm-up, one to see how long it takes, two turns
    assert stage.introduce().first_step_s == 0.01


@pytest.mark.parametrize(
    ("code", "given", "seen"),
    [(OURS, None, SPIN_COUNT), (OURS, "7", "7"), ("transformers", SPIN_COUNT, None), ("transformers", "7", "7")],
)
def test_threads_wait_as_those_of_the_code_do(
    code: str, given: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    with processes._threads_of(code):
        assert os.environ.get("GOMP_SPINCOUNT") == seen
    assert os.environ.get("GOMP_SPINCOUNT") == given
