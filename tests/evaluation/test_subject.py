from __future__ import annotations

import pytest
import tiny
import torch

from torchmae import presets
from torchmae.errors import ConfigError
from torchmae.evaluation.features import extract
from torchmae.evaluation.subject import extract_features, pixels, untrained


def test_both_is_mean_and_then_cls() -> None:
    subject, images = tiny.subject(), torch.randn(3, 1, 8, 8)
    assert subject.pools == ("mean", "cls", "both")
    expected = torch.cat([subject.encode(images, "mean"), subject.encode(images, "cls")], dim=1)
    assert torch.equal(subject.encode(images, "both"), expected)
    assert expected.shape == (3, 32)
    torch.testing.assert_close(subject.encode(images, "tokens").mean(1), expected[:, :16])


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
    subject = untrained(presets.arguments("mlp", hidden_dim=4), 0, tiny.CPU)
    assert subject.pools == ("mean",)
    assert not subject.has_tokens


def test_an_untrained_network_is_a_function_of_its_seed_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (untrained(tiny.arguments(), seed, tiny.CPU) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_extracting_is_what_training_does() -> None:
    subject, images = tiny.subject(), tiny.digits("val", 70)
    assert subject.model is not None
    features, labels = extract_features(subject, images.batches(), tiny.RUNTIME, "mean")
    expected, expected_labels = extract(subject.model, images.batches(), tiny.RUNTIME)
    assert torch.equal(features, expected)
    assert torch.equal(labels, expected_labels)
    assert features.shape == (70, 16)
