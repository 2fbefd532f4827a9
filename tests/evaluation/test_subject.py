from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from torchmae import presets
from torchmae.data.loader import Batch
from torchmae.errors import ConfigError
from torchmae.evaluation.subject import Subject, blocks_of, extract, pixels, untrained
from torchmae.training.runtime import Runtime


def test_both_is_mean_and_then_cls() -> None:
    subject, images = tiny.subject(), torch.randn(3, 1, 8, 8)
    assert subject.pools == ("mean", "cls", "both")
    expected = torch.cat([subject.encode(images, "mean"), subject.encode(images, "cls")], dim=1)
    assert torch.equal(subject.encode(images, "both"), expected)
    assert expected.shape == (3, 32)
    torch.testing.assert_close(subject.encode(images, "tokens").mean(1), expected[:, :16])


def test_layers_are_blocks_of_the_encoder() -> None:
    subject, images = tiny.subject(depth=3), torch.randn(2, 1, 8, 8)
    assert subject.model is not None
    encoder = subject.model.encoder
    outputs: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, given, output: outputs.append(output))
    with torch.no_grad():
        encoder(images)
    between = [F.layer_norm(output, (16,))[:, 1:] for output in outputs]
    final = subject.encode(images, "tokens")
    wanted = {
        0: between[0],
        -2: between[1],
        -1: final,
        2: final,
        "last-1": final,
        "last-3": torch.cat([*between[:2], final], dim=-1),
    }
    for layer, tokens in wanted.items():
        one = replace(subject, blocks=blocks_of(encoder, layer))
        torch.testing.assert_close(one.encode(images, "tokens"), tokens)
        torch.testing.assert_close(one.encode(images, "both")[:, : tokens.shape[-1]], tokens.mean(1))
        assert one.encode(images, "cls").shape == (2, tokens.shape[-1])
    for beyond in (3, -4, "last-4"):
        with pytest.raises(ConfigError, match=r"gives 3 blocks; choose from -3 to 2, or at most last-3"):
            blocks_of(encoder, beyond)
    assert blocks_of(presets.build("mlp", hidden_dim=4).encoder, -1) is None


def test_what_a_model_without_a_class_token_has() -> None:
    subject = tiny.subject(class_token=False)
    assert subject.pools == ("mean",)
    assert subject.has_tokens
    for pool in ("cls", "both"):
        with pytest.raises(ConfigError, match=f"pool is '{pool}' but the model has no class token"):
            subject.encode(torch.randn(1, 1, 8, 8), pool)


def test_pixels_are_the_images() -> None:
    subject, images = pixels(), torch.randn(2, 3, 6, 5)
    assert torch.equal(subject.encode(images, "mean"), images.flatten(1))
    assert subject.encode(torch.randn(2, 3, 224, 224), "mean").shape == (2, 3 * 32 * 32)
    assert subject.pools == ("mean",)
    assert not subject.has_tokens
    assert subject.fingerprint() == ""
    with pytest.raises(ConfigError, match="pixels have no tokens"):
        subject.encode(images, "tokens")


def test_the_mlp_model_has_one_kind_of_features() -> None:
    subject = untrained(partial(presets.construct, presets.arguments("mlp", hidden_dim=4)), 0, tiny.CPU)
    assert subject.pools == ("mean",)
    assert not subject.has_tokens


def test_an_untrained_network_is_a_function_of_its_seed_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (untrained(partial(presets.construct, tiny.arguments()), seed, tiny.CPU) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


FP32 = Runtime(torch.device("cpu"), "fp32", 1)
BF16 = Runtime(torch.device("cpu"), "bf16", 1)


def batches(*size: int, channels: int = 1) -> list[Batch]:
    images = torch.randn(5, channels, *size)
    labels = torch.tensor([3, -1, 0, 1, 2])
    return [Batch(images[part], labels[part], np.arange(5)[part], 0) for part in (slice(0, 3), slice(3, 5))]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_of_all_batches_in_order(pool: str) -> None:
    model = presets.build("vit_digits", depth=1, embed_dim=16, drop_path=0.9).train()
    subject = Subject("model", model)
    torch.manual_seed(0)
    whole = torch.cat([batch.images for batch in batches(8, 8)])
    torch.manual_seed(0)
    features, labels = extract(subject, batches(8, 8), FP32, pool)
    assert not model.training  # nothing was dropped
    torch.testing.assert_close(features, model.encode(whole, pool))
    assert labels.tolist() == [3, -1, 0, 1, 2]
    assert not features.requires_grad
    torch.manual_seed(0)
    rounded, _ = extract(subject, batches(8, 8), BF16, pool)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - features).abs().max() < 0.1


def test_small_images_are_their_own_features() -> None:
    parts = batches(8, 32, channels=3)
    features, labels = extract(pixels(), parts, FP32)
    assert torch.equal(features, torch.cat([batch.images for batch in parts]).flatten(1))
    assert labels.tolist() == [3, -1, 0, 1, 2]


@pytest.mark.parametrize(
    ("size", "count"), [((1000,), 1000), ((4096,), 1024), ((64, 32), 1024), ((224, 224), 1024), ((20, 20, 5), 500)]
)
def test_large_images_are_averaged_down(size: tuple[int, ...], count: int) -> None:
    parts = batches(*size, channels=2)
    features, _ = extract(pixels(), parts, FP32)
    assert features.shape == (5, 2 * count)
    means = torch.cat([batch.images for batch in parts]).flatten(2).mean(-1)
    torch.testing.assert_close(features.view(5, 2, count).mean(-1), means)
