from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from torchmae import presets
from torchmae.evaluation.inpainting import interpolate
from torchmae.evaluation.reconstruction import HoldOut
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Mask, Masker
from torchmae.training.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), "fp32", 1)


def vit(norm_pix: bool) -> MaskedAutoencoder:
    return presets.build(
        "vit_digits", in_chans=2, depth=1, embed_dim=16, norm_pix=norm_pix, decoder_embed_dim=16, decoder_depth=1
    )


def held_out(model: MaskedAutoencoder, strategy: str = "random") -> list[tuple[Tensor, Any]]:
    """Two batches of smooth images, of different sizes."""
    parts = []
    for count in (5, 3):
        noise = torch.rand(count, 2, 8, 8)
        images = torch.nn.functional.avg_pool2d(noise, 3, 1, 1) * 3
        masker = Masker(model.encoder, strategy, 0.6)
        parts.append((images, masker.from_noise(torch.rand(count, masker.noise_count))))
    return parts


def patches(images: Tensor) -> npt.NDArray[np.float64]:
    """(B, 16, 8): 2 x 2 patches of two channels, each with its channels last."""
    array = images.double().numpy().reshape(-1, 2, 4, 2, 4, 2)
    return array.transpose(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)


def normalise(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    deviation = np.sqrt(values.var(-1, ddof=1, keepdims=True) + 1e-6)
    return (values - values.mean(-1, keepdims=True)) / deviation


def pick(values: npt.NDArray[np.float64], ids: Tensor) -> npt.NDArray[np.float64]:
    return np.take_along_axis(values, ids.numpy()[..., None], axis=1)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_against_plain_numpy(norm_pix: bool) -> None:
    model = vit(norm_pix)
    parts = held_out(model)
    figures = HoldOut(model, parts, RUNTIME).run()

    target_space = normalise if norm_pix else lambda values: values
    targets, guesses, means, predictions = [], [], [], []
    for images, mask in parts:
        values = target_space(patches(images))
        targets.append(pick(values, mask.ids_masked))
        means.append(np.broadcast_to(pick(values, mask.ids_keep).mean(1, keepdims=True), targets[-1].shape))
        filled = interpolate(images, mask.removed_pixels(model.patch_size, model.encoder.input_size))
        guesses.append(pick(target_space(patches(filled)), mask.ids_masked))
        predictions.append(model(images, mask).pred.detach().double().numpy())
    target, guess, mean, prediction = (
        np.concatenate([a.ravel() for a in x]) for x in (targets, guesses, means, predictions)
    )
    if norm_pix:
        guess = guess * max((guess @ target) / (guess @ guess), 0)
    variance = target.var()
    loss, loss_guess, loss_mean = (np.mean((x - target) ** 2) for x in (prediction, guess, mean))
    assert figures == pytest.approx(
        {
            "loss": loss,
            "loss_mean_patch": loss_mean,
            "loss_interpolation": loss_guess,
            "explained_variance": 1 - loss / variance,
            "explained_variance_interpolation": 1 - loss_guess / variance,
        },
        rel=1e-4,
    )
    assert figures["loss_interpolation"] < variance  # on smooth images it is a real yardstick


def test_the_kindest_scale_of_interpolation() -> None:
    # No other factor brings the interpolated patches nearer to a normalised target.
    model = vit(norm_pix=True)
    parts = held_out(model)
    best = HoldOut(model, parts, RUNTIME).loss_interpolation
    target = torch.cat([model.target.hidden_values(*part).flatten() for part in parts]).double()
    guess = torch.cat(
        [
            model.target.hidden_values(interpolate(x, m.removed_pixels(model.patch_size, x.shape[2:])), m).flatten()
            for x, m in parts
        ]
    ).double()
    others = [(scale * guess - target).square().mean().item() for scale in np.linspace(0, 2, 41)]
    assert best <= min(others) + 1e-12
    assert best == pytest.approx(min(others), abs=1e-3)


class Stub(MaskedAutoencoder):
    """A model that always predicts one number; None: that knows the truth."""

    def __init__(self, predict: float | None = None) -> None:
        parts = vit(norm_pix=False)
        super().__init__(parts.encoder, parts.decoder, parts.targets)
        self.predict = predict

    def forward(self, images: Tensor, mask: Mask) -> Any:
        target = self.target.hidden_values(images, mask)
        pred = target if self.predict is None else torch.full_like(target, self.predict)
        return type("Output", (), {"pred": pred})()


def test_a_perfect_prediction_explains_everything() -> None:
    model = Stub()
    figures = HoldOut(model, held_out(model), RUNTIME).run()
    assert figures["loss"] == 0
    assert figures["explained_variance"] == 1


def test_a_constant_explains_nothing() -> None:
    parts = held_out(Stub())
    mean = torch.cat([Stub().target.hidden_values(*part).flatten() for part in parts]).mean().item()
    figures = HoldOut(Stub(mean), parts, RUNTIME).run()
    assert figures["explained_variance"] == pytest.approx(0, abs=1e-5)
    measured = HoldOut(Stub(mean + 1), parts, RUNTIME)
    assert measured.run()["explained_variance"] == pytest.approx(-1 / measured.variance, rel=1e-4)


def test_the_model_is_measured_as_it_is_now() -> None:
    model = vit(norm_pix=False).train()
    measured = HoldOut(model, held_out(model), RUNTIME)
    before = measured.run()
    assert not model.training
    nn.init.constant_(model.get_parameter("decoder.pred.bias"), 1.5)
    after = measured.run()
    assert after["loss"] < before["loss"]
    assert after["loss_interpolation"] == before["loss_interpolation"]


def test_values_hidden_one_by_one() -> None:
    model = presets.build("mlp", input_size=(8, 8), in_chans=2, hidden_dim=4)
    masked = held_out(model, "elements")
    figures = HoldOut(model, masked, RUNTIME).run()
    parts = [(images, mask.flags) for images, mask in masked]
    target = np.concatenate([x.flatten(1)[m].numpy() for x, m in parts]).astype(np.float64)
    filled = [interpolate(x, m.view(-1, 2, 8, 8)).flatten(1)[m].numpy() for x, m in parts]
    assert figures["loss_interpolation"] == pytest.approx(np.mean((np.concatenate(filled) - target) ** 2), rel=1e-4)
    errors = [(model(x, m).pred - x.flatten(1))[m.flags].detach().numpy() for x, m in masked]
    assert figures["loss"] == pytest.approx(np.mean(np.concatenate(errors) ** 2), rel=1e-4)
    means = []
    for images, mask in parts:
        seen = ~mask.view(-1, 2, 8, 8)
        mean = (images * seen).sum((2, 3)) / seen.sum((2, 3))
        means.append(mean[:, :, None].expand(-1, -1, 64).flatten(1)[mask].numpy())
    assert figures["loss_mean_patch"] == pytest.approx(np.mean((np.concatenate(means) - target) ** 2), rel=1e-4)


def test_images_without_any_variance() -> None:
    model = vit(norm_pix=True)
    images = torch.full((2, 2, 8, 8), 0.5)
    mask = Masker(model.encoder, "random", 0.5).from_noise(torch.rand(2, 16))
    figures = HoldOut(model, [(images, mask)], RUNTIME).run()
    assert figures["loss_interpolation"] == 0
    assert all(np.isfinite(value) for value in figures.values())
