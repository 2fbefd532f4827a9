from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from torchmae import presets
from torchmae.bench.contenders import OURS, build, model_arguments, peer_sizes
from torchmae.bench.peers import PEERS
from torchmae.config import MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from torchmae.errors import ConfigError
from torchmae.nn.masking import num_keep, random_mask

MODEL = ModelConfig(
    preset="vit_tiny_32_p4",
    input_size=16,
    in_chans=2,
    embed_dim=24,
    depth=2,
    num_heads=2,
    mlp_ratio=3.0,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=4,
)
CONFIG = PretrainConfig(model=MODEL, batch_size=4, threads=1, precision="fp32", optim=OptimConfig(lr=1e-3))
PACKAGES = {"transformers": "transformers", "timm": "timm", "lightly": "lightly.models"}


def require(code: str) -> None:
    if code in PACKAGES:
        pytest.importorskip(PACKAGES[code])


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("code", [OURS, *PEERS])
def test_a_step_trains_every_weight(code: str) -> None:
    require(code)
    contender = build(code, CONFIG)
    before = {name: p.detach().clone() for name, p in contender.model.named_parameters() if p.requires_grad}
    losses = [contender.run() for _ in range(3)]
    assert all(loss.shape == () and not loss.requires_grad and loss.isfinite() for loss in losses)
    same = [name for name, p in contender.model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert same == []
    assert contender.images.shape == (4, 2, 16, 16)
    assert (contender.runtime.precision, contender.runtime.threads) == ("fp32", 1)


@pytest.mark.parametrize("code", PEERS)
def test_peers_have_as_many_weights_and_the_same_images(code: str) -> None:
    require(code)
    ours, theirs = build(OURS, CONFIG), build(code, CONFIG)
    assert trained(theirs.model) == trained(ours.model)
    assert torch.equal(theirs.images, ours.images)


# That of transformers' model equals ours in tests/nn/test_parity.py.
@pytest.mark.parametrize("norm_pix", [True, False])
def test_lightlys_loss_is_ours_with_our_weights_and_mask(norm_pix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    require("lightly")
    config = replace(CONFIG, model=replace(MODEL, norm_pix=norm_pix))
    ours, theirs = build(OURS, config), build("lightly", config)
    names = {"encoder.": "encoder.vit.", "decoder.embed.": "decoder_embed.", "decoder.pred.": "decoder_pred."}
    weights = {}
    for name, value in ours.model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(prefix, "") + name.removeprefix(prefix)] = value
    # Theirs has a row of zeros for the class token.
    weights["decoder.pos_embed"] = torch.nn.functional.pad(weights["decoder.pos_embed"], (0, 0, 1, 0))
    theirs.model.load_state_dict(weights)
    mask = random_mask(torch.rand(4, 16), (4, 4), 0.75)
    tokens = torch.cat([torch.zeros(4, 1, dtype=torch.int64), mask.ids_keep + 1], dim=1), mask.ids_masked + 1
    monkeypatch.setattr(theirs.model._utils, "random_token_mask", lambda *args, **kwargs: tokens)
    expected = ours.model(ours.images, mask).loss
    torch.testing.assert_close(theirs.model(theirs.images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_timms_loss_is_ours_with_our_weights_and_mask(norm_pix: bool) -> None:
    require("timm")
    config = replace(CONFIG, model=replace(MODEL, norm_pix=norm_pix))
    ours, theirs = build(OURS, config), build("timm", config)
    names = {"encoder.": "vit.", "decoder.blocks.": "decoder.", "decoder.pos_embed": "decoder_pos", "decoder.": ""}
    weights = {}
    for name, value in ours.model.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        weights[names[prefix] + name.removeprefix(prefix)] = value
    weights["decoder_pos"] = torch.nn.functional.pad(weights["decoder_pos"], (0, 0, 1, 0))  # a row for the class token
    theirs.model.load_state_dict(weights)
    noise = torch.rand(4, 16)
    expected = ours.model(ours.images, random_mask(noise, (4, 4), 0.75)).loss
    torch.testing.assert_close(theirs.model(theirs.images, noise), expected, rtol=1e-5, atol=1e-5)


def test_our_masks_differ_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = build(OURS, CONFIG)
    masks: list[Any] = []
    contender.model.register_forward_pre_hook(lambda _, args: masks.append(args[1].ids_keep))
    contender.run()
    contender.run()
    assert not torch.equal(*masks)


def test_lightly_hides_as_many_patches_and_counts_hidden_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    require("lightly")
    contender = build("lightly", replace(CONFIG, mask=MaskConfig(ratio=0.6)))
    utils = contender.model._utils
    masks = []
    draw = utils.random_token_mask
    monkeypatch.setattr(utils, "random_token_mask", lambda *a, **k: masks.append(draw(*a, **k)) or masks[-1])
    contender.run()
    keep, hidden = masks[0]
    assert (keep[:, 0] == 0).all()  # the class token
    assert keep.shape[1] - 1 == num_keep(16, 0.6)
    assert keep.shape[1] + hidden.shape[1] == 17


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75, 0.9])
def test_a_peer_keeps_as_many_patches(ratio: float) -> None:
    config = replace(CONFIG, mask=MaskConfig(ratio=ratio))
    sizes = peer_sizes(config, model_arguments(config), "transformers")
    assert int(16 * (1 - sizes.mask_ratio)) == num_keep(16, ratio)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"decoder": "cross"}, "model.decoder"),
        ({"class_token": False}, "model.class_token"),
        ({"drop_path": 0.1}, "model.drop_path"),
        ({"input_size": (16, 32)}, "model.input_size"),
        ({"patch_size": (4, 8)}, "model.patch_size"),
    ],
)
def test_what_a_peer_cannot_do_is_named(change: dict[str, Any], name: str) -> None:
    config = replace(CONFIG, model=replace(MODEL, **change))
    with pytest.raises(ConfigError, match=f"transformers has no equal of this {name}; "):
        build("transformers", config)


def test_other_masks_and_networks_have_no_peer() -> None:
    with pytest.raises(ConfigError, match="no equal of this mask.strategy"):
        build("transformers", replace(CONFIG, mask=MaskConfig(strategy="block")))
    with pytest.raises(ConfigError, match="no equal of this model.preset"):
        build("transformers", replace(CONFIG, model=ModelConfig(preset="mlp")))


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers is not installed; pip install 'torchmae\[bench\]'"):
        build("transformers", CONFIG)


def test_arguments_are_the_presets_and_the_settings() -> None:
    assert model_arguments(PretrainConfig(model=ModelConfig(preset="vit_base"))) == presets.arguments("vit_base")
    assert model_arguments(CONFIG)["embed_dim"] == 24
