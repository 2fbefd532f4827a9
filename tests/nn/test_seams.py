"""Models are composed: parts are called as modules, keep nothing unasked, learn everything; parts of one's own fit."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_parts import Averages
from torch import Tensor, nn

from torchmae.errors import ConfigError
from torchmae.nn import (
    HogTarget,
    Mask,
    MaskedAutoencoder,
    Masker,
    PixelTarget,
    SelfDecoder,
    Strategy,
    Target,
    TeacherTarget,
    ViTEncoder,
)
from torchmae.nn.patches import gather, patchify
from torchmae.presets import PRESETS, build

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2}
SMALL |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
OPTIONS: dict[str, Any] = {
    "class_token": (True, False),
    "decoder": ("self", "cross"),
    "hog_weight": (0.0, 1.0),
    "predict_ratio": (1.0, 0.5),
    "feature_weights": (False, True),
}
# Options that meet each other nowhere in the code: each takes its values in turn.
OTHERS: dict[str, Any] = {"registers": (0, 2), "norm_pix": (True, False), "drop_path": (0.0, 0.2)}


def combinations() -> list[dict[str, Any]]:
    every = [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())]
    crossed = ("predict_ratio", "feature_weights")
    kept = [one for one in every if one["decoder"] == "cross" or all(one[name] == OPTIONS[name][0] for name in crossed)]
    return [
        {**one, **{name: values[i // 2**place % 2] for place, (name, values) in enumerate(OTHERS.items())}}
        for i, one in enumerate(kept)
    ]


def loss_of(model: MaskedAutoencoder) -> Tensor:
    encoder = model.encoder
    strategy = next(iter(encoder.strategies))
    masker = Masker(encoder, strategy)
    images = torch.randn(8, encoder.in_chans, *encoder.input_size)
    return model.train()(images, masker.from_noise(torch.rand(8, masker.noise_count))).loss


def test_every_parameter_gets_a_gradient_whatever_the_options() -> None:
    models = [build("vit_digits", **SMALL, **options) for options in combinations()]
    models += [build("mlp", output_relu=relu, loss_on=where) for relu in (False, True) for where in ("all", "hidden")]
    for model in models:
        loss_of(model).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("preset", ["vit_digits", "mlp"])
def test_parts_are_called_so_that_hooks_on_them_act(preset: str) -> None:
    model = build(preset)
    called: list[str] = []
    for name in ("encoder", "decoder"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    loss_of(model)
    model.encode(torch.randn(2, model.encoder.in_chans, *model.encoder.input_size))
    assert called == ["encoder", "decoder", "encoder"]


def test_outputs_of_blocks_are_kept_only_when_asked_for() -> None:
    encoder = ViTEncoder(input_size=(8, 8), patch_size=(2, 2), in_chans=1, embed_dim=16, depth=4, num_heads=2)
    alive: list[int] = []
    outputs: list[weakref.ref[Tensor]] = []

    def count(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        gc.collect()
        alive.append(sum(ref() is not None for ref in outputs))

    for block in encoder.blocks:
        block.register_forward_hook(count)
    images = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert encoder(images).blocks == ()
        assert max(alive) <= 2
        kept = encoder(images, keep_blocks=True).blocks
    assert len(kept) == 5
    torch.testing.assert_close(encoder.norm(kept[-1]), torch.cat([*encoder(images)[:2]], dim=1), rtol=1e-5, atol=1e-5)


def test_a_loss_for_each_target_and_their_weighted_sum() -> None:
    model = build("vit_digits", **SMALL, hog_weight=3.0)
    images = torch.randn(4, 1, 8, 8)
    mask = Masker(model.encoder)(0, 0, torch.arange(4).numpy())
    output = model.train()(images, mask)
    pixels, hog = output.losses
    assert output.loss.item() == pytest.approx((pixels + 3 * hog).item(), rel=1e-6)
    assert pixels.item() == F.mse_loss(output.pred, model.target.hidden_values(images, mask)).item()
    assert [loss.item() for loss in model.eval()(images, mask).losses] == [pytest.approx(pixels.item(), rel=1e-6)]


class Brightness(Target):
    """A target of one's own: the mean of each patch."""

    label = "brightness"

    def __init__(self) -> None:
        super().__init__("brightness", 1, weight=0.5)

    def hidden_values(self, images: Tensor, mask: Mask) -> Tensor:
        return gather(patchify(images, (2, 2)), mask.ids_masked).mean(-1, keepdim=True)


def test_parts_of_one_s_own() -> None:
    encoder = Averages()
    pixels = PixelTarget((2, 2), 1, norm_pix=False)
    decoder = SelfDecoder(12, encoder.grid, embed_dim=8, depth=1, num_heads=2, out_dim=pixels.dim)
    model = MaskedAutoencoder(encoder, decoder, [pixels, Brightness(), HogTarget((2, 2), 1)])
    first = Strategy(lambda noise, grid, ratio: Mask(*noise.argsort(1).split([4, 12], 1)), lambda grid: 16)
    images = torch.randn(4, 1, 8, 8)
    mask = Masker(encoder, first)(0, 0, torch.arange(4).numpy())
    model.train()(images, mask).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert {name.split(".")[0] for name in model.state_dict()} == {
        *("encoder", "decoder", "brightness_head", "hog_head"),
    }
    assert model.eval().encode(images).shape == (4, 12)
    assert model.reconstruct(images, mask).images.shape == images.shape
    alone = MaskedAutoencoder(encoder, SelfDecoder(12, encoder.grid, embed_dim=8, depth=1, num_heads=2), [Brightness()])
    assert alone(images, mask).pred.shape == (4, 12, 1)


def test_a_frozen_teacher_is_learned_from_and_is_no_part_of_the_model() -> None:
    teacher, student = build("vit_digits", **SMALL), build("vit_digits", **SMALL)
    target = TeacherTarget(teacher, 16, lambda model, images: model.encode(images, "tokens"))
    model = MaskedAutoencoder(student.encoder, student.decoder, [*student.targets, target])
    assert not any("teacher" in name for name in model.state_dict() if not name.startswith("teacher_head."))
    assert copy.deepcopy(model).targets[1] is target
    images = torch.randn(8, 1, 8, 8)
    masker = Masker(model.encoder)
    mask = masker(0, 0, np.arange(8))
    values = target.hidden_values(images, mask)
    wanted = F.layer_norm(gather(teacher.encode(images, "tokens"), mask.ids_masked), (16,))
    torch.testing.assert_close(values, wanted.detach())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = model.train()(images, mask)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.losses[1].item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in target.teacher.parameters())
    with pytest.raises(ConfigError, match="features have shape"):
        TeacherTarget(teacher, 5, target.encode).hidden_values(images, mask)


@pytest.mark.parametrize("preset", PRESETS)
def test_masks_are_a_function_of_seed_epoch_and_index(preset: str) -> None:
    with torch.device("meta"):
        encoder = build(preset).encoder
    for name in encoder.strategies:
        masker = Masker(encoder, name)
        some, all_ = (
            masker(5, 2, indices).ids_keep for indices in (torch.tensor([7, 3]).numpy(), torch.arange(8).numpy())
        )
        assert torch.equal(some, all_[[7, 3]])
