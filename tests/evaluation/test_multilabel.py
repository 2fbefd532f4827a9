"""Images of several classes each: labels as people have them, figures as torchmetrics gives them, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torchmetrics.functional.classification as peer
from PIL import Image
from sklearn.linear_model import LogisticRegression

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import ComputeOptions, EvaluateOptions
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation import linear, multilabel, suite
from torchmae.evaluation.scores import Labelled
from torchmae.evaluation.sharing import WHOLE, Parts

CLASSES = ("bright", "dark", "left")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are bright, bright on the left, both, or nothing known, in a list with a column of labels."""
    folder = tmp_path_factory.mktemp("several")
    random = np.random.default_rng(0)
    lines = ["path,label,split"]
    for i in range(60):
        bright, left = i % 2, i // 2 % 2
        pixels = random.integers(0, 60, (8, 8)) + 120 * bright
        pixels[:, :4] += 70 * left
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        names = ["bright" if bright else "dark", *(["left"] if left else [])]
        lines.append(f"{i}.png,{'' if i == 59 else ' | '.join(names)},{'train' if i < 40 else 'test'}")
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "list.csv"


def evaluated(run: Path, source: Path, **options: Any) -> suite.Evaluation:
    settings = EvaluateOptions(data=DataOptions(source=str(source), num_workers=0), **options)
    compute = ComputeOptions(batch_size=16, precision="fp32", threads=1, device="cpu", progress="none")
    return suite.evaluate(run, settings, compute)


def test_labels_of_lists_and_arrays(made: Path, tmp_path: Path) -> None:
    splits = open_splits(str(made))
    for split, count in (("train", 40), ("test", 20)):
        source = splits[split]
        assert source.labels is None and source.tags is not None
        assert (source.classes, source.tags.shape) == (CLASSES, (count, 3))
        assert source.tags[1:4].tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 1]]
    assert splits["test"].tags[-1].tolist() == [-1, -1, -1]  # type: ignore[index]
    assert any("several classes an image" in note for note in splits["train"].remarks)
    tags = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=tags)
    source = open_splits(str(tmp_path / "a.npz"))["train"]
    np.testing.assert_array_equal(source.tags, tags)  # type: ignore[arg-type]
    before = source.label_fingerprint()
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=1 - tags)
    assert open_splits(str(tmp_path / "a.npz"))["train"].label_fingerprint() != before


def test_figures_are_torchmetrics() -> None:
    torch.manual_seed(0)
    tags = (torch.rand(50, 4) < torch.tensor([0.5, 0.2, 0.7, 0.0])).to(torch.int8)
    scores = (torch.rand(50, 4) + 0.4 * tags).round(decimals=1)
    result = multilabel.ranked("x", scores, tags, ("a", "b", "c", "d"))
    wanted = {
        "x_map": peer.multilabel_average_precision(scores[:, :3], tags[:, :3].long(), 3),
        "x_auroc": peer.multilabel_auroc(scores[:, :3], tags[:, :3].long(), 3),
    }
    assert result.figures == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=1e-6)
    assert result.details["x"]["per_class"][3] == {"class": "d", "images": 0, "ap": None, "auroc": None}
    assert "1 of 4 classes are left out" in result.notes[0]


def test_votes_by_hand() -> None:
    torch.manual_seed(0)
    features, tags = torch.randn(80, 5), (torch.rand(80, 3) < 0.4).to(torch.int8)
    tags[:, 2] = 1  # of all images: nothing to learn
    train, test = Labelled(features[:60], tags[:60]), Labelled(features[60:], tags[60:])
    votes = multilabel.knn_votes(train, test, WHOLE)
    assert [*votes] == ["knn10", "knn20", "knn100"]
    centred = torch.nn.functional.normalize(train.features - train.features.mean(0), dim=1)
    query = torch.nn.functional.normalize(test.features - train.features.mean(0), dim=1)
    weights, index = ((query @ centred.T - 1) / 0.07).exp().topk(10, dim=1)
    wanted = (weights[..., None] * tags[:60][index].float()).sum(1) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(votes["knn10"], wanted)
    scores = multilabel.linear_votes(train, test, WHOLE, 0)
    assert not scores[:, 2].any()
    scaled, others = linear.standardise(train.features, test.features)
    c = linear.choose_c(Labelled(train.features, tags[:60, 0].long()), 2)
    theirs = LogisticRegression(C=c).fit(scaled.numpy(), tags[:60, 0].numpy()).decision_function(others.numpy())
    np.testing.assert_allclose(scores[:, 0], theirs, atol=2e-3)


def test_c_is_chosen_by_whole_groups(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Parts] = []
    original = linear.choose_c

    def spied(train: Labelled, num_classes: int, parts: Parts = WHOLE, **options: Any) -> float:
        chosen.append(parts)
        return original(train, num_classes, parts, **options)

    monkeypatch.setattr(linear, "choose_c", spied)
    source = DataOptions(source=str(made), num_workers=0, group=r"(\d)\d*\.png")
    compute = ComputeOptions(batch_size=16, precision="fp32", threads=1, device="cpu", progress="none")
    suite.evaluate(tiny.write_run(tmp_path / "run"), EvaluateOptions(data=source, method="linear"), compute)
    assert chosen
    for parts in chosen:
        assert parts.groups is not None
        assert (len(parts.groups), len(parts.groups.unique())) == (40, 10)


def test_what_can_be_measured_and_what_not(made: Path, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    evaluation = evaluated(run, made)
    assert [*evaluation.results] == ["knn", "linear"]
    assert any("attentive is left out: the images have several classes each" in note for note in evaluation.notes)
    assert any("1 images without a label are left out" in note for note in evaluation.notes)
    figures = evaluation.figures()
    assert figures["pixels"]["knn10_auroc"] > 0.95 and figures["pixels"]["linear_mean_map"] > 0.95
    assert figures["model"].keys() >= {"knn20_map", "knn20_auroc", "linear_cls_auroc"}
    with pytest.raises(ConfigError, match="'attentive' needs one class an image; use --method knn or linear"):
        evaluated(run, made, method="attentive")
    with pytest.raises(ConfigError, match="labels_per_class is 2 and the images have several classes each; leave"):
        evaluated(run, made, method="knn", labels_per_class=2)
    with pytest.raises(DataError, match="the test images have not the same ones; give labels of one list or table"):
        evaluated(run, made, method="knn", test_data="digits")
