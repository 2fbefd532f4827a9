from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from torchmae.bench.contenders import OURS
from torchmae.bench.memory import peak_memory
from torchmae.config import ModelConfig, PretrainConfig
from torchmae.errors import ConfigError

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
MIB = 2**20


@linux
def test_the_peak_is_what_weights_moments_and_a_batch_take_and_not_much_more() -> None:
    # 12288 x 512 weights twice: 48 MiB in fp32, their gradients and two moments each as much again; activations and
    # batch are small beside it.
    values = 2 * 12288 * 512 + 12288 + 512
    model = ModelConfig(preset="mlp", input_size=64, hidden_dim=512, output_relu=False, loss_on="all")
    config = PretrainConfig(model=model, batch_size=4, precision="fp32", threads=1)
    config = replace(config, mask=replace(config.mask, strategy="elements"))
    peak = peak_memory(OURS, config)
    assert peak is not None
    assert 4 * 4 * values <= peak < 4 * 4 * values + 100 * MIB


@linux
def test_a_mistake_in_the_process_of_its_own_is_said() -> None:
    config = PretrainConfig(model=ModelConfig(preset="vit_tiny_32_p4", num_heads=5), threads=1)
    with pytest.raises(ConfigError, match="192 cannot be divided among 5 heads"):
        peak_memory(OURS, config)
