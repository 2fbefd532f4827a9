"""transformers: folders for ViTMAEForPreTraining and ViTModel, parameters under the names that all versions know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from torchmae.errors import CheckpointError, ConfigError, require
from torchmae.interop import names
from torchmae.interop.exports import (
    Check,
    Exported,
    compare,
    require_paper_decoder,
    require_square,
    save_tensors,
    worst,
)
from torchmae.nn.classifier import Classifier
from torchmae.nn.layers import LAYER_NORM_EPS, Block
from torchmae.nn.masking import num_keep, random_mask
from torchmae.nn.patches import gather

_BICUBIC = 3  # PIL's number


def write_mae(folder: Path, exported: Exported) -> None:
    """Writes a ViTMAEForPreTraining; ConfigError for a model that it cannot be."""
    model = require_paper_decoder(exported, "hf-mae")
    block = model.decoder.blocks[0]
    assert isinstance(block, Block)
    config = {
        **_encoder_config(exported),
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": model.decoder.embed_dim,
        "decoder_num_hidden_layers": len(model.decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": _their_ratio(exported),
        "norm_pix_loss": model.target.norm_pix,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _processor(exported))
    weights = names.to_huggingface(names.to_official(model.state_dict()), "vit.")
    save_tensors(folder / "model.safetensors", weights)


def write_vit(folder: Path, exported: Exported) -> None:
    """Writes a ViTModel; ConfigError for a model that it cannot be."""
    require_square(exported, "hf-vit")
    if isinstance(exported.model, Classifier):
        raise ConfigError(
            "ViTForImageClassification reads the class token and this classifier the mean of the patches",
            "use --to timm, which transformers' AutoModelForImageClassification loads too",
        )
    config = {**_encoder_config(exported), "architectures": ["ViTModel"], "model_type": "vit"}
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _processor(exported))
    save_tensors(folder / "model.safetensors", names.to_huggingface(exported.encoder.state_dict(), ""))


@torch.no_grad()
def check_mae(folder: Path, exported: Exported) -> Check:
    """Loads the folder in transformers, nothing missing or left over, and compares loss and predictions."""
    transformers = require("transformers", "hf")
    model = require_paper_decoder(exported, "hf-mae")
    theirs = _load(transformers.ViTMAEForPreTraining, folder)
    images, noise = exported.probe(), exported.noise()
    output = theirs(images, noise=noise)  # they hide the patches with the largest numbers, as ours does
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
    """Loads the folder in transformers, nothing missing or left over, and compares the tokens."""
    transformers = require("transformers", "hf")
    theirs = _load(transformers.ViTModel, folder, add_pooling_layer=False)
    images = exported.probe()
    encoded = exported.encoder(images)
    wanted = torch.cat([encoded.prefix, encoded.patches], dim=1)
    return compare(f"transformers {transformers.__version__}", "tokens", theirs(images).last_hidden_state, wanted)


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
    """The mask ratio with which transformers, which rounds the count of visible patches down, keeps as many as ours."""
    length = exported.encoder.num_patches
    keep = num_keep(length, exported.mask_ratio)
    same = int(length * (1 - exported.mask_ratio)) == keep
    return exported.mask_ratio if same else 1 - (keep + 0.5) / length


def _encoder_config(exported: Exported) -> dict[str, Any]:
    arguments = exported.encoder.arguments
    block = exported.encoder.blocks[0]
    assert isinstance(block, Block)
    return {
        "image_size": arguments["input_size"][0],
        "patch_size": arguments["patch_size"][0],
        "num_channels": arguments["in_chans"],
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "torch_dtype": "float32",
    }


def _processor(exported: Exported) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": exported.input_size[0], "width": exported.input_size[1]},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / next(iter((exported.scale or {"uint8": 255.0}).values())),
        "do_normalize": True,
        "image_mean": list(exported.mean),
        "image_std": list(exported.std),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
