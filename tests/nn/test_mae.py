from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder, no_weight_decay, parameter_counts
from torchmae.nn.masking import Mask, Masker, mask_from_tokens, random_mask
from torchmae.nn.patches import gather, patchify, unpatchify
from torchmae.presets import build, construct

DECODERS = ("self", "cross")


def tiny(**overrides: Any) -> MaskedAutoencoder:
    values: dict[str, Any] = {
        "input_size": (8, 12),
        "patch_size": (4, 2),
        "in_chans": 3,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 4,
        "decoder_embed_dim": 24,
        "decoder_depth": 2,
        "decoder_num_heads": 3,
        "norm_pix": False,
    }
    return construct(values | overrides)


def images_and_mask(model: MaskedAutoencoder, batch: int = 3, ratio: float = 0.75) -> tuple[Tensor, Mask]:
    size = [g * p for g, p in zip(model.encoder.grid, model.patch_size, strict=True)]
    images = torch.randn(batch, model.encoder.in_chans, *size) * 0.6 + 0.1
    return images, random_mask(torch.rand(batch, model.encoder.num_patches), model.encoder.grid, ratio)


def shuffled(ids: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.rand(ids.shape).argsort(1)
    return ids.gather(1, order), order


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_is_the_formula(decoder: str, norm_pix: bool) -> None:
    model = tiny(decoder=decoder, norm_pix=norm_pix)
    images, mask = images_and_mask(model)
    out = model(images, mask)
    assert out.pred.shape == (3, 9, 24)
    assert out.mask is mask
    pred = out.pred.detach().double().numpy()
    total = 0.0
    for sample in range(3):
        for m, index in enumerate(mask.ids_masked[sample].tolist()):
            row, column = divmod(index, 6)
            patch = images[sample, :, row * 4 : row * 4 + 4, column * 2 : column * 2 + 2].double().numpy()
            target = patch.transpose(1, 2, 0).reshape(-1)
            if norm_pix:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            total += float(((pred[sample, m] - target) ** 2).sum())
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(total / pred.size, rel=1e-5)
    assert model.target.num_values(mask) == pred.size
    assert torch.equal(model.target.hidden_predictions(out.pred, mask), out.pred)
    targets = model.target.hidden_values(images, mask)
    assert torch.nn.functional.mse_loss(out.pred, targets).item() == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_order_of_indices_does_not_matter(decoder: str) -> None:
    model = tiny(decoder=decoder)
    images, mask = images_and_mask(model)
    out = model(images, mask)
    masked, order = shuffled(mask.ids_masked)
    assert not torch.equal(masked, mask.ids_masked)
    moved = model(images, Mask(mask.ids_keep, masked))
    torch.testing.assert_close(moved.pred, gather(out.pred, order), rtol=1e-5, atol=1e-5)
    assert moved.loss.item() == pytest.approx(out.loss.item(), abs=1e-6)

    kept, _ = shuffled(mask.ids_keep)
    assert not torch.equal(kept, mask.ids_keep)
    moved = model(images, Mask(kept, mask.ids_masked))
    torch.testing.assert_close(moved.pred, out.pred, rtol=1e-5, atol=1e-5)
    assert moved.loss.item() == pytest.approx(out.loss.item(), abs=1e-6)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_hidden_pixels_never_reach_a_prediction(decoder: str, norm_pix: bool) -> None:
    model = tiny(decoder=decoder, norm_pix=norm_pix)
    images, mask = images_and_mask(model)
    removed = mask.removed_pixels(model.patch_size, model.encoder.input_size)
    out = model(images, mask)
    assert torch.equal(model(images + 5 * torch.randn_like(images) * removed, mask).pred, out.pred)
    assert not torch.allclose(model(images + 0.5 * torch.randn_like(images) * ~removed, mask).pred, out.pred, atol=1e-4)


def test_predictions_of_the_cross_decoder_do_not_see_each_other() -> None:
    images, mask = images_and_mask(tiny())
    fewer = Mask(mask.ids_keep, mask.ids_masked[:, 2:5])
    cross, paper = tiny(decoder="cross"), tiny(decoder="self")
    # The mask's two parts are a partition for forward; the decoder alone takes any patches to predict.
    for model, same in ((cross, True), (paper, False)):
        encoded = model.encoder(images, mask.ids_keep)
        few, all_ = model.decoder(encoded, fewer), model.decoder(encoded, mask)
        assert torch.allclose(few, all_[:, 2:5], atol=1e-5) is same


@pytest.mark.parametrize("class_token", [True, False])
def test_the_cross_decoder_reads_class_token_and_visible_tokens_with_their_positions(class_token: bool) -> None:
    model = tiny(decoder="cross", decoder_depth=1, class_token=class_token)
    images, mask = images_and_mask(model)
    encoded, decoder = model.encoder(images, mask.ids_keep), model.decoder
    context = decoder.embed(encoded.patches) + decoder.pos_embed[0][mask.ids_keep]
    context = torch.cat([decoder.embed(encoded.prefix), context], dim=1)
    queries = decoder.mask_token + decoder.pos_embed[0][mask.ids_masked]
    wanted = decoder.norm(decoder.blocks[0](queries, context))
    torch.testing.assert_close(decoder(encoded, mask), wanted)


def test_samples_do_not_see_each_other() -> None:
    model = tiny()
    images, mask = images_and_mask(model)
    out = model(images, mask)
    for i in range(3):
        alone = model(images[i : i + 1], Mask(mask.ids_keep[i : i + 1], mask.ids_masked[i : i + 1]))
        torch.testing.assert_close(alone.pred[0], out.pred[i], rtol=1e-5, atol=1e-5)


def test_the_forward_pass_draws_no_random_numbers() -> None:
    model = tiny().train()
    images, mask = images_and_mask(model)
    state = torch.get_rng_state()
    first = model(images, mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(images, mask).pred, first.pred)


@pytest.mark.parametrize("class_token", [True, False])
def test_encode_never_masks_and_pools(class_token: bool) -> None:
    model = tiny(class_token=class_token)
    images, _ = images_and_mask(model)
    out = model.encoder(images)
    assert model.encode(images, "tokens").shape == (3, 12, 16)
    assert torch.equal(model.encode(images, "tokens"), out.patches)
    assert torch.equal(model.encode(images), out.patches.mean(1))
    if class_token:
        assert torch.equal(model.encode(images, "cls"), out.prefix[:, 0])
    else:
        with pytest.raises(ConfigError, match="no class token; use 'mean' or 'tokens'"):
            model.encode(images, "cls")
    with pytest.raises(ConfigError, match=r"pool is 'maen'; did you mean 'mean'\?"):
        model.encode(images, "maen")
    # Every pixel matters to the pooled features.
    pixels = images[:1].clone().requires_grad_()
    model.encode(pixels)[0, 0].backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).all()


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (16, 8)], ids=["trained", "other"])
def test_reconstruct_pastes_visible_pixels_and_undoes_the_target(size: tuple[int, int], norm_pix: bool) -> None:
    model = tiny(norm_pix=norm_pix)
    grid = (size[0] // 4, size[1] // 2)
    images = torch.randn(2, 3, *size) * 0.5 + 0.3
    mask = random_mask(torch.rand(2, math.prod(grid)), grid, 0.6)
    result = model.reconstruct(images, mask)
    assert result.images.shape == images.shape
    assert result.removed.shape == (2, 1, *size)
    assert torch.equal(patchify(result.removed, (4, 2)).all(-1), mask.removed())
    assert torch.equal(patchify(result.removed, (4, 2)).any(-1), mask.removed())
    removed = result.removed.expand_as(images)
    assert torch.equal(result.images[~removed], images[~removed])

    pred = model(images, mask).pred
    if norm_pix:
        hidden = gather(patchify(images, (4, 2)), mask.ids_masked)
        pred = pred * (hidden.var(-1, keepdim=True) + 1e-6).sqrt() + hidden.mean(-1, keepdim=True)
    filled = gather(patchify(result.images, (4, 2)), mask.ids_masked)
    torch.testing.assert_close(filled, pred, rtol=1e-5, atol=1e-5)
    assert ("true mean and contrast of each patch" in result.note) is norm_pix
    assert "as predicted" in result.note


def test_a_perfect_normalised_prediction_reconstructs_the_image() -> None:
    model = tiny(norm_pix=True)
    images, mask = images_and_mask(model)
    target = model.target.hidden_values(images, mask)
    model.decoder.forward = lambda *_: target  # type: ignore[method-assign]
    model.decoder.pred = torch.nn.Identity()
    assert model(images, mask).loss.item() == 0.0
    torch.testing.assert_close(model.reconstruct(images, mask).images, images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_visible_mean_is_the_mean_visible_target(norm_pix: bool) -> None:
    model = tiny(norm_pix=norm_pix)
    images, mask = images_and_mask(model)
    mean = model.target.visible_mean(images, mask)
    assert mean.shape == (3, 1, 24)
    visible = gather(patchify(images, (4, 2)), mask.ids_keep)
    if norm_pix:
        visible = (visible - visible.mean(-1, keepdim=True)) / (visible.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(mean[:, 0], visible.mean(1))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("size", "patch", "channels"), [((64,), (8,), 1), ((64,), (4,), 6), ((4, 8, 8), (2, 4, 4), 2), ((8, 16), (4, 4), 5)]
)
def test_signals_volumes_and_oblong_images(
    size: tuple[int, ...], patch: tuple[int, ...], channels: int, decoder: str
) -> None:
    model = tiny(input_size=size, patch_size=patch, in_chans=channels, decoder=decoder, norm_pix=True, embed_dim=24)
    images, mask = images_and_mask(model, batch=2)
    out = model(images, mask)
    assert out.pred.shape == (2, mask.ids_masked.shape[1], channels * math.prod(patch))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert model.reconstruct(images, mask).images.shape == images.shape
    assert model.encode(images).shape == (2, 24)


def test_another_size_than_the_one_trained_on() -> None:
    model = tiny()
    for size, length in (((16, 24), 48), ((4, 12), 6)):
        mask = random_mask(torch.rand(2, length), (length,), 0.5)
        images = torch.randn(2, 3, *size)
        assert model(images, mask).loss.isfinite()
        assert model.encode(images, "tokens").shape == (2, length, 16)


@pytest.mark.parametrize("shape", [(3, 1, 8, 12), (3, 3, 12), (3, 3, 8, 12, 1)])
def test_images_of_another_kind_are_an_error(shape: tuple[int, ...]) -> None:
    model = tiny()
    _, mask = images_and_mask(model)
    for call in (model.forward, model.reconstruct):
        with pytest.raises(ConfigError, match=r"images have shape .*takes \(batch, 3, size, size\)"):
            call(torch.zeros(shape), mask)


@pytest.mark.parametrize(("batch", "length"), [(1, 12), (4, 12), (3, 10), (3, 24)])
def test_a_mask_that_does_not_fit_the_batch_is_an_error(batch: int, length: int) -> None:
    model = tiny()
    images, _ = images_and_mask(model)
    mask = random_mask(torch.rand(batch, length), (length,), 0.5)
    told = rf"mask is for {batch} images of {length} patches, the batch has 3 of 12"
    for call in (model.forward, model.reconstruct):
        with pytest.raises(ConfigError, match=told):
            call(images, mask)


def test_a_user_s_mask() -> None:
    model = tiny()
    images, _ = images_and_mask(model)
    removed = torch.zeros(12, dtype=torch.bool)
    removed[[2, 3, 8]] = True
    out = model(images, mask_from_tokens(removed.expand(3, -1)))
    assert out.pred.shape == (3, 3, 24)


def test_masks_of_the_model_s_own_grid() -> None:
    model = tiny()
    assert [Masker(model.encoder, name).noise_count for name in ("random", "block", "grid")] == [12, 4, 2]
    mask = Masker(model.encoder, "random", 0.75).from_noise(torch.rand(2, 12))
    assert (mask.ids_keep.shape, mask.ids_masked.shape) == ((2, 3), (2, 9))
    assert torch.equal(
        patchify(mask.removed_pixels(model.patch_size, model.encoder.input_size), (4, 2)).all(-1), mask.removed()
    )
    for strategy, told in (
        ("elements", "choose from random, block, grid, cells2, cells4"),
        ("blok", "did you mean 'block'"),
    ):
        with pytest.raises(ConfigError, match=told):
            Masker(model.encoder, strategy)


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="decoder is 'crossed'; did you mean 'cross'"):
        tiny(decoder="crossed")
    with pytest.raises(ConfigError, match="24 cannot be divided among 5 heads"):
        tiny(decoder_num_heads=5)
    with pytest.raises(ConfigError, match="does not divide input size 9x12"):
        tiny(input_size=(9, 12))
    with pytest.raises(ConfigError, match="turn norm_pix off"):
        tiny(patch_size=(1, 1), in_chans=1, norm_pix=True)
    assert tiny(patch_size=(1, 1), in_chans=1).encoder.num_patches == 96


def test_initial_weights() -> None:
    model = tiny(embed_dim=96, decoder_embed_dim=96)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            bound = math.sqrt(6 / (part.in_features + part.out_features))
            assert 0.97 * bound < part.weight.abs().max() <= bound
            assert not part.bias.any()
    projection = model.encoder.patch_embed.proj
    bound = math.sqrt(6 / (24 + 96))
    assert 0.97 * bound < projection.weight.abs().max() <= bound
    assert not projection.bias.any()
    for token in (model.encoder.cls_token, model.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not any("pos_embed" in name for name, _ in model.named_parameters())
    assert {"encoder.pos_embed", "decoder.pos_embed"} <= set(model.state_dict())


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_weight_decay_leaves_alone(decoder: str) -> None:
    names = {
        name
        for name, p in tiny(depth=1, decoder_depth=1, decoder=decoder).named_parameters()
        if no_weight_decay(name, p)
    }
    attention = {"self": ("attn.qkv", "attn.proj"), "cross": ("cross_attn.q", "cross_attn.kv", "cross_attn.proj")}
    wanted = {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.bias"}
    wanted |= {"decoder.embed.bias", "decoder.pred.bias"}
    for part, kind in (("encoder", "self"), ("decoder", decoder)):
        wanted |= {f"{part}.norm.weight", f"{part}.norm.bias"}
        wanted |= {f"{part}.blocks.0.{norm}.{what}" for norm in ("norm1", "norm2") for what in ("weight", "bias")}
        wanted |= {f"{part}.blocks.0.{layer}.bias" for layer in (*attention[kind], "mlp.fc1", "mlp.fc2")}
    assert names == wanted


def test_parameter_counts() -> None:
    model = tiny()
    encoder, rest = parameter_counts(model)
    assert encoder == sum(p.numel() for p in model.encoder.parameters())
    assert rest == sum(p.numel() for p in model.decoder.parameters())
    model.encoder.patch_embed.requires_grad_(False)
    assert parameter_counts(model) == (encoder - (24 * 16 + 16), rest)


@pytest.mark.parametrize("decoder", DECODERS)
def test_weights_round_trip(decoder: str) -> None:
    model, other = tiny(decoder=decoder), tiny(decoder=decoder)
    images, mask = images_and_mask(model)
    assert not torch.equal(model(images, mask).pred, other(images, mask).pred)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(images, mask).pred, other(images, mask).pred)


@pytest.mark.parametrize("decoder", DECODERS)
def test_reduced_precision_keeps_the_loss_in_full(decoder: str) -> None:
    model = tiny(decoder=decoder, norm_pix=True)
    images, mask = images_and_mask(model)
    full = model(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = model(images, mask)
    assert reduced.loss.dtype == model.target.hidden_predictions(reduced.pred, mask).dtype == torch.float32
    assert reduced.loss.item() == pytest.approx(full.loss.item(), rel=0.02)


def test_a_model_of_reduced_precision_has_a_loss_in_full() -> None:
    model = tiny().bfloat16()
    images, mask = images_and_mask(model)
    images = images.bfloat16()
    out = model(images, mask)
    assert out.pred.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    wanted = torch.nn.functional.mse_loss(out.pred.float(), model.target.hidden_values(images, mask))
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_batch_can_be_learned_by_heart(decoder: str, norm_pix: bool) -> None:
    model = tiny(decoder=decoder, norm_pix=norm_pix, embed_dim=32)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    phase = torch.arange(12.0).reshape(4, 3, 1, 1)
    images = torch.sin(row / 2 + column / 3 + phase)
    _, mask = images_and_mask(model, batch=4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = model(images, mask).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_patches_of_the_prediction_lie_where_they_belong() -> None:
    # A prediction of each patch's own index must appear at that patch of the picture.
    model = tiny()
    images, mask = images_and_mask(model)
    model.decoder.forward = lambda *_: mask.ids_masked.float().unsqueeze(-1).expand(-1, -1, 24)  # type: ignore[method-assign]
    model.decoder.pred = torch.nn.Identity()
    filled = patchify(model.reconstruct(images, mask).images, (4, 2))
    index = torch.arange(12.0).reshape(1, 12, 1).expand(3, 12, 24)
    where = mask.removed()
    assert torch.equal(filled[where], index[where])
    assert torch.equal(unpatchify(filled, (4, 2), (2, 6)), model.reconstruct(images, mask).images)


def crossmae(**options: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build("vit_digits", depth=3, decoder="cross", decoder_depth=2, **options)


def test_partial_prediction_is_the_full_one_at_fewer_places() -> None:
    model = crossmae(predict_ratio=0.5, norm_pix=False)
    images, noise = torch.randn(4, 1, 8, 8), torch.rand(4, 16)
    mask = Masker(model.encoder, "random", 0.75).from_noise(noise)
    full = model.eval()(images, mask)
    part = model.train()(images, mask)
    assert full.pred.shape[1] == 12
    assert part.pred.shape[1] == 6
    assert torch.equal(part.mask.ids_masked, mask.ids_masked[:, ::2])
    assert torch.allclose(part.pred, full.pred[:, ::2], atol=1e-6)
    target = model.target.hidden_values(images, mask)[:, ::2]
    assert part.loss.item() == pytest.approx(F.mse_loss(full.pred[:, ::2], target).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"predict_ratio": 0.5}, {"feature_weights": True}])
def test_what_only_the_cross_decoder_can_do(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does not apply to the 'self' decoder"):
        build("vit_digits", **options)


@pytest.mark.parametrize("ratio", [0.0, 1.1])
def test_an_impossible_share_of_predictions(ratio: float) -> None:
    with pytest.raises(ConfigError, match="predict_ratio"):
        crossmae(predict_ratio=ratio)


def test_feature_weights_begin_as_the_last_layer_and_learn() -> None:
    model = crossmae(feature_weights=True)
    images, noise = torch.randn(4, 1, 8, 8), torch.rand(4, 16)
    mask = Masker(model.encoder, "random", 0.75).from_noise(noise)
    plain = crossmae()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "feature" not in k})
    assert torch.allclose(model(images, mask).pred, plain(images, mask).pred, atol=1e-5)
    model(images, mask).loss.backward()
    weights = model.decoder.feature_weights
    assert weights.shape == (2, 4)  # decoder blocks by encoder blocks and the embedding
    assert (weights.grad.abs() > 0).all()


def test_each_decoder_block_reads_its_own_mixture() -> None:
    model = crossmae(feature_weights=True).eval()
    images, noise = torch.randn(2, 1, 8, 8), torch.rand(2, 16)
    mask = Masker(model.encoder, "random", 0.75).from_noise(noise)
    before = model(images, mask).pred
    model.decoder.feature_weights.data[1] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # the second block: the embedding only
    after = model(images, mask).pred
    assert not torch.allclose(before, after)
    for block in model.encoder.blocks:  # what the encoder's blocks do reaches the first decoder block alone
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    model.decoder.feature_weights.data[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    emptied = model(images, mask).pred
    model.decoder.feature_weights.data[:] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.allclose(model(images, mask).pred, emptied, atol=1e-5)  # blocks that add nothing: all layers are equal
