"""The tutorial's system against its formulas, written once more in NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.tutorial import compose
from torchmae.tutorial.mlp import ElementMask

Array = npt.NDArray[np.float64]


class ByFormula(NamedTuple):
    """Z = ReLU(We (X * M) + be), X^ = ReLU(Wd Z + bd) or without it, and what the loss's gradient needs."""

    kept: Array
    hidden_in: Array
    hidden: Array
    out_in: Array
    out: Array


def weights(model: MaskedAutoencoder) -> list[Array]:
    return [p.detach().double().numpy() for p in (*model.encoder.parameters(), *model.decoder.parameters())]


def forward(model: MaskedAutoencoder, x: Array, keep: Array, output_relu: bool) -> ByFormula:
    we, be, wd, bd = weights(model)
    kept = x * keep
    hidden_in = kept @ we.T + be
    hidden = np.maximum(hidden_in, 0)
    out_in = hidden @ wd.T + bd
    return ByFormula(kept, hidden_in, hidden, out_in, np.maximum(out_in, 0) if output_relu else out_in)


def gradients(model: MaskedAutoencoder, run: ByFormula, d_out: Array, output_relu: bool) -> list[Array]:
    """The loss's gradients with respect to We, be, Wd, bd, given that with respect to X^."""
    wd = weights(model)[2]
    d_out_in = d_out * (run.out_in > 0) if output_relu else d_out
    d_hidden_in = (d_out_in @ wd) * (run.hidden_in > 0)
    return [d_hidden_in.T @ run.kept, d_hidden_in.sum(0), d_out_in.T @ run.hidden, d_out_in.sum(0)]


def literal(**overrides: object) -> MaskedAutoencoder:
    values = {"input_size": (6, 5), "in_chans": 3, "hidden_dim": 16, "output_relu": True, "loss_on": "all"}
    return compose(**(values | overrides))  # type: ignore[arg-type]


def normalised(batch: int = 7) -> torch.Tensor:
    return (torch.rand(batch, 3, 6, 5) - 0.5) / 0.5  # ToTensor, then Normalize(0.5, 0.5)


def test_the_literal_tutorial_is_the_formula_and_its_first_adam_step() -> None:
    model = literal()
    images, noise = normalised(), torch.rand(7, 90)
    mask = Masker(model.encoder, "elements_inverted", 0.75).from_noise(noise)
    out = model(images, mask)

    x = images.flatten(1).double().numpy()
    keep = (noise.numpy() < 0.75).astype(np.float64)  # M = 1 where rand < 0.75
    run = forward(model, x, keep, output_relu=True)
    np.testing.assert_allclose(out.pred.detach(), run.out, atol=1e-6)
    assert out.loss.item() == pytest.approx(((x - run.out) ** 2).mean(), rel=1e-5)

    wanted = gradients(model, run, 2 * (run.out - x) / x.size, output_relu=True)
    before = weights(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    out.loss.backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        np.testing.assert_allclose(parameter.grad, gradient, atol=1e-7, rtol=1e-4)
    optimiser.step()
    for value, old, gradient in zip(weights(model), before, wanted, strict=True):
        # Adam's first step: both moments, corrected for their start at zero, are the gradient and its square.
        sure = np.abs(gradient) > 1e-5
        assert sure.any()
        step = 1e-3 * gradient / (np.abs(gradient) + 1e-8)
        np.testing.assert_allclose((value - old)[sure], -step[sure], rtol=2e-2)


def test_the_corrected_tutorial_is_the_formula() -> None:
    model = literal(output_relu=False, loss_on="hidden")
    images, noise = normalised(), torch.rand(7, 90)
    mask = Masker(model.encoder, "elements", 0.75).from_noise(noise)
    out = model(images, mask)

    x = images.flatten(1).double().numpy()
    hidden = noise.numpy() < 0.75
    run = forward(model, x, 1.0 - hidden, output_relu=False)
    np.testing.assert_allclose(out.pred.detach(), run.out, atol=1e-6)
    assert out.loss.item() == pytest.approx(((x - run.out) ** 2)[hidden].mean(), rel=1e-5)

    out.loss.backward()
    wanted = gradients(model, run, 2 * (run.out - x) * hidden / hidden.sum(), output_relu=False)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        np.testing.assert_allclose(parameter.grad, gradient, atol=1e-7, rtol=1e-4)


def test_defect_one_the_inverted_mask_hides_a_quarter() -> None:
    model = literal(input_size=(32, 32))
    noise = torch.rand(20, Masker(model.encoder, "elements").noise_count)
    sigma = (0.75 * 0.25 / noise.numel()) ** 0.5
    for strategy, share in (("elements", 0.75), ("elements_inverted", 0.25)):
        hidden = Masker(model.encoder, strategy, 0.75).from_noise(noise).flags.double().mean()
        assert hidden.item() == pytest.approx(share, abs=5 * sigma)


def test_defect_two_a_relu_at_the_end_never_reaches_a_negative_target() -> None:
    images = normalised()
    mask = ElementMask(torch.rand(7, 90) < 0.5)
    assert (images < 0).any()
    assert (literal()(images, mask).pred >= 0).all()
    assert (literal(output_relu=False)(images, mask).pred < 0).any()


def test_defect_three_the_literal_loss_counts_what_was_visible() -> None:
    images = normalised()
    mask = ElementMask(torch.rand(7, 90) < 0.5)
    everything, hidden_only = literal(), literal(loss_on="hidden")
    hidden_only.load_state_dict(everything.state_dict())
    out = everything(images, mask)
    error = (out.pred - images.flatten(1)).square()
    assert out.loss.item() == pytest.approx(error.mean().item(), rel=1e-6)
    assert (everything.target.num_values(mask), hidden_only.target.num_values(mask)) == (
        mask.flags.numel(),
        int(mask.flags.sum()),
    )
    corrected = hidden_only(images, mask).loss.item()
    assert corrected == pytest.approx(error[mask.flags].mean().item(), rel=1e-6)
    assert abs(corrected - out.loss.item()) > 1e-3


def test_hidden_values_never_reach_a_prediction() -> None:
    model = literal()
    images = normalised()
    mask = ElementMask(torch.rand(7, 90) < 0.75)
    changed = images + 3 * torch.randn_like(images) * mask.flags.view_as(images)
    assert torch.equal(model(changed, mask).pred, model(images, mask).pred)


def test_a_mask_that_hides_nothing_has_no_hidden_loss() -> None:
    out = literal(loss_on="hidden")(normalised(), ElementMask(torch.zeros(7, 90, dtype=torch.bool)))
    assert out.loss.item() == 0.0


def test_encode_is_the_hidden_layer_of_whole_images() -> None:
    model = literal()
    images = normalised()
    z = forward(model, images.flatten(1).double().numpy(), np.ones((7, 90)), output_relu=True).hidden
    np.testing.assert_allclose(model.encode(images).detach(), z, atol=1e-6)
    with pytest.raises(ConfigError, match="no patches for pool 'tokens'"):
        model.encode(images, "tokens")


def test_reconstruct_pastes_visible_values() -> None:
    model = literal(output_relu=False)
    images = normalised()
    mask = ElementMask(torch.rand(7, 90) < 0.6)
    result = model.reconstruct(images, mask)
    assert torch.equal(result.removed, mask.flags.view(7, 3, 6, 5))
    assert torch.equal(result.images[~result.removed], images[~result.removed])
    assert torch.equal(result.images[result.removed], model(images, mask).pred[mask.flags])
    assert result.note


def test_hidden_values_and_their_simplest_prediction() -> None:
    model = literal()
    images = normalised()
    mask = ElementMask(torch.rand(7, 90) < 0.75)
    mask.flags[0, :30] = True  # a channel of which nothing is seen
    values, means = model.target.hidden_values(images, mask), model.target.visible_mean(images, mask)
    out = model(images, mask)
    assert torch.equal(model.target.hidden_predictions(out.pred, mask), out.pred[mask.flags])
    assert values.shape == means.shape == (int(mask.flags.sum()),)
    flat = images.flatten(1)
    k = 0
    for sample in range(7):
        for index in np.flatnonzero(mask.flags[sample]):
            channel = slice(index // 30 * 30, index // 30 * 30 + 30)
            seen = flat[sample, channel][~mask.flags[sample, channel]]
            assert values[k] == flat[sample, index]
            assert means[k].item() == pytest.approx(seen.mean().item() if len(seen) else 0.0, abs=1e-6)
            k += 1


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="loss_on is 'hiden'; did you mean 'hidden'"):
        literal(loss_on="hiden")
    model = literal()
    with pytest.raises(ConfigError, match=r"mask.strategy is 'random'; .*elements, elements_inverted"):
        Masker(model.encoder, "random")
    with pytest.raises(ConfigError, match=r"images have shape \(1, 3, 5, 5\); this model takes \(batch, 3, 6, 5\)"):
        model(torch.zeros(1, 3, 5, 5), ElementMask(torch.zeros(1, 90, dtype=torch.bool)))
    with pytest.raises(ConfigError, match="images have shape"):
        model.encode(torch.zeros(1, 3, 5, 6))
