"""The classifier: timm's names, timm's logits, and what it takes from a pre-trained encoder."""

from __future__ import annotations

import pytest
import torch

from torchmae.nn.classifier import ViTClassifier
from torchmae.nn.encoder import ViTEncoder

ENCODER = {
    "input_size": (8, 12),
    "patch_size": (4, 4),
    "in_chans": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


def classifier(**changes: object) -> ViTClassifier:
    model = ViTClassifier(5, **{**ENCODER, **changes})
    with torch.no_grad():
        for parameter in model.parameters():  # norms and head too, which begin as ones and zeros
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("class_token", [True, False])
def test_timm_loads_it_strictly_and_agrees(class_token: bool) -> None:
    timm = pytest.importorskip("timm")
    ours = classifier(class_token=class_token)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=(8, 12),
        patch_size=4,
        in_chans=2,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        class_token=class_token,
        global_pool="avg",
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(3, 2, 8, 12)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_logits_begin_at_zero_and_the_head_alone_learns_from_them() -> None:
    model = ViTClassifier(5, **ENCODER)
    logits = model(torch.randn(3, 2, 8, 12))
    assert logits.shape == (3, 5)
    assert torch.equal(logits, torch.zeros(3, 5))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() == 0


def test_copy_encoder_takes_all_but_the_last_norm() -> None:
    encoder = ViTEncoder(**ENCODER)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    model = ViTClassifier(5, **ENCODER)
    model.copy_encoder(encoder)
    for name, value in encoder.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.fc_norm.weight, torch.ones(16))


def test_any_number_of_axes() -> None:
    signal = ViTClassifier(3, **{**ENCODER, "input_size": (12,), "patch_size": (4,)})
    assert signal(torch.randn(2, 2, 12)).shape == (2, 3)


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"input_size": (12,), "patch_size": (4,)}])
def test_arguments_of_an_encoder(changes: dict[str, object]) -> None:
    given = {"class_token": True, "mlp_ratio": 2.5, **ENCODER, **changes}
    assert ViTEncoder(**given, drop_path=0.3).arguments == given


def test_hidden_widths_survive_rounding() -> None:
    for hidden in range(1, 120):  # 49 * (1 / 49) is below 1
        encoder = ViTEncoder(**{**ENCODER, "embed_dim": 98, "num_heads": 2, "depth": 1}, mlp_ratio=(hidden + 0.5) / 98)
        again = ViTEncoder(**encoder.arguments)
        assert again.blocks[0].mlp.fc1.out_features == encoder.blocks[0].mlp.fc1.out_features == hidden
