"""The released MAE checkpoints' layout: {"model": state_dict} with the decoder's parameters beside timm's names."""

from __future__ import annotations

from pathlib import Path

import torch

from torchmae.interop import names
from torchmae.interop.exports import Check, Exported, compare, require_paper_decoder
from torchmae.interop.reading import read_weights
from torchmae.interop.weights import build
from torchmae.nn.layers import Block
from torchmae.nn.masking import random_mask

FILE = "checkpoint.pth"


def write(folder: Path, exported: Exported) -> None:
    """Writes checkpoint.pth; ConfigError for a model that the layout cannot hold.

    Beside "model" stands "args", a dictionary of what the parameters do not show: heads, target, normalisation.
    """
    model = require_paper_decoder(exported, "official")
    block = model.decoder.blocks[0]
    assert isinstance(block, Block)
    arguments = {
        "norm_pix_loss": model.target.norm_pix,
        "num_heads": exported.encoder.arguments["num_heads"],
        "decoder_num_heads": block.attn.num_heads,
        "mask_ratio": exported.mask_ratio,
        "mean": list(exported.mean),
        "std": list(exported.std),
    }
    weights = {name: tensor.clone() for name, tensor in names.to_official(model.state_dict()).items()}
    torch.save({"model": weights, "args": arguments}, folder / FILE)


@torch.no_grad()
def check(folder: Path, exported: Exported) -> Check:
    """Reads the file back, by way of its names, and compares predictions."""
    model = require_paper_decoder(exported, "official")
    again = build(read_weights(folder / FILE))
    images = exported.probe()
    mask = random_mask(exported.noise(), model.encoder.grid, exported.mask_ratio)
    return compare("read back", "predictions", again(images, mask).pred, model(images, mask).pred)
