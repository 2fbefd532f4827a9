"""What every encoder of ENCODERS does: one contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchmae.config import OptimConfig
from torchmae.config.finetune import FinetuneConfig
from torchmae.evaluation.finetune import start_classifier
from torchmae.evaluation.finetune_training import parameter_groups
from torchmae.nn import CLASSIFIERS, ENCODERS, MaskedAutoencoder, Masker
from torchmae.presets import build
from torchmae.training.optim import build_optimizers
from torchmae.training.parallel import blocks, checkpoint_activations

DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SIZES = {"input_size": (16, 24), "patch_size": (4, 4), "in_chans": 2}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_digits", {"embed_dim": 16, "depth": 3, "num_heads": 2}),
    "convnext": ("convnext_32", {"depths": (1, 2, 1), "dims": (4, 6, 8)}),
}
LAYERS = {
    "vit": {
        "cls_token": 0,
        "patch_embed.proj.weight": 0,
        "blocks.2.norm1.bias": 3,
        "fc_norm.weight": 4,
        "head.bias": 4,
    },
    "convnext": {
        "stem.0.weight": 0,
        "stem.1.bias": 0,
        "stages.0.blocks.0.conv_dw.weight": 1,
        "stages.1.downsample.1.weight": 2,
        "stages.1.blocks.1.mlp.grn.bias": 3,
        "stages.2.downsample.0.bias": 4,
        "stages.2.blocks.0.norm.weight": 4,
        "head.norm.weight": 5,
        "head.fc.bias": 5,
    },
}

pytestmark = pytest.mark.parametrize("kind", ENCODERS)


def small(kind: str, **changes: Any) -> MaskedAutoencoder:
    preset, sizes = SMALL[kind]
    return build(preset, **{**SIZES, **DECODER, **sizes, **changes})


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def example(model: MaskedAutoencoder) -> tuple[Tensor, Any]:
    return torch.randn(3, 2, 16, 24), Masker(model.encoder)(0, 0, np.arange(3))


def test_shapes(kind: str) -> None:
    model = small(kind).eval()
    images, mask = example(model)
    encoder, kept = model.encoder, mask.ids_keep.shape[1]
    assert type(encoder) is ENCODERS[kind]
    assert (encoder.grid, encoder.patch_size, encoder.num_patches) == ((4, 6), (4, 4), 24)
    for found, count in ((encoder(images), 24), (encoder(images, mask.ids_keep), kept)):
        assert found.prefix.shape == (3, encoder.num_prefix_tokens, encoder.embed_dim)
        assert found.patches.shape == (3, count, encoder.embed_dim)
        assert found.grid == (4, 6)
    assert encoder(torch.randn(1, 2, 8, 40)).grid == (2, 10)
    for pool in model.pools:
        assert model.encode(images, pool).shape[0] == 3
    assert model.encode(images, "tokens").shape == (3, 24, encoder.embed_dim)
    filled = model.reconstruct(images, mask)
    torch.testing.assert_close(filled.images.where(~filled.removed, 0), images.where(~filled.removed, 0))


def test_masked_pixels_reach_nothing(kind: str) -> None:
    encoder = shaken(small(kind).encoder)
    images, mask = example(small(kind))
    ids = mask.ids_keep
    removed = mask.removed_pixels((4, 4), (16, 24)).expand_as(images)
    seen = []
    for masked in (0.0, 1e9, float("nan")):
        changed = images.masked_fill(removed, masked).requires_grad_()
        encoder.zero_grad()
        tokens = encoder(changed, ids).patches
        tokens.square().sum().backward()
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        seen.append([tokens.detach(), changed.grad, *gradients])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert not seen[0][1][removed].any()
    turned = encoder(images, ids.flip(1)).patches.flip(1)  # tokens stand in the order of ids_keep
    torch.testing.assert_close(turned, encoder(images, ids).patches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon"])
def test_a_training_step(kind: str, optimizer: str) -> None:
    model = shaken(small(kind, drop_path=0.1)).train()
    images, mask = example(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model(images, mask).loss
    loss.backward()
    optimizers = build_optimizers(model, OptimConfig(name=optimizer), 256)
    assert len(optimizers) == 1 + (optimizer == "muon")
    for one in optimizers:
        one.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or torch.equal(p, before[name])] == []


def test_stochastic_depth_is_for_training_alone(kind: str) -> None:
    encoder = shaken(small(kind, drop_path=0.9).encoder)
    images = torch.randn(3, 2, 16, 24)
    found = [encoder.train(mode)(images).patches for mode in (True, True, False, False)]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


def test_blocks_are_what_is_compiled_and_recomputed(kind: str) -> None:
    model = small(kind)
    assert blocks(model.encoder) == list(model.encoder.blocks)
    images, mask = example(model)
    gradients = []
    for prepare in (lambda: None, lambda: checkpoint_activations(model)):
        prepare()
        model.zero_grad()
        model(images, mask).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_compiler_sees_it_whole(kind: str) -> None:
    encoder = small(kind).encoder
    images, mask = example(small(kind))
    captured = torch.compile(encoder, backend="eager", fullgraph=True)
    assert torch.equal(captured(images, mask.ids_keep).patches, encoder(images, mask.ids_keep).patches)
    torch.compiler.reset()


def test_arguments_make_it_again(kind: str) -> None:
    encoder = small(kind, mlp_ratio=3.0, drop_path=0.2).encoder
    arguments = {name: value for name, value in encoder.arguments.items() if name != "encoder"}
    again = ENCODERS[encoder.arguments.get("encoder", "vit")](**arguments)
    again.load_state_dict(encoder.state_dict())
    assert again.arguments == encoder.arguments


def test_fine_tuning(kind: str) -> None:
    model = shaken(small(kind))
    classifier, arguments = start_classifier(model, 5, FinetuneConfig(drop_path=0.1))
    assert type(classifier) is CLASSIFIERS[kind]
    images = torch.randn(3, 2, 16, 24)
    assert torch.equal(classifier(images), torch.zeros(3, 5))
    assert (arguments["num_classes"], arguments["drop_path"]) == (5, 0.1)
    own, theirs = classifier.state_dict(), model.encoder.state_dict()
    assert len(own.keys() & theirs.keys()) == len(theirs) - 2  # all but the last norm
    assert all(torch.equal(own[name], theirs[name]) for name in own.keys() & theirs.keys())
    groups = parameter_groups(classifier, lr=1.0, layer_decay=0.5, weight_decay=0.05)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    top = len(classifier.blocks) + 1
    found = {name: rate[id(p)] for name, p in classifier.named_parameters()}
    assert {name: found[name] for name in LAYERS[kind]} == {
        name: 0.5 ** (top - layer) for name, layer in LAYERS[kind].items()
    }
    shaken(classifier).train()(images).square().sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())
