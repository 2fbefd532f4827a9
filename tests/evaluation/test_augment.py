"""Augmentation: targets that add up, bytes that survive, and the same seed, the same batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from torchmae.config.finetune import InputSettings
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError
from torchmae.evaluation import augment as module
from torchmae.evaluation.augment import OPERATIONS, Augment, build_augment

NONE = InputSettings(batch_size=10, crop_scale=(1.0, 1.0), randaugment=0, mixup=0.0, cutmix=0.0)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def augment_with(channels: int = 3, input_size: tuple[int, ...] = (16, 16), **changes: Any) -> Augment:
    normalisation = Normalisation(MEAN[:channels], STD[:channels])
    return build_augment(NONE._replace(**changes), input_size, normalisation, 4)


def batch(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    levels = torch.randint(0, 256, (10, channels, 16, 16)) / 255
    shape = (-1, 1, 1)
    images = (levels - torch.tensor(MEAN[:channels]).view(shape)) / torch.tensor(STD[:channels]).view(shape)
    return images, torch.arange(10) % 4


def test_nothing_asked_nothing_done() -> None:
    images, labels = batch()
    seen, targets = augment_with()(images, labels)
    assert seen is images
    assert targets is labels


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_targets_sum_to_one_and_name_two_classes(kind: dict[str, float]) -> None:
    images, labels = batch()
    mixed, targets = augment_with(**kind)(images, labels)
    assert mixed.shape == images.shape
    assert targets.shape == (10, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(10))
    for row, own, other in zip(targets, labels.tolist(), labels.roll(1).tolist(), strict=True):
        assert set(row.nonzero().flatten().tolist()) <= {own, other}


def test_mixup_blends_images_by_the_share_of_their_targets() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.view(4, 1, 1, 1).expand(4, 3, 16, 16).float()
    mixed, targets = augment_with(mixup=0.8)(images, labels)
    expected = targets @ torch.arange(4.0)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)


def test_cutmix_pastes_the_share_of_the_target() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.view(4, 1, 1, 1).expand(4, 3, 16, 16).float()
    torch.manual_seed(3)
    mixed, targets = augment_with(cutmix=1.0)(images, labels)
    for image, row, own in zip(mixed, targets, labels, strict=True):
        assert (image == own).float().mean().item() == pytest.approx(row[own].item())
    assert 0 < targets[0, 0] < 1


def test_randaugment_gives_bytes_normalised_as_before() -> None:
    images, labels = batch()
    seen, targets = augment_with(randaugment=9)(images, labels)
    assert targets is labels
    assert not torch.equal(seen, images)
    levels = (seen * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)) * 255
    assert levels.min() > -0.01
    assert levels.max() < 255.01
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_randaugment_keeps_values_in_the_unit_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPERATIONS", {"identity": OPERATIONS["identity"]})
    hounsfield = Normalisation((-500.0,), (300.0,), (-1000.0,), (400.0,), {"float32": 1.0}, "dataset")
    values = torch.rand(10, 1, 16, 16) * 1400 - 1000
    augment = build_augment(NONE._replace(randaugment=9), (16, 16), hounsfield, 4)
    seen, _ = augment(hounsfield.apply(values), torch.zeros(10, dtype=torch.int64))
    assert (seen * 300 - 500 - values).abs().max() < 0.51 * 1400 / 255  # half a level of a byte


def test_randaugment_on_one_channel() -> None:
    images, labels = batch(channels=1)
    assert augment_with(channels=1, randaugment=9)(images, labels)[0].shape == images.shape


def test_the_generator_decides() -> None:
    images, labels = batch()
    augment = augment_with(randaugment=9, mixup=0.8, cutmix=1.0)
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(augment(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_neighbours_differ_in_what_is_done_to_them() -> None:
    images = torch.randn(1, 3, 16, 16).clamp(-1, 1).expand(40, -1, -1, -1)
    seen, _ = augment_with(randaugment=9)(images, torch.zeros(40, dtype=torch.int64))
    assert len({image.numpy().tobytes() for image in seen}) > 5


TORCHVISION = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast")
TORCHVISION += ("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")


@pytest.mark.parametrize("strength", [0, 3, 9, 10])
@pytest.mark.parametrize(("ours", "theirs"), list(zip(OPERATIONS, TORCHVISION, strict=True)))
def test_operations_are_torchvisions(ours: str, theirs: str, strength: int) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    fill = [100, 110, 120]
    peer = v2.RandAugment(2, strength, 11, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
    strengths, signed = peer._AUGMENTATION_SPACE[theirs]
    levels = strengths(11, 32, 48)
    for sign in (1, -1) if signed else (1,):
        value = 0.0 if levels is None else sign * float(levels[strength])
        wanted = peer._apply_image_or_video_transform(images, theirs, value, peer.interpolation, peer._fill)
        found = OPERATIONS[ours](images.clone(), strength / 10, sign, fill)
        assert (found.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"randaugment": 9, "channels": 2}, "randaugment takes 1 or 3 channels, the input has 2; set randaugment to 0"),
        ({"mixup": 0.8, "input_size": (16,)}, "the input has 1 spatial dimensions"),
        ({"cutmix": 0.8, "input_size": (4, 4, 4)}, "the input has 3 spatial dimensions"),
    ],
)
def test_input_that_cannot_have_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        augment_with(**changes)
