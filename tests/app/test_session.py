from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app_runs import write_images, write_run
from PIL import Image

from torchmae import presets
from torchmae.app import markup
from torchmae.app.session import Session
from torchmae.app.strings import TEXT
from torchmae.config import DataConfig
from torchmae.data.opening import open_data
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.embedding import Features, read_features
from torchmae.nn.masking import mask_from_tokens
from torchmae.training.pretrained import Prepared, Pretrained, load
from torchmae.training.saved_model import Description

CPU = torch.device("cpu")
HOLE = (0, 1, 7, 12, 23)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture(scope="module")
def photo(images: Path) -> Path:
    return images / "apple" / "00.png"


@pytest.fixture(scope="module")
def session(run: Path) -> Session:
    return Session([("a", load(run))], CPU)


def pretrained(preset: str = "vit_digits", **shape: Any) -> Pretrained:
    arguments = presets.arguments(preset, **shape)
    channels = arguments["in_chans"]
    description = Description(arguments, (0.5,) * channels, (0.25,) * channels, {}, None, "0")
    return Pretrained(presets.construct(arguments).eval(), description)


def test_filling_is_the_models_own_and_its_errors_are_of_the_hidden_pixels(
    session: Session, run: Path, photo: Path
) -> None:
    (filled,) = session.fill(session.open(photo), HOLE)
    model = load(run)
    flags = torch.zeros(24, dtype=torch.bool)
    flags[list(HOLE)] = True
    tensor = model.preprocess(photo)
    expected = (model.reconstruct(tensor, mask_from_tokens(flags)).images[0] * 0.25 + 0.5).numpy()
    np.testing.assert_allclose(filled.reconstructed, expected, atol=1e-6)
    hidden = np.repeat(np.repeat(flags.view(4, 6).numpy(), 4, 0), 4, 1)
    np.testing.assert_array_equal(filled.reconstructed[:, ~hidden], filled.original[:, ~hidden])
    squares = (filled.reconstructed - filled.original) ** 2
    assert filled.masked == pytest.approx(5 / 24)
    assert filled.mse == pytest.approx(squares[:, hidden].mean(), rel=1e-5)
    assert f"<td>21 %</td><td>{filled.mse:.4f}</td><td>{-10 * np.log10(filled.mse):.1f} dB</td>" in markup.filled(
        [filled], TEXT["en"]
    )
    np.testing.assert_array_equal(np.isnan(filled.error).ravel(), ~flags.numpy())
    assert filled.error[0, 1] == pytest.approx(squares[:, :4, 4:8].mean() ** 0.5, rel=1e-5)


def test_an_untrained_model_loses_to_interpolation_on_a_smooth_image(session: Session, photo: Path) -> None:
    (filled,) = session.fill(session.open(photo), HOLE)
    assert filled.mse_interpolation < filled.mse


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ((), "the mask removes 0 of 24 patches"),
        (range(24), "the mask removes 24 of 24 patches"),
        ((24,), "a patch outside the image"),
        ((-1,), "a patch outside the image"),
    ],
)
def test_holes_that_cannot_be_filled(session: Session, photo: Path, hidden: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        session.fill(session.open(photo), hidden)


def test_drawn_holes_are_those_of_the_model(session: Session) -> None:
    hidden = session.draw_mask("random", 0.75, 3)
    drawn = session.first.mask(1, strategy="random", ratio=0.75, seed=3)
    assert hidden == tuple(sorted(drawn.ids_masked[0].tolist())) and len(hidden) == 18


def test_two_runs_get_the_same_image_and_the_same_hole(run: Path, photo: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "b", input_size=(32, 48), patch_size=(16, 16), seed=1)
    session = Session([("a", load(run)), ("b", load(other))], CPU)
    first, second = session.fill(session.open(photo), HOLE)
    assert (first.name, second.name) == ("a", "b")
    assert second.original.shape == (3, 32, 48)
    # A patch of the second is 2 x 2 of the first's: hidden where it touches one of them.
    touched = (~np.isnan(first.error)).reshape(2, 2, 3, 2).any((1, 3))
    np.testing.assert_array_equal(~np.isnan(second.error), touched)
    with pytest.raises(ConfigError, match="b, whose patches are larger: the mask removes 6 of 6 patches; mask less"):
        session.fill(session.open(photo), (0, 2, 4, 12, 14, 16))


def test_what_it_sees(session: Session, photo: Path) -> None:
    (seen,) = session.look(session.open(photo))
    assert seen.colours.shape == (4, 6, 3) and seen.attention is not None
    assert seen.attention.shape == (2, 4, 6)
    assert (seen.attention.sum((1, 2)) < 1).all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            pretrained(input_size=(16, 24), in_chans=1),
            "a takes .* 16x24 pixels and 3 channels, b of 16x24 and 1;",
        ),
        (
            pretrained(input_size=(16, 16), in_chans=3),
            "a takes .* 16x24 pixels and 3 channels, b of 16x16 and 3;",
        ),
    ],
)
def test_runs_that_cannot_be_compared(run: Path, other: Pretrained, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Session([("a", load(run)), ("b", other)], CPU)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (pretrained("mlp"), r"this model has no patches to look at \(m\)"),
    ],
)
def test_models_that_the_page_cannot_show(model: Pretrained, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Session([("m", model)], CPU)


def test_arrays_for_models_of_other_channels(tmp_path: Path, photo: Path) -> None:
    session = Session([("m", pretrained(input_size=(16, 24), in_chans=5))], CPU)
    array = np.random.default_rng(0).random((16, 24, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    picture = session.open(tmp_path / "a.npy")
    np.testing.assert_allclose(session.original(picture), array.transpose(2, 0, 1), atol=1e-6)
    assert session.fill(picture, HOLE)[0].reconstructed.shape == (5, 16, 24)
    with pytest.raises(DataError, match="has 3 channels where 5 are wanted"):
        session.open(photo)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 9, 4)), "has 4 channels where 3 are wanted"),
        (np.zeros((4, 4, 3), dtype=np.complex64), "holds complex64"),
        (np.zeros((0, 4, 3)), "samples of shape 0 x 4 x 3: they are empty"),
        (np.array([print], dtype=object), "holds objects"),
    ],
)
def test_arrays_that_are_refused(session: Session, tmp_path: Path, array: np.ndarray[Any, Any], message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        session.open(tmp_path / "a.npy")
    assert str(tmp_path) not in str(caught.value)


def test_files_that_are_refused(session: Session, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(DataError, match="^not an image, or cut short"):
        session.open(bad)
    Image.new("1", (20_000, 10_000)).save(bad)
    with pytest.raises(DataError, match="pixels"):
        session.open(bad)


def bank_of(session: Session, paths: list[Path], pool: str = "mean") -> Features:
    features = session.first.encode(session.first.preprocess(*paths), pool).numpy()
    return Features(features, np.arange(len(paths)) % 2, np.array([str(path) for path in paths]), {"pool": pool})


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_an_image_is_its_own_nearest_neighbour(session: Session, run: Path, images: Path, pool: str) -> None:
    paths = sorted(images.rglob("*.png"))
    with_bank = Session([("a", load(run))], CPU, bank=bank_of(session, paths, pool))
    picture = with_bank.open(paths[3])
    first, *rest = with_bank.neighbours(picture, 5)
    assert (first.name, first.label) == (str(paths[3]), "pear")
    assert first.cosine == pytest.approx(1, abs=1e-5)
    assert first.image is not None
    np.testing.assert_allclose(first.image, with_bank.original(picture), atol=1e-6)
    assert [item.cosine for item in rest] == sorted((item.cosine for item in rest), reverse=True)


def test_neighbours_whose_images_are_gone_or_lie_in_the_runs_data(session: Session, run: Path, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", array)
    config = DataConfig(source=str(tmp_path / "images.npy"), val_size=2, mean=(0.5,) * 3, std=(0.25,) * 3)
    data = open_data(config, input_size=(16, 24), channels=3, device=CPU)
    model = load(run)
    tensors = model.preprocess(*array[:4])
    names = np.array([data.train.source.name(0), *(f"gone-{i}" for i in range(3))])
    bank = Features(model.encode(tensors).numpy(), np.full(4, -1), names, {})
    with_data = Session([("a", model)], CPU, data, bank)
    assert [example.shape for example in with_data.examples] == [(3, 16, 24)]
    found = {item.name: item for item in with_data.neighbours((Prepared(tensors[:1], None, ("",)),))}
    assert found["gone-0"].image is None and found["gone-0"].label == ""
    expected = next(iter(data.train.eval_batches(np.array([0]), 1))).images[0].numpy() * 0.25 + 0.5
    image = found[str(names[0])].image
    assert image is not None
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_features_of_another_model_and_of_patches(session: Session, run: Path, images: Path, tmp_path: Path) -> None:
    paths = sorted(images.rglob("*.png"))[:3]
    bank = bank_of(session, paths)
    with pytest.raises(ConfigError, match="the features have 16 values an image and this model gives 32"):
        Session([("a", load(run))], CPU, bank=bank._replace(about={"pool": "both"}))
    with pytest.raises(ConfigError, match="the features are those of another model"):
        Session([("a", load(run))], CPU, bank=bank._replace(about={"weights": "0123"}))
    content = {"labels": np.zeros(2, dtype=np.int64), "paths": np.array(["a", "b"])}
    np.savez(tmp_path / "f.npz", features=np.zeros((2, 24, 16), dtype=np.float32), **content)
    with pytest.raises(ConfigError, match="features of every patch"):
        Session([("a", load(run))], CPU, bank=read_features(tmp_path / "f.npz"))
    np.savez(tmp_path / "g.npz", features=np.zeros((0, 16), dtype=np.float32), labels=np.zeros(0), paths=np.array([""]))
    with pytest.raises(DataError, match="holds no images"):
        Session([("a", load(run))], CPU, bank=read_features(tmp_path / "g.npz"))
