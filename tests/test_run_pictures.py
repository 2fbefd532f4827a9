from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchmae import presets, visualize
from torchmae.cli import main
from torchmae.config import DataConfig
from torchmae.data.loader import mixed_subset
from torchmae.data.opening import Data, open_data
from torchmae.report.page import load_titled
from torchmae.report.panels import Look
from torchmae.training.pretrained import Prepared, Pretrained
from torchmae.training.runtime import Runtime
from torchmae.training.saved_model import Description
from torchmae.visualize import draw_ratios, held_out, sample, write_pictures

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, "fp32", 1)


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    # t-SNE of the usual thousand takes seconds.
    monkeypatch.setattr(visualize, "REPORT_POINTS", 60)


def pretrained(preset: str = "vit_digits", strategy: str = "random", **overrides: Any) -> Pretrained:
    arguments = presets.arguments(preset, **overrides)
    channels = arguments["in_chans"]
    mask = {"strategy": strategy, "ratio": 0.75}
    description = Description(arguments, (0.3,) * channels, (0.4,) * channels, mask, None, "0")
    return Pretrained(presets.construct(arguments).eval(), description)


def tiny(**overrides: Any) -> Pretrained:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
    return pretrained(**{**small, **overrides})


def digits(**settings: Any) -> Data:
    config = DataConfig(source="digits", mean=(0.3,), std=(0.4,), **settings)
    return open_data(config, input_size=(8, 8), channels=1, device=CPU)


def arrays(folder: Path, count: int, size: tuple[int, ...], dims: int, **settings: Any) -> Data:
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.random((count, *size), dtype=np.float32))
    channels = size[-1]
    config = DataConfig(
        source=str(folder / "images.npy"), mean=(0.3,) * channels, std=(0.4,) * channels, num_workers=0, **settings
    )
    return open_data(config, input_size=size[:dims], channels=channels, device=CPU)


def names(paths: list[Path]) -> list[str]:
    return [path.stem.partition("-")[2] for path in paths]


def test_a_report_has_every_picture(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures", tiny(), digits(), RUNTIME)
    assert paths == sorted((tmp_path / "pictures").iterdir())
    assert names(paths) == ["features", "attention", "neighbours", "map", "ratios"]
    titled = [load_titled(path) for path in paths]
    assert all(picture is not None and len(picture.description) > 100 for picture in titled)


@pytest.mark.usefixtures("pictures_of_features")
def test_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: Any) -> None:
        raise AssertionError("features of the last measurement are at hand")

    monkeypatch.setattr(visualize, "extract", again)
    small = ["--recipe=digits", "--epochs=1", "--eval.count=1"]
    probed = ["--eval.knn_train", "300", "--eval.knn_val", "60", "--threads", "1", "--progress", "none"]
    assert main(["pretrain", *small, *probed, "--out", str(tmp_path / "run")]) == 0
    assert names(sorted((tmp_path / "run" / "pictures").iterdir()))[2:4] == ["neighbours", "map"]


def test_the_same_model_gives_the_same_pictures(tmp_path: Path) -> None:
    model, data = tiny(), digits()
    for folder in ("a", "b"):
        write_pictures(tmp_path / folder, model, data, RUNTIME)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_what_a_model_cannot_have_is_left_out(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "no-class-token", tiny(class_token=False), digits(), RUNTIME)
    assert names(paths) == ["features", "neighbours", "map", "ratios"]
    mlp = pretrained("mlp", "elements_inverted", input_size=(8, 8), in_chans=1)
    assert names(write_pictures(tmp_path / "mlp", mlp, digits(), RUNTIME)) == ["neighbours", "map", "ratios"]


def test_too_few_images_make_no_map(tmp_path: Path) -> None:
    data = arrays(tmp_path, 5, (8, 8, 1), 2, val="none")
    assert data.val is None
    assert names(write_pictures(tmp_path / "a", tiny(), data, RUNTIME)) == [
        "features",
        "attention",
        "neighbours",
        "ratios",
    ]


@pytest.mark.parametrize(("size", "patch"), [((32, 2), (4,)), ((4, 8, 8, 1), (2, 4, 4))], ids=["signals", "volumes"])
def test_signals_and_volumes(tmp_path: Path, size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    data = arrays(tmp_path, 30, size, len(patch), flip=False)
    model = tiny(input_size=size[:-1], patch_size=patch, in_chans=size[-1])
    assert names(write_pictures(tmp_path / "a", model, data, RUNTIME))[0] == "features"


def test_the_images_drawn_are_held_out_and_always_the_same() -> None:
    data = digits()
    assert held_out(data) is data.val
    assert data.val is not None
    (images, _, names), again = sample(data.val, 8, None), sample(data.val, 8, None)
    assert images.shape == (8, 1, 8, 8) and len(set(names)) > 3
    torch.testing.assert_close(images, again.images)
    assert len(set(mixed_subset(len(data.val), 100).tolist())) == 100
    assert len(mixed_subset(len(data.val), 10**6)) == len(data.val)


def test_the_tutorials_strategy_hides_what_the_header_says() -> None:
    mlp = pretrained("mlp", "elements_inverted", input_size=(8, 8), in_chans=1)
    seen: list[float] = []
    reconstruct = mlp.reconstruct

    def watched(images: torch.Tensor, mask: Any) -> Any:
        seen.append(mask.flags.float().mean().item())
        return reconstruct(images, mask)

    mlp.reconstruct = watched  # type: ignore[method-assign]
    draw_ratios(mlp, Prepared(torch.rand(40, 1, 8, 8), None, ()), Look(), (0.25, 0.9))
    assert seen == pytest.approx([0.25, 0.9], abs=0.03)
