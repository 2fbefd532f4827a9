from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from torchmae.bench.contenders import OURS
from torchmae.bench.processes import Process
from torchmae.config import ModelConfig, PretrainConfig

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_peak_is_what_weights_moments_and_a_batch_take_and_not_much_more() -> None:
    # 12288 x 512 weights twice: 48 MiB in fp32, their gradients and two moments each as much again; activations and
    # batch are small beside it.
    values = 2 * 12288 * 512 + 12288 + 512
    model = ModelConfig(preset="mlp", input_size=64, hidden_dim=512, output_relu=False, loss_on="all")
    config = PretrainConfig(model=model, batch_size=4, precision="fp32", threads=1)
    config = replace(config, mask=replace(config.mask, strategy="elements"))
    with Process(OURS, config, 1) as process:
        peak = process.introduce().peak_memory
    assert peak is not None
    assert 4 * 4 * values <= peak < 4 * 4 * values + 100 * MIB
