"""Losses recorded before the code was made faster: what is computed must not change with how."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchmae import presets
from torchmae.config import OptimConfig
from torchmae.nn.masking import Masker
from torchmae.random import Purpose, uniform
from torchmae.training.optim import build_optimizers, lr_factor, set_lr

STEPS = 12

# Recorded with torch 2.15.0 on a processor, before Muon was batched and the decoder was split: steps 1, 4, 7, 10
# and 12.
GOLDEN = {
    ("self", "adamw"): (1.6787353, 1.2590085, 1.1176653, 1.0595732, 1.0515151),
    ("cross", "adamw"): (1.7660134, 1.3173441, 1.1333346, 1.0852278, 1.0731983),
    ("cross", "muon"): (1.7660134, 1.3684129, 1.2334327, 1.1433704, 1.1276637),
}


def curve(decoder: str, optimizer: str) -> list[float]:
    """Losses of a small model on fixed smooth images, in fp32."""
    torch.manual_seed(0)
    model = presets.build(
        "vit_tiny_32_p4", depth=2, embed_dim=48, num_heads=3, decoder=decoder, decoder_embed_dim=32, decoder_depth=2,
        decoder_num_heads=2, input_size=(32, 16),
    )  # fmt: skip
    config = OptimConfig(name=optimizer, lr=2e-3, muon_lr=5e-3, warmup=0.25)
    optimizers = build_optimizers(model, config, 16)
    index = np.arange(16)
    coarse = torch.from_numpy(uniform(1, 0, index, Purpose.CROP, 3 * 8 * 4)).view(16, 3, 8, 4)
    images = torch.nn.functional.interpolate(coarse, size=(32, 16), mode="bilinear") * 2 - 1
    losses = []
    for step in range(STEPS):
        set_lr(optimizers, lr_factor(step, STEPS, config))
        noise = torch.from_numpy(uniform(0, step, index, Purpose.MASK, Masker(model.encoder, "random").noise_count))
        loss = model(images, Masker(model.encoder, "random", 0.75).from_noise(noise)).loss
        loss.backward()
        for item in optimizers:
            item.step()
            item.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("decoder", "optimizer"), GOLDEN)
def test_the_curve_is_the_recorded_one(decoder: str, optimizer: str) -> None:
    golden = GOLDEN[decoder, optimizer]
    losses = curve(decoder, optimizer)
    assert golden[-1] < 0.98 * golden[0]
    # Muon's products are in bf16, and another processor may round them otherwise
    assert [losses[step] for step in (0, 3, 6, 9, 11)] == pytest.approx(
        golden, rel=2e-3 if optimizer == "muon" else 2e-5
    )
