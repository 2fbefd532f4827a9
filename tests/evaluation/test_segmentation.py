"""Segmentation: masks as people store them, windows, figures beside those of torchmetrics, and mistakes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import MonkeyPatch
from safetensors.torch import load_file
from tiny import write_run

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import ComputeOptions, EvaluateOptions, SegmentationOptions
from torchmae.config.finetune import FinetuneConfig
from torchmae.data.items import Context
from torchmae.errors import ConfigError, DataError, Interrupted
from torchmae.evaluation import segmentation, segmentation_windows, suite
from torchmae.evaluation.images import ModelInput
from torchmae.evaluation.segmentation_data import SegmentationData, open_segmentation_data, read_mask
from torchmae.evaluation.segmentation_finetune import SegmentationTask
from torchmae.random import Purpose, uniform

CPU = torch.device("cpu")


def blocks(random: np.random.Generator, count: int = 3) -> np.ndarray[Any, Any]:
    """(24, 24) ids in blocks of 8 pixels."""
    return np.kron(random.integers(0, count, (3, 3)), np.ones((8, 8), int)).astype(np.uint8)


def save(folder: Path, ids: np.ndarray[Any, Any], name: str, mask: Any = None) -> None:
    """A picture whose brightness shows the ids, and its mask."""
    values = ids * 100 + np.random.default_rng(len(name)).integers(0, 20, ids.shape)
    for kind, array in (("images", values.astype(np.uint8)), ("masks", ids if mask is None else mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
        picture.save(folder / kind / f"{name}.png")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(10):
        save(tmp_path / "made", blocks(random), str(i))
    return tmp_path / "made"


def opened(source: Path, size: tuple[int, int] = (8, 8), **options: Any) -> SegmentationData:
    data = DataOptions(source=str(source), num_workers=0)
    asked = {"test_data": options.pop("test_data", None), "train_images": options.pop("train_images", None)}
    settings = EvaluateOptions(method="segmentation", data=data, segmentation=SegmentationOptions(**options), **asked)
    return open_segmentation_data(settings, ModelInput(size, 1, None, CPU, 16))


def maps(data: SegmentationData) -> list[np.ndarray[Any, Any]]:
    return [data.maps.read(path) for path in data.train.source.files]  # type: ignore[attr-defined]


def evaluated(run: Path | str, source: Path, **options: Any) -> suite.Evaluation:
    config = SegmentationOptions(**{"epochs": 40, "batch_size": 16, "lr": 2e-2, **options.pop("config", {})})
    data = DataOptions(source=str(source), num_workers=0)
    settings = EvaluateOptions(method="segmentation", data=data, segmentation=config, **options)
    compute = ComputeOptions(batch_size=16, precision="fp32", threads=1, device="cpu", progress="none")
    return suite.evaluate(run, settings, compute)


def test_brightness_decides(made: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    evaluation = evaluated(run, made)
    assert suite.record_evaluation(run, evaluation) is not None
    figures = evaluation.figures()
    assert list(figures) == ["model", "random", "pixels"]
    for found in figures.values():
        assert 80 < found["segmentation_miou_low"] <= found["segmentation_miou"] <= found["segmentation_miou_high"]
        assert found["segmentation_accuracy"] > 90
    details = evaluation.results["segmentation"]["model"].details["segmentation"]["per_class"]
    assert np.mean([row["iou"] for row in details]) == pytest.approx(figures["model"]["segmentation_miou"])
    assert sum(row["pixels"] for row in details) == 2 * 24 * 24
    with Image.open(run / "pictures" / "segmentation.png") as picture:
        assert picture.info["Title"]
        assert picture.width > 3 * 250
    again = evaluated(run, made, config={"memory_limit": 1e-5})
    assert any("segmentation.memory_limit" in note for note in again.notes)


def test_blocks_are_concatenated(made: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "deep", depth=2)
    evaluation = evaluated(run, made, layer="last-2", config={"epochs": 2})
    assert np.isfinite(evaluation.figures()["model"]["segmentation_miou"])
    with pytest.raises(ConfigError, match="layer is 'last-3' and this vision transformer gives 2 blocks; .*last-2"):
        evaluated(run, made, layer="last-3")
    with pytest.raises(ConfigError, match="segmentation.finetune trains the whole encoder; leave layer out"):
        evaluated(run, made, layer=-2, config={"finetune": True})


def test_masks_are_read_as_people_store_them(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    ids = blocks(random)
    ids.flat[:3] = (0, 1, 2)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 255, 0, 0])  # two ids of one colour
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 7]], dtype=np.uint8)[ids]
    kinds = {"grey": ids, "palette": palette, "deep": ids.astype(np.uint16), "colour": colours}
    for kind, mask in kinds.items():
        for i in range(5):
            save(tmp_path / kind, ids, str(i), mask)
        data = opened(tmp_path / kind)
        order = [0, 2, 1] if kind == "colour" else [0, 1, 2]  # by the number of the colour
        np.testing.assert_array_equal(maps(data)[0], np.argsort(order)[ids])
        assert data.classes == (("#000000", "#00c807", "#c80000") if kind == "colour" else ("0", "1", "2"))
        assert (len(data.train), len(data.test)) == (4, 1)
    Image.fromarray(ids).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif", Context())[0], ids)
    for i in range(5):
        save(tmp_path / "two", ids, str(i), (ids > 0).astype(np.uint8) * 255)
    assert opened(tmp_path / "two").classes == ("0", "255")
    assert maps(opened(tmp_path / "two"))[0].max() == 1
    ignored = opened(tmp_path / "grey", ignore=2)
    assert (ignored.classes, set(np.unique(maps(ignored)[0]))) == (("0", "1"), {0, 1, 255})
    assert len(opened(tmp_path / "grey", classes=9).classes) == 9
    foreground = opened(tmp_path / "deep", instances=True)
    np.testing.assert_array_equal(maps(foreground)[0], ids > 0)
    np.testing.assert_array_equal(maps(opened(tmp_path / "two", threshold=127))[0], ids > 0)


def test_pairs_are_found(made: Path, tmp_path: Path) -> None:
    ids = blocks(np.random.default_rng(2))
    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            save(tmp_path / "splits" / split, ids, f"{split}{i}")
    data = opened(tmp_path / "splits")
    assert (len(data.train), len(data.test)) == (3, 2)
    for i in range(5):
        (tmp_path / "beside").mkdir(exist_ok=True)
        Image.fromarray(ids * 80 + np.uint8(i)).save(tmp_path / "beside" / f"x{i}.jpg")
        Image.fromarray(ids).save(tmp_path / "beside" / f"x{i}_mask.png")
    assert len(opened(tmp_path / "beside").train) == 4
    for header in ("name,image,mask,split\n", "a,b,c,split\n"):
        lines = (f"{i},images/{i}.png,masks/{9 - i}.png,{'test' if i > 5 else 'train'}\n" for i in range(10))
        (made / "list.csv").write_text(header + "".join(lines))
        data = opened(made / "list.csv")
        assert (len(data.train), len(data.test)) == (6, 4)
        assert data.train.source.files[0] == made / "masks" / "9.png"  # type: ignore[attr-defined]
    (made / "plain.csv").write_text("".join(f"images/{i}.png,masks/{i}.png\n" for i in range(10)))
    data = opened(made / "plain.csv")
    assert len(data.train) == 8
    before = data.fingerprints()
    Image.fromarray(ids).save(data.train.source.files[0])  # type: ignore[attr-defined]
    after = opened(made / "plain.csv").fingerprints()
    assert before["train_labels"] != after["train_labels"]
    assert before["test_labels"] == after["test_labels"]


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (25, 9), (5, 30), (3, 4)])
@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_windows_cover_every_pixel(size: tuple[int, int], overlap: float) -> None:
    whole = segmentation_windows.enlarged(size, (8, 8))
    seen = np.zeros(whole, dtype=int)
    for _, top, left in segmentation_windows.windows_of(0, size, (8, 8), overlap):
        assert 0 <= top <= whole[0] - 8
        assert 0 <= left <= whole[1] - 8
        seen[top : top + 8, left : left + 8] += 1
    assert seen.min() >= 1
    assert overlap or seen.max() <= 4
    assert min(whole) >= 8
    assert (len(np.unique(seen)) == 1) == (whole[0] % 8 == whole[1] % 8 == 0 and (not overlap or whole == (8, 8)))


def test_windows_are_put_together_again(made: Path) -> None:
    """A picture three times the model's input: logits that are the pixels themselves come back as they were."""
    data = opened(made)
    found = segmentation_windows.read_picture(data.test, 0)
    assert found is not None
    picture = data.normalisation.apply(found.values, found.dtype)[0, 0]
    sizes = []

    def segment(windows: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        assert valid is None
        sizes.append(tuple(windows.shape))
        return torch.cat([torch.zeros_like(windows), windows], 1)

    guess = segmentation_windows.segmented(data.test, 0, (24, 24), segment, CPU)
    np.testing.assert_array_equal(guess, (picture > 0).numpy())
    assert sum(size[0] for size in sizes) == 16
    assert {size[1:] for size in sizes} == {(1, 8, 8)}
    large = replace(data.test, model=ModelInput((32, 32), 1, None, CPU, 16))  # pictures are enlarged, guesses are not
    assert segmentation_windows.segmented(large, 0, (24, 24), segment, CPU).shape == (24, 24)  # type: ignore[union-attr]


@pytest.mark.parametrize("finetune", [False, True])
def test_pixels_without_data_reach_no_figure(tmp_path: Path, finetune: bool) -> None:
    tifffile = pytest.importorskip("tifffile")
    run, random, found = write_run(tmp_path / "run"), np.random.default_rng(0), []
    pictures = [(random.random((20, 24)) + 2 * (np.arange(24) // 8 % 2)).astype(np.float32) for _ in range(10)]
    for number, mark in enumerate((np.nan, -9999.0)):
        place = tmp_path / str(number)
        for name in ("images", "masks"):
            (place / name).mkdir(parents=True)
        for i, values in enumerate(pictures):
            empty = np.zeros(values.shape, bool)
            empty[:9, : 5 + i] = True
            tifffile.imwrite(place / "images" / f"{i}.tif", np.where(empty, mark, values).astype(np.float32))
            classes = np.where(empty, number, values > 1.5).astype(np.uint8)
            Image.fromarray(classes).save(place / "masks" / f"{i}.png")
        data = DataOptions(source=str(place), num_workers=0, nodata="auto" if number == 0 else -9999)
        config = SegmentationOptions(epochs=5, batch_size=16, finetune=finetune)
        asked = {"segmentation": config, "finetune": FinetuneConfig(epochs=1, batch_size=8)}
        settings = EvaluateOptions(method="segmentation", data=data, out=str(tmp_path / f"out{number}"), **asked)
        compute = ComputeOptions(batch_size=16, precision="fp32", threads=1, device="cpu", progress="none")
        figures = suite.evaluate(run, settings, compute).figures()["model"]
        found.append({name: value for name, value in figures.items() if not name.endswith("seconds")})
        assert (tmp_path / f"out{number}" / "pictures").is_dir()
    assert found[0] == found[1]


def test_figures_are_those_of_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification", reason="dev installs torchmetrics")
    random = np.random.default_rng(0)
    truth, guess = (random.integers(0, 4, (5, 9, 9)) for _ in range(2))
    truth[0, 0], guess[truth == 3] = 255, 3

    def counted(truth: Any, guess: Any, num_classes: int) -> np.ndarray[Any, Any]:
        counts = np.zeros((5, 3, num_classes), dtype=np.int64)
        for picture, (right, made) in enumerate(zip(truth, guess, strict=True)):
            known = right != 255
            for row, values in enumerate((right[known & (right == made)], right[known], made[known])):
                counts[picture, row] = np.bincount(values, minlength=num_classes)
        return counts

    counts = counted(truth, guess, 5)  # of five classes, one never there
    result = segmentation.figures("x", counts, list("abcde"), seed=3)
    pair = torch.from_numpy(guess), torch.from_numpy(truth)
    for name, kind, options in (
        ("x_miou", "MulticlassJaccardIndex", {"average": "macro"}),
        ("x_accuracy", "MulticlassAccuracy", {"average": "micro"}),
    ):
        theirs = getattr(classification, kind)(num_classes=4, ignore_index=255, **options)(*pair)
        assert result.figures[name] == pytest.approx(100 * theirs.item(), rel=1e-5)
    each = classification.MulticlassJaccardIndex(num_classes=4, ignore_index=255, average=None)(*pair)
    found = [row["iou"] for row in result.details["x"]["per_class"]]
    assert found[:4] == pytest.approx((100 * each).tolist(), rel=1e-5)
    assert found[4] is None
    means = []
    for row in (uniform(3, 0, np.arange(1000), Purpose.BOOTSTRAP, 5) * 5).astype(int):
        hit, right, made = counts[row].sum(0)[:, :4]
        means.append(100 * np.mean(hit / (right + made - hit)))
    ends = [result.figures[f"x_miou_{end}"] for end in ("low", "high")]
    np.testing.assert_allclose(ends, np.quantile(means, [0.025, 0.975]))
    assert "x_miou_low" not in segmentation.figures("x", counts[:1], list("abcde"), seed=3).figures
    assert "x_foreground" not in result.figures
    of_two = segmentation.figures("x", counted(truth % 2, guess % 2, 2), list("ab"), seed=3)
    theirs = classification.BinaryJaccardIndex()(*(values % 2 for values in pair))
    assert of_two.figures["x_foreground"] == pytest.approx(100 * theirs.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("size", {}, "masks/3.png is 20 x 24 pixels and its picture 24 x 24; save it"),
        (
            "ids",
            {"classes": 3},
            "masks/3.png holds the id 7 and segmentation.classes is 3: .*; --segmentation.classes 8",
        ),
        ("alone", {}, "1 of 8 training pictures have no mask, such as .*3.png; put masks/"),
        ("one", {}, "all 8 training masks are of 0 alone; give masks of two classes"),
        ("void", {}, "ids up to 2 and 255 .*; --segmentation.ignore 255"),
        ("all void", {}, "all masks hold 255 alone .*; give masks with two classes or more"),
        ("soft", {}, "from soft edges or JPEG; --segmentation.threshold 127"),
        ("instances", {}, "ids up to 310 .*; --segmentation.instances true"),
        ("colours", {}, "the masks have .* colours, .*; save one colour a class"),
        ("fractions", {}, "none of 8 training pairs can be read; the last: .*7.png: its values are no whole numbers"),
    ],
)
def test_wrong_masks_are_one_line(made: Path, change: str, options: dict[str, Any], message: str) -> None:
    random = np.random.default_rng(3)
    file = made / "masks" / "3.png"
    ids = np.asarray(Image.open(file)).copy()
    (made / "list.csv").write_text(
        "image,mask,split\n"
        + "".join(f"images/{i}.png,masks/{i}.png,{'test' if i > 7 else 'train'}\n" for i in range(10))
    )
    if change == "size":
        Image.fromarray(ids[:, :20]).save(file)
    elif change == "ids":
        ids[0, 0] = 7
        Image.fromarray(ids).save(file)
    elif change == "alone":
        file.unlink()
    elif change == "void":
        ids[0] = 255
        Image.fromarray(ids).save(file)
    elif change == "all void":
        for i in range(10):
            Image.fromarray(np.full_like(ids, 255)).save(made / "masks" / f"{i}.png")
    elif change == "instances":
        Image.fromarray(np.arange(576).reshape(24, 24).clip(max=310).astype(np.uint16)).save(file)
    elif change == "colours":
        Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file)
    else:
        soft = np.where(ids > 0, 255, 0)
        soft[::6] = random.integers(0, 255, soft[::6].shape)
        whole = {"soft": soft.astype(np.uint8), "fractions": ids.astype(np.float32) / 2, "one": np.zeros_like(ids)}[
            change
        ]
        for i in range(10):
            Image.fromarray(whole).save(made / "masks" / f"{i}.png", "TIFF" if change == "fractions" else "PNG")
    with pytest.raises(DataError, match=message):
        opened(made / "list.csv", **options)


def test_the_same_pictures_in_both_sets(made: Path) -> None:
    lines = (f"images/{i % 5}.png,masks/{i % 5}.png,{'test' if i > 4 else 'train'}\n" for i in range(10))
    (made / "list.csv").write_text("image,mask,split\n" + "".join(lines))
    with pytest.raises(ConfigError, match="the test split leads to the training images; choose"):
        opened(made / "list.csv")


def test_options_that_cannot_work(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="segmentation.instances and segmentation.threshold"):
        SegmentationOptions(instances=True, threshold=3)
    with pytest.raises(ConfigError, match="masks are of pictures"):
        opened(made, size=(8,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="out is not given"):
        evaluated("random", made, preset="vit_digits")
    asked: dict[str, Any] = {"preset": "vit_digits", "out": str(tmp_path / "o")}
    assert list(evaluated("pixels", made, **asked).figures()) == ["pixels"]
    with pytest.raises(ConfigError, match="'pixels' has no network to train; evaluate a run"):
        evaluated("pixels", made, **asked, config={"finetune": True})
    with pytest.raises(ConfigError, match="finetune.init is 'random'"):
        EvaluateOptions(method="segmentation", finetune=FinetuneConfig(init="random"))


def test_fine_tuning_goes_on_where_it_was(made: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    tuned: dict[str, Any] = {"config": {"finetune": True}}
    whole = FinetuneConfig(epochs=4, base_lr=2e-2)
    evaluation = evaluated(run, made, finetune=whole, out=str(tmp_path / "whole"), **tuned)
    figures = evaluation.figures()
    assert list(figures) == ["model", "random"]
    assert figures["model"]["segmentation_finetune_images"] == 8 * 9  # windows
    assert (run / "pictures").exists() is False
    assert (tmp_path / "whole" / "pictures" / "segmentation_finetune.png").exists()
    weights = load_file(tmp_path / "whole" / "segmentation-finetune" / "model.safetensors")
    with pytest.raises(ConfigError, match="exists already; go on with --resume"):
        evaluated(run, made, finetune=whole, out=str(tmp_path / "whole"), **tuned)
    with MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "after_step", stop_after(5))
        with pytest.raises(Interrupted):
            evaluated(run, made, finetune=whole, out=str(tmp_path / "parts"), **tuned)
    again = evaluated(run, made, finetune=whole, resume=str(tmp_path / "parts"), **tuned)
    assert again.figures()["model"]["segmentation_finetune_miou"] == figures["model"]["segmentation_finetune_miou"]
    resumed = load_file(tmp_path / "parts" / "segmentation-finetune" / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def stop_after(count: int) -> Any:
    steps = []

    def after_step(task: SegmentationTask) -> None:
        steps.append(task)
        if len(steps) == count:
            os.kill(os.getpid(), signal.SIGTERM)

    return after_step
