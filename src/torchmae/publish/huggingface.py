"""The formats of transformers: folders for ViTMAEForPreTraining and ViTModel, with names that all versions load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from torchmae.errors import CheckpointError, require
from torchmae.interop import names
from torchmae.nn.layers import LAYER_NORM_EPS, Block
from torchmae.nn.masking import num_keep, random_mask
from torchmae.nn.patches import gather
from torchmae.publish.exports import Check, Exported, compare, save_tensors, worst

_BICUBIC = 3  # PIL's number


def write_mae(folder: Path, exported: Exported) -> None:
    """Writes a ViTMAEForPreTraining."""
    model = exported.autoencoder
    block = cast(Block, model.decoder.blocks[0])
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": model.decoder.embed_dim,
        "decoder_num_hidden_layers": len(model.decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": _their_ratio(exported),
        "norm_pix_loss": model.target.norm_pix,
    }
    _write(folder, exported, config)
    weights = names.to_huggingface(names.to_official(model.state_dict()), "vit.")
    save_tensors(folder / "model.safetensors", weights)


def write_vit(folder: Path, exported: Exported) -> None:
    """Writes a ViTModel."""
    _write(folder, exported, {"architectures": ["ViTModel"], "model_type": "vit"})
    save_tensors(folder / "model.safetensors", names.to_huggingface(exported.encoder.state_dict(), ""))


@torch.no_grad()
def check_mae(folder: Path, exported: Exported) -> Check:
    """Loads the folder in transformers, with all parameters used, and compares loss and predictions."""
    transformers = require("transformers", "hf")
    model = exported.autoencoder
    theirs = _load(transformers.ViTMAEForPreTraining, folder)
    images, noise = exported.probe(), exported.noise()
    output = theirs(images, noise=noise)  # masks the patches with the largest numbers, as `random_mask` does
    mask = random_mask(noise, model.encoder.grid, exported.mask_ratio)
    ours = model(images, mask)
    by = f"transformers {transformers.__version__}"
    return worst(
        [
            compare(by, "predictions", gather(output.logits, mask.ids_masked), ours.pred),
            compare(by, "losses", output.loss, ours.loss),
        ]
    )


@torch.no_grad()
def check_vit(folder: Path, exported: Exported) -> Check:
    """Loads the folder in transformers, with all parameters used, and compares the tokens."""
    transformers = require("transformers", "hf")
    theirs = _load(transformers.ViTModel, folder, add_pooling_layer=False)
    images = exported.probe()
    encoded = exported.encoder(images)
    wanted = torch.cat([encoded.prefix, encoded.patches], dim=1)
    return compare(f"transformers {transformers.__version__}", "tokens", theirs(images).last_hidden_state, wanted)


def mae_usage(exported: Exported) -> str:
    """Python code that loads a ViTMAEForPreTraining."""
    return (
        "from transformers import ViTMAEForPreTraining\n\n"
        'model = ViTMAEForPreTraining.from_pretrained("FOLDER").eval()\n'
        f"loss = model(images).loss  # images: {exported.shape}\n"
    )


def vit_usage(exported: Exported) -> str:
    """Python code that loads a ViTModel."""
    return (
        "from transformers import ViTModel\n\n"
        'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False).eval()\n'
        f"tokens = model(images).last_hidden_state  # images: {exported.shape}; the first token is the class token\n"
    )


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    logging = require("transformers.utils.logging", "hf")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        if shown:
            logging.enable_progress_bar()
    odd = {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if odd:
        raise CheckpointError(f"the export was deleted, since transformers does not load it whole: {odd}")
    return model.eval()


def _their_ratio(exported: Exported) -> float:
    """The mask ratio for which transformers, which rounds down, keeps the same number of patches as torchmae."""
    length = exported.encoder.num_patches
    keep = num_keep(length, exported.mask_ratio)
    same = int(length * (1 - exported.mask_ratio)) == keep
    return exported.mask_ratio if same else 1 - (keep + 0.5) / length


def _write(folder: Path, exported: Exported, config: dict[str, Any]) -> None:
    """Writes config.json (`config` and the encoder's sizes) and preprocessor_config.json."""
    arguments, description = exported.encoder.arguments, exported.description
    height, width = exported.encoder.input_size
    encoder = {
        "image_size": height,
        "patch_size": arguments["patch_size"][0],
        "num_channels": arguments["in_chans"],
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": cast(Block, exported.encoder.blocks[0]).mlp.fc1.out_features,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / max((description.scale or {"uint8": 255.0}).values()),
        "do_normalize": True,
        "image_mean": list(description.mean),
        "image_std": list(description.std),
    }
    for name, values in (("config.json", {**encoder, **config}), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
