from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import exported, mae

from torchmae.cli import main
from torchmae.errors import CheckpointError, ConfigError
from torchmae.interop import names
from torchmae.interop.reading import IMAGENET_MEAN, is_foreign, read_weights
from torchmae.interop.weights import build
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import random_mask
from torchmae.publish import timm as timm_format

# Heads of a width that the released checkpoints have are known, so these sizes need no config.json.
RELEASED: dict[str, Any] = {
    "input_size": (32, 32),
    "patch_size": (16, 16),
    "embed_dim": 192,
    "num_heads": 3,
    "depth": 1,
    "decoder_embed_dim": 512,
    "decoder_num_heads": 16,
    "decoder_depth": 1,
}


@pytest.fixture(scope="module")
def released() -> MaskedAutoencoder:
    return mae(**RELEASED)


def save(path: Path, model: MaskedAutoencoder, keep: Any = lambda name: True, **beside: Any) -> Path:
    state = {name: value for name, value in names.to_official(model.state_dict()).items() if keep(name)}
    torch.save({"model": state, **beside}, path)
    return path


def of_encoder(name: str) -> bool:
    return not name.startswith(("decoder", "mask"))


def predictions(model: MaskedAutoencoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    size = tuple(g * p for g, p in zip(model.encoder.grid, model.patch_size, strict=True))
    images = torch.randn(2, model.encoder.in_chans, *size, generator=generator)
    mask = random_mask(torch.rand(2, model.encoder.num_patches, generator=generator), model.encoder.grid, 0.75)
    with torch.no_grad():
        return model(images, mask).pred


def test_a_released_checkpoint_with_its_decoder(tmp_path: Path, released: MaskedAutoencoder) -> None:
    path = save(tmp_path / "mae_full.pth", released)
    weights = read_weights(path)
    assert weights.norm_pix is None
    assert weights.mean == IMAGENET_MEAN
    assert {name: weights.arguments[name] for name in RELEASED} == RELEASED
    known = read_weights(path, norm_pix=True)
    assert torch.equal(predictions(build(known)), predictions(released))


def test_a_target_that_the_file_does_not_say_is_asked_for(tmp_path: Path, released: MaskedAutoencoder) -> None:
    model = build(read_weights(save(tmp_path / "mae_full.pth", released)))
    with pytest.raises(CheckpointError, match="decoder's target was; say it with --target normalised"):
        predictions(model)


@pytest.mark.parametrize("stored", [argparse.Namespace(norm_pix_loss=False), {"norm_pix_loss": False}])
def test_the_options_of_a_training_say_the_target(tmp_path: Path, released: MaskedAutoencoder, stored: Any) -> None:
    path = save(tmp_path / "checkpoint-1.pth", released, args=stored, epoch=1)
    assert read_weights(path).norm_pix is False
    with pytest.raises(ConfigError, match=r"target is given, but .* it was pixels; leave --target out"):
        read_weights(path, norm_pix=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_encoder_alone(tmp_path: Path, released: MaskedAutoencoder, suffix: str) -> None:
    path = tmp_path / f"vit{suffix}"
    if suffix == ".pth":
        save(path, released, of_encoder)
    else:
        save_file(released.encoder.state_dict(), path)
    weights = read_weights(path)
    assert weights.decoder is None
    assert weights.no_decoder == f"{path} holds an encoder only"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(build(weights).encode(images), released.encode(images))


def test_half_a_decoder_is_not_taken(tmp_path: Path, released: MaskedAutoencoder) -> None:
    path = save(tmp_path / "x.pth", released, lambda name: name != "decoder_embed.bias")
    weights = read_weights(path)
    assert weights.decoder is None
    assert weights.no_decoder == f"the decoder of {path} cannot be used: it lacks embed.bias"
    assert weights.notes == (weights.no_decoder,)


class Odd:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}}, "holds no vision transformer: it has no patch_embed.proj.weight"),
        ({"model": {}}, "holds no parameters by name"),
        ({"a": 1}, "holds no parameters by name"),
        ([1, 2], "holds a list; give a state_dict"),
        ({"model": {"a": Odd()}}, "torchmae does not run code from files"),
        ({"vit.embeddings.cls_token": torch.ones(1)}, "is a transformers model; give its folder"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / "x.pth")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dist_token": torch.ones(1, 1, 192)}, "it also has dist_token"),
        ({"blocks.0.ls1.gamma": torch.ones(192)}, "it also has blocks.0.ls1.gamma"),
        ({"norm.bias": None}, "it lacks norm.bias"),
        ({"pos_embed": torch.ones(1, 8, 192)}, "has 7 positions and does not say for which grid"),
        ({"pos_embed": None}, "it has no pos_embed"),
        ({"cls_token": torch.ones(1, 2, 192)}, "cls_token is (1, 2, 192) where (1, 1, 192) is wanted"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, released: MaskedAutoencoder, change: Any, message: str) -> None:
    state = {**released.encoder.state_dict(), **change}
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / "x.safetensors")
    assert message in str(caught.value)


def test_an_unknown_number_of_heads_is_not_guessed(tmp_path: Path) -> None:
    save_file(mae().encoder.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not say how many attention heads a width of 32 is divided among"):
        read_weights(tmp_path / "x.safetensors")


def test_a_fine_tuned_network_gives_its_encoder_and_says_what_is_not_used(
    tmp_path: Path, released: MaskedAutoencoder
) -> None:
    state = dict(released.encoder.state_dict())
    state |= {f"fc_{name}": state.pop(name) for name in ("norm.weight", "norm.bias")}
    state |= {"head.weight": torch.ones(9, 192), "head.bias": torch.ones(9)}
    save_file(state, tmp_path / "x.safetensors")
    weights = read_weights(tmp_path / "x.safetensors")
    assert torch.equal(weights.encoder["norm.bias"], released.encoder.norm.bias)
    assert weights.notes == (
        "the last norm came after the pooling (fc_norm); here it comes before",
        "not used, as it is not part of the encoder: fc_norm.bias, fc_norm.weight, head.bias, head.weight",
    )


def test_half_precision_is_widened(tmp_path: Path, released: MaskedAutoencoder) -> None:
    save_file({name: value.half() for name, value in released.encoder.state_dict().items()}, tmp_path / "x.safetensors")
    assert {value.dtype for value in read_weights(tmp_path / "x.safetensors").encoder.values()} == {torch.float32}


def hf_mae(**others: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **{
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 80,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 80,
            "layer_norm_eps": 1e-6,
            "norm_pix_loss": True,
            "mask_ratio": 0.5,
            **others,
        }
    )
    return transformers.ViTMAEForPreTraining(config).eval()


def test_a_vitmae_folder_that_transformers_wrote(tmp_path: Path) -> None:
    theirs = hf_mae()
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert (weights.norm_pix, weights.mask_ratio, weights.arguments["mlp_ratio"]) == (True, 0.5, 2.5)
    ours = build(weights)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        expected = theirs(images, noise=noise).loss.item()
        # Their norms add 1e-12 to the variance where ours add 1e-6.
        assert ours(images, random_mask(noise, (4, 4), 0.5)).loss.item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(read_weights(tmp_path / "model.safetensors").encoder["cls_token"], weights.encoder["cls_token"])


def test_a_folder_in_several_files_and_one_that_points_elsewhere(tmp_path: Path) -> None:
    theirs = hf_mae()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists()
    assert torch.equal(read_weights(tmp_path).encoder["cls_token"], theirs.vit.embeddings.cls_token)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        read_weights(tmp_path)


def test_a_vit_folder_that_transformers_wrote(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=[16, 24],
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}')
    weights = read_weights(tmp_path)
    assert weights.mean == (0.1, 0.2, 0.3)
    assert weights.notes == ("not used, as it is not part of the encoder: classifier.bias, classifier.weight",)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected = theirs.vit(images).last_hidden_state[:, 1:]
        torch.testing.assert_close(build(weights).encode(images, "tokens"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 8])
def test_a_pixio_folder_that_transformers_wrote(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "PixioConfig"):
        pytest.skip("an older transformers has no Pixio")
    config = transformers.PixioConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_cls_tokens=count
    )
    theirs = transformers.PixioModel(config).eval()
    theirs.save_pretrained(tmp_path / "pixio")
    weights = read_weights(tmp_path / "pixio")
    assert (weights.arguments["registers"], weights.notes) == (count - 1, ())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        found = build(weights).encoder(images)
    torch.testing.assert_close(found.prefix, expected[:, :count], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.patches, expected[:, count:], rtol=1e-4, atol=1e-4)
    # What is written is compared with the model.
    words = ["export", str(tmp_path / "pixio"), "--to", "timm", "--out", str(tmp_path / "out")]
    assert main(words) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}, {"img_size": (32, 48)}],
    ids=["plain", "no class token", "no position for it", "not square"],
)
def test_a_folder_that_timm_wrote(tmp_path: Path, arguments: Any) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "depth": 2, "num_classes": 7, **arguments}
    theirs = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    timm.models.save_for_hf(theirs, tmp_path, model_args=sizes, safe_serialization=True)
    weights = read_weights(tmp_path)
    images = torch.randn(2, 3, *weights.arguments["input_size"])
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
        if isinstance(theirs.norm, torch.nn.Identity):  # ours has the last norm here, theirs behind the pooling
            expected = theirs.fc_norm(expected)
        torch.testing.assert_close(build(weights).encode(images, "tokens"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, "holds a timm model 'resnet50'; only plain vision transformers"),
        ({"architecture": "vit_base_patch16_224", "model_args": {"qk_norm": True}}, "with qk_norm; only plain"),
        ({"architecture": "vit_base_patch16_224"}, "config.json is damaged: KeyError"),
        ({"model_type": "dinov2"}, "holds a model dinov2; give a folder of transformers"),
        ({"model_type": "vit", "hidden_act": "relu"}, "uses 'relu' between layers; torchmae has gelu only"),
        ({}, "holds a model of an unknown kind"),
    ],
)
def test_folders_that_hold_something_else(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert is_foreign(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path)
    assert message in str(caught.value)


def test_our_own_timm_export_comes_back(tmp_path: Path) -> None:
    model = mae(input_size=(16, 24), class_token=False, in_chans=2)
    timm_format.write(tmp_path, exported(model))
    weights = read_weights(tmp_path)
    assert weights.notes == ()
    images = torch.randn(1, 2, 16, 24)
    assert torch.equal(build(weights).encode(images), model.encode(images))
