from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import torchmae
from torchmae import presets
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError, DataError
from torchmae.training.pretrained import Pretrained
from torchmae.training.saved_model import Description, write_description, write_weights

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def pretrained(
    input_size: tuple[int, ...] = (8, 12), in_chans: int = 3, strategy: str = "random", **others: Any
) -> Pretrained:
    patch = tuple(4 for _ in input_size)
    arguments = presets.arguments(
        "vit_digits", input_size=input_size, patch_size=patch, in_chans=in_chans, **SIZES, **DECODER, **others
    )
    mask = {"strategy": strategy, "ratio": 0.5}
    description = Description(arguments, MEAN[:in_chans], STD[:in_chans], mask, None, "0.1.0")
    return Pretrained(presets.construct(arguments).eval(), description)


def levels(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_array_of_the_right_size_is_only_normalised() -> None:
    array = levels((8, 12, 3))
    got = pretrained().preprocess(array)
    expected = (array / 255 - np.array(MEAN)) / np.array(STD)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].numpy(), np.moveaxis(expected, -1, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("convert", "atol"),
    [
        (lambda array: array.astype(np.uint16) * 257, 1e-5),
        (lambda array: (array / 255).astype(np.float32), 1e-5),
        (lambda array: (array / 255).astype(np.float64), 1e-5),
        (lambda array: (array / 255).astype(np.float16), 1e-2),
        (np.asfortranarray, 0),
        (lambda array: np.pad(array, ((0, 0), (0, 12), (0, 0)))[:, :12], 0),
    ],
    ids=["uint16", "float32", "float64", "float16", "fortran", "view"],
)
def test_the_type_of_an_array_does_not_matter(convert: Any, atol: float) -> None:
    array = levels((8, 12, 3))
    torch.testing.assert_close(
        pretrained().preprocess(convert(array)), pretrained().preprocess(array), atol=atol, rtol=0
    )


def test_the_middle_of_a_larger_image_is_resized() -> None:
    array = np.zeros((16, 40, 3), dtype=np.uint8)
    array[:, 8:32] = 200  # 16 x 24 has the proportions of 8 x 12
    got = pretrained().preprocess(array)
    expected = (200 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(got, expected.view(1, 3, 1, 1).expand(1, 3, 8, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_files_of_any_mode(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(levels((8, 12)).astype(np.uint16) * 257)
    picture = grey if mode == "I;16" else Image.fromarray(levels((8, 12, 3))).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(path)
    for channels in (1, 3):
        got = pretrained(in_chans=channels).preprocess(path, str(path))
        assert got.shape == (2, channels, 8, 12)
        assert got.isfinite().all()
        assert got.std() > 0.1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 12), np.uint8), "an image has shape (8, 12); this model takes 2 axes and 3 channels, last"),
        (np.zeros((8, 12, 1), np.uint8), "an image has shape (8, 12, 1); this model takes 2 axes and 3 channels, last"),
        (np.zeros((8, 12, 3), np.int64), "an image has type int64; give uint8, uint16 or floats from 0 to 1"),
        (np.zeros((8, 12, 3), bool), "an image has type bool; give uint8, uint16 or floats from 0 to 1"),
    ],
)
def test_arrays_that_do_not_fit(array: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pretrained().preprocess(array)
    assert str(caught.value) == message


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("x")
    for path, reason in ((tmp_path / "a.jpg", "not an image"), (tmp_path / "b.png", "No such file or directory")):
        with pytest.raises(DataError) as caught:
            pretrained().preprocess(path)
        assert str(caught.value).startswith(f"cannot read {path}: {reason}")
        assert "--data" in caught.value.fix
    with pytest.raises(ConfigError, match="no images were given; give one or more"):
        pretrained().preprocess()


@pytest.mark.parametrize("size", [(8,), (8, 12), (4, 8, 12)])
def test_any_number_of_axes(size: tuple[int, ...]) -> None:
    model = pretrained(size, in_chans=2)
    images = model.preprocess(*levels((3, *size, 2)))
    assert images.shape == (3, 2, *size)
    assert model.encode(images).shape == (3, 16)
    result = model.reconstruct(images, model.mask(3))
    assert result.images.shape == images.shape
    assert torch.equal(result.images[~result.removed.expand_as(images)], images[~result.removed.expand_as(images)])
    assert not result.images.requires_grad


def test_features_of_every_kind() -> None:
    model = pretrained()
    images = model.preprocess(*levels((2, 8, 12, 3)))
    shapes = {pool: tuple(model.encode(images, pool).shape) for pool in ("mean", "cls", "tokens")}
    assert shapes == {"mean": (2, 16), "cls": (2, 16), "tokens": (2, 6, 16)}
    torch.testing.assert_close(model.encode(images, "tokens").mean(1), model.encode(images))
    assert not model.encode(images).requires_grad
    with pytest.raises(ConfigError, match="pool is 'max'"):
        model.encode(images, "max")


def test_masks_are_as_trained_unless_said() -> None:
    model = pretrained(strategy="grid")
    assert model.mask(4).ids_masked.shape == (4, 3)
    assert torch.equal(model.mask(4).ids_keep, model.mask(4, strategy="grid", ratio=0.5, seed=0).ids_keep)
    assert model.mask(4, ratio=0.8).ids_masked.shape == (4, 5)
    random = model.mask(4, strategy="random")
    assert not torch.equal(random.ids_keep, model.mask(4, strategy="random", seed=1).ids_keep)
    assert torch.equal(random.ids_keep[:2], model.mask(2, strategy="random").ids_keep)
    for ratio in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigError, match="mask ratio is"):
            model.mask(4, ratio=ratio)
    with pytest.raises(ConfigError, match=r"mask\.strategy is 'elements'"):
        model.mask(4, strategy="elements")


def test_shown_undoes_preprocess() -> None:
    array = levels((8, 12, 3))
    images = pretrained().preprocess(array)
    back = Normalisation(MEAN, STD).shown(images)
    np.testing.assert_allclose(back[0].numpy(), np.moveaxis(array / 255, -1, 0), atol=1e-6)
    assert Normalisation(MEAN, STD).shown(images * 1000).max() > 10  # nothing is clamped before it is measured


def test_load(tmp_path: Path) -> None:
    made = pretrained()
    write_description(tmp_path / "model.json", made.description)
    write_weights(tmp_path / "model.safetensors", made.model.state_dict())
    array = levels((8, 12, 3))
    loaded = torchmae.load(str(tmp_path))
    assert torch.equal(loaded.encode(loaded.preprocess(array)), made.encode(made.preprocess(array)))
