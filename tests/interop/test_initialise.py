from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import DECODER, ENCODER, MEAN, STD, mae

from torchmae.errors import CheckpointError
from torchmae.interop.weights import Weights, adapt_channels, build, initialise
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import random_mask
from torchmae.nn.positions import resample
from torchmae.presets import construct


def weights(model: MaskedAutoencoder | None = None, **others: Any) -> Weights:
    model = mae() if model is None else model
    arguments = {**ENCODER, **DECODER, "mlp_ratio": 4.0, "class_token": True, "decoder": "self", "norm_pix": True}
    values: dict[str, Any] = {
        "origin": "w.pth",
        "arguments": arguments,
        "encoder": model.encoder.state_dict(),
        "decoder": model.decoder.state_dict(),
        "no_decoder": "",
        "mean": MEAN,
        "std": STD,
    }
    return Weights(**{**values, **others})


def fresh(**overrides: Any) -> MaskedAutoencoder:
    return construct({**ENCODER, **DECODER, **overrides}).eval()


def test_the_same_shape_gives_the_same_model() -> None:
    source, model = mae(), fresh()
    said = initialise(model, weights(source))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())
    assert said == ("encoder: 30 tensors from w.pth", "decoder: 32 tensors from w.pth")


def test_another_grid_has_its_positions_resampled() -> None:
    source, model = mae(), fresh(input_size=(24, 32))
    said = initialise(model, weights(source))
    assert "positions: resampled from 4x4 to 6x8 patches" in said
    for part in ("encoder", "decoder"):
        old, new = (getattr(item, part).pos_embed[0] for item in (source, model))
        assert torch.equal(new, resample(old, (4, 4), (6, 8)))
    images = torch.randn(2, 3, 24, 32)
    assert torch.equal(model.encode(images), source.encode(images))


@pytest.mark.parametrize(("channels", "how"), [(1, "summed"), (6, "repeated in turn, times 3 / 6")])
def test_other_channels_answer_alike_to_grey(channels: int, how: str) -> None:
    source, model = mae(), fresh(in_chans=channels)
    said = initialise(model, weights(source))
    assert f"patch embedding: adapted from 3 to {channels} channels ({how})" in said
    assert f"decoder: starts fresh (the source predicts 3 channels and the data has {channels})" in said
    grey = torch.randn(2, 1, 16, 16)
    expected = source.encode(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.encode(grey.expand(-1, channels, -1, -1)), expected, rtol=1e-4, atol=1e-5)


def test_channels_are_taken_in_turn() -> None:
    weight = torch.randn(8, 3, 4, 4)
    adapted = adapt_channels(weight, 5)
    assert torch.equal(adapted[:, 3], weight[:, 0] * (3 / 5))
    assert torch.equal(adapt_channels(weight, 2), weight[:, :2] * 1.5)
    assert torch.equal(adapt_channels(weight, 3), weight)


@pytest.mark.parametrize(
    ("model", "others", "reason"),
    [
        ({"norm_pix": False}, {}, "the source's target was normalised patches, this run's is pixels"),
        ({"decoder_depth": 1}, {}, "the source's has another shape"),
        ({"decoder": "cross"}, {}, "the source's has another shape"),
        ({}, {"decoder": None, "no_decoder": "w.pth holds an encoder only"}, "w.pth holds an encoder only"),
    ],
)
def test_a_decoder_is_taken_whole_or_left_as_it_is(model: Any, others: Any, reason: str) -> None:
    target = fresh(**model)
    before = {name: value.clone() for name, value in target.decoder.state_dict().items()}
    assert initialise(target, weights(**others))[-1] == f"decoder: starts fresh ({reason})"
    assert all(torch.equal(value, before[name]) for name, value in target.decoder.state_dict().items())


def test_a_target_that_is_not_known_is_said_to_be_a_guess() -> None:
    known = weights()
    unknown = weights(arguments={name: value for name, value in known.arguments.items() if name != "norm_pix"})
    said = initialise(fresh(norm_pix=False), unknown)
    assert said[-1].endswith("from w.pth, whose target is not known and taken for this run's, pixels")


def test_an_encoder_of_another_shape() -> None:
    with pytest.raises(CheckpointError, match=r"w\.pth does not fit the model: .* is \(.*\) where \(.*; leave out"):
        initialise(fresh(embed_dim=16), weights())
    with pytest.raises(CheckpointError, match="it lacks blocks.2"):
        initialise(fresh(depth=3), weights())


def test_a_model_without_decoder_encodes_and_says_why_it_does_not_reconstruct() -> None:
    source = mae()
    model = build(weights(source, decoder=None, no_decoder="w.pth holds an encoder only"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.encode(images), source.encode(images))
    mask = random_mask(torch.rand(2, 16), (4, 4), 0.75)
    with pytest.raises(CheckpointError, match=r"^this model cannot reconstruct: w\.pth holds an encoder only; give"):
        model.reconstruct(images, mask)
    assert not any(name.startswith("decoder") for name in model.state_dict())
