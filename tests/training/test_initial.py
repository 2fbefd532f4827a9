from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchmae import presets
from torchmae.config import ModelConfig
from torchmae.errors import CheckpointError, ConfigError
from torchmae.interop.weights import Weights, initialise
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.initial import adopt_shape, read_initial
from torchmae.training.saved_model import Description, write_description, write_weights

ARGUMENTS = presets.arguments(
    "vit_digits", depth=1, embed_dim=16, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
)


def run(folder: Path, arguments: dict[str, Any] = ARGUMENTS) -> Path:
    torch.manual_seed(0)
    model = presets.construct(arguments)
    write_description(folder / "model.json", Description(arguments, (0.3,), (0.2,), {}, None, "0.1.0"))
    write_weights(folder / "model.safetensors", model.state_dict())
    return folder


def changed(weights: Weights, **changes: Any) -> Weights:
    return replace(weights, **changes)


def test_a_run_gives_its_weights_and_its_shape(tmp_path: Path) -> None:
    weights = read_initial(run(tmp_path))
    config = adopt_shape(ModelConfig(preset="vit_tiny_32_p4", drop_path=0.1), weights)
    for name in ("patch_size", "embed_dim", "depth", "num_heads", "decoder", "decoder_embed_dim", "decoder_depth"):
        assert getattr(config, name) == ARGUMENTS[name]
    assert (config.input_size, config.norm_pix, config.drop_path, config.in_chans) == ((8, 8), False, 0.1, None)
    values = {name: getattr(config, name) for name in ARGUMENTS}
    model = presets.construct({**values, "in_chans": 1})
    assert isinstance(model, MaskedAutoencoder)
    initialise(model, weights)
    assert torch.equal(model.encoder.blocks[0].mlp.fc1.weight, weights.encoder["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("settings", "weights", "expected"),
    [
        ({"input_size": (12, 8)}, {}, {"input_size": (12, 8), "decoder_embed_dim": 16}),
        ({"norm_pix": True}, {}, {"norm_pix": True, "decoder_embed_dim": 192}),
        ({}, {"decoder": None}, {"norm_pix": False, "decoder_embed_dim": 192}),
        ({"decoder_depth": 7}, {"decoder": None}, {"decoder_depth": 7}),
    ],
    ids=["size", "another target", "no decoder", "no decoder, one asked for"],
)
def test_what_settings_decide(tmp_path: Path, settings: Any, weights: Any, expected: Any) -> None:
    given = changed(read_initial(run(tmp_path)), **weights)
    config = adopt_shape(ModelConfig(preset="vit_tiny_32_p4", **settings), given)
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_preset_is_named_after_the_shape(tmp_path: Path) -> None:
    weights = read_initial(run(tmp_path))
    base = {**weights.arguments, "embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": (16, 16)}
    config = adopt_shape(ModelConfig(), changed(weights, arguments={**base, "input_size": (224, 224)}))
    assert (config.preset, config.input_size) == ("vit_base", (224, 224))


def test_a_target_that_is_not_known_is_the_settings(tmp_path: Path) -> None:
    weights = read_initial(run(tmp_path))
    unknown = {name: value for name, value in weights.arguments.items() if name != "norm_pix"}
    config = adopt_shape(ModelConfig(preset="vit_base", norm_pix=True), changed(weights, arguments=unknown))
    assert (config.norm_pix, config.decoder_embed_dim) == (True, 16)


def test_weights_of_others(tmp_path: Path) -> None:
    model = presets.construct(presets.arguments("vit_tiny", depth=1, input_size=32))
    assert isinstance(model, MaskedAutoencoder)
    save_file(model.encoder.state_dict(), tmp_path / "x.safetensors")
    weights = read_initial(tmp_path / "x.safetensors")
    assert (weights.decoder, weights.arguments["num_heads"]) == (None, 3)


def test_the_mlp_model_neither_gives_nor_takes(tmp_path: Path) -> None:
    run(tmp_path, presets.arguments("mlp", input_size=(8, 8), in_chans=1, hidden_dim=12))
    with pytest.raises(
        ConfigError, match="holds a model without patches; give --init-from weights of a vision transformer"
    ):
        read_initial(tmp_path)
    (tmp_path / "vit").mkdir()
    with pytest.raises(ConfigError, match="cannot start from a vision transformer's weights"):
        adopt_shape(ModelConfig(preset="mlp"), read_initial(run(tmp_path / "vit")))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        read_initial(tmp_path / "none")
