"""The format of the released MAE checkpoints: {"model": state_dict} with timm's names and the decoder's."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from torchmae.interop import names
from torchmae.interop.reading import read_weights
from torchmae.interop.weights import build
from torchmae.nn.layers import Block
from torchmae.nn.masking import random_mask
from torchmae.publish.exports import Check, Exported, compare

FILE = "checkpoint.pth"


def write(folder: Path, exported: Exported) -> None:
    """Writes checkpoint.pth: "model", and "args" for what parameters do not show (heads, target, normalisation)."""
    model, description = exported.autoencoder, exported.description
    arguments = {
        "norm_pix_loss": model.target.norm_pix,
        "num_heads": exported.encoder.arguments["num_heads"],
        "decoder_num_heads": cast(Block, model.decoder.blocks[0]).attn.num_heads,
        "mask_ratio": exported.mask_ratio,
        "mean": list(description.mean),
        "std": list(description.std),
    }
    weights = {name: tensor.clone() for name, tensor in names.to_official(model.state_dict()).items()}
    torch.save({"model": weights, "args": arguments}, folder / FILE)


@torch.no_grad()
def check(folder: Path, exported: Exported) -> Check:
    """Reads the file back as a foreign checkpoint and compares predictions."""
    model, images = exported.autoencoder, exported.probe()
    mask = random_mask(exported.noise(), model.encoder.grid, exported.mask_ratio)
    again = build(read_weights(folder / FILE))
    return compare("read back", "predictions", again(images, mask).pred, model(images, mask).pred)


def usage(_: Exported) -> str:
    """Python code that loads the file."""
    return f'import torch\n\nweights = torch.load("FOLDER/{FILE}", weights_only=True)["model"]\n'
