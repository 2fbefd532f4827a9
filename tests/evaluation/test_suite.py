from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from torchmae.config.data import DataOptions
from torchmae.config.evaluate import (
    AttentiveOptions,
    ComputeOptions,
    EvaluateOptions,
    ReconstructionOptions,
)
from torchmae.config.finetune import FinetuneConfig
from torchmae.errors import CheckpointError, ConfigError
from torchmae.evaluation import bench, suite
from torchmae.evaluation.bench import Bench, Method
from torchmae.evaluation.scores import Result
from torchmae.evaluation.subject import PIXELS, RANDOM, Subject
from torchmae.report.evaluations import figures_of_run
from torchmae.report.run import load_run
from torchmae.training.ranks import Ranks

COMPUTE = ComputeOptions(device="cpu", precision="fp32", threads=1, progress="none")
FEW = {"train_images": 150, "test_images": 80}


def evaluate(run: str | Path, **options: Any) -> suite.Evaluation:
    return suite.evaluate(run, EvaluateOptions(**{**FEW, **options}), COMPUTE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_run(tmp_path_factory.mktemp("runs") / "a")


def test_all_stands_beside_an_untrained_network_and_pixels_and_twice_is_the_same(run: Path) -> None:
    evaluation, again = (evaluate(run, attentive=AttentiveOptions(epochs=2)) for _ in range(2))
    assert evaluation.figures() == again.figures()
    assert {**evaluation.record, "environment": {}} == {**again.record, "environment": {}}  # which has the time
    figures = evaluation.figures()
    assert list(figures) == ["model", "random", "pixels"]
    tables = {name: {key for key in values if "_top5" not in key} for name, values in figures.items()}
    accuracies = {"knn10", "knn20", "knn100", "linear_mean", "linear_c0.1"}
    ends = ("", "_low", "_high", "_macro")
    bounded = {"majority"} | {name + end for name in accuracies for end in ends}
    assert tables["pixels"] == bounded
    more = {name + end for name in ("linear_cls", "linear_both", "attentive") for end in ends}
    assert tables["model"] == tables["random"] == bounded | more
    # The run's model is untrained too, with the same seed and the same normalisation.
    assert figures["model"] == figures["random"]
    assert evaluation.record["weights"]["model"] == evaluation.record["weights"]["random"]
    assert evaluation.record["weights"]["pixels"] == ""
    assert figures["pixels"]["knn20"] > 80


def test_some_methods_of_all_stand_beside_the_same(run: Path) -> None:
    figures = evaluate(run, method="knn, linear", labels_per_class=3, draws=1).figures()
    assert list(figures) == ["model", "random", "pixels"]
    assert {name.partition("_")[0] for name in figures["random"]} >= {"knn20", "linear"}
    assert not any(name.startswith("attentive") for name in figures["model"])
    for methods, problem in (("knn,finetune", "finetune stands alone"), ("knn,knm", "did you mean 'knn'")):
        with pytest.raises(ConfigError, match=problem):
            evaluate(run, method=methods)
    with pytest.raises(ConfigError, match="labels_per_class does not apply to method 'knn,attentive'"):
        evaluate(run, method="knn,attentive", labels_per_class=3)


def test_random_alone_is_the_baseline_of_the_same_preset() -> None:
    data = DataOptions(source="digits")
    alone = evaluate("random", method="knn", preset="vit_digits", data=data, seed=3)
    again = evaluate("random", method="knn", preset="vit_digits", data=data, seed=3)
    other = evaluate("random", method="knn", preset="vit_digits", data=data, seed=4)
    assert list(alone.figures()) == ["random"]
    assert alone.figures() == again.figures() != other.figures()
    assert alone.data.normalisation.mean == pytest.approx((0.3,), abs=0.02)  # measured, where no run says


def test_pixels_alone() -> None:
    evaluation = evaluate("pixels", method="linear", preset="vit_digits", data=DataOptions(source="digits"))
    assert set(evaluation.figures()["pixels"]) >= {"linear_mean", "linear_c0.1"}
    assert "linear_cls" not in evaluation.figures()["pixels"]


def test_names_need_a_preset_and_data() -> None:
    with pytest.raises(ConfigError, match="'random' needs a preset; add --preset vit_tiny_32_p4"):
        evaluate("random", data=DataOptions(source="digits"))
    with pytest.raises(ConfigError, match="data is not given and pixels does not say which; add --data"):
        evaluate("pixels", preset="vit_digits")


def test_an_exported_model_needs_data(tmp_path: Path) -> None:
    exported = tiny.write_run(tmp_path / "exported", source=None)
    with pytest.raises(ConfigError, match="data is not given and .*exported does not say which"):
        evaluate(exported)
    evaluation = evaluate(exported, method="knn", data=DataOptions(source="digits"))
    assert set(evaluation.figures()) == {"model"}
    with pytest.raises(CheckpointError, match="holds no model"):
        evaluate(tmp_path)


def test_images_are_encoded_once_a_subject_and_attentive_is_left_out_where_its_tokens_do_not_fit(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    encode = Subject.encode

    def counted(self: Subject, images: torch.Tensor, *how: Any) -> torch.Tensor:
        asked.extend([(self.name, how[0])] * len(images))
        return encode(self, images, *how)

    monkeypatch.setattr(Subject, "encode", counted)
    options = {"attentive": AttentiveOptions(epochs=1, memory_limit=1e-9)}
    evaluation = evaluate(run, **options)
    assert {item: asked.count(item) for item in set(asked)} == {
        ("model", "both"): 230,
        ("random", "both"): 230,
        ("pixels", "mean"): 230,
    }
    assert "attentive" not in evaluation.results
    assert any(note.startswith("attentive is left out: its tokens take 0.0 GiB") for note in evaluation.notes)
    assert "attentive" in evaluate(run, method="attentive", **options).figures()["model"]


def test_pools(run: Path, tmp_path: Path) -> None:
    by_pool = {pool: evaluate(run, method="knn", pool=pool).figures()["model"] for pool in ("mean", "cls", "both")}
    assert by_pool["mean"] == evaluate(run, method="knn").figures()["model"]
    assert len({values["knn20"] for values in by_pool.values()}) > 1
    assert set(evaluate(run, method="linear", pool="cls").results["linear"]["model"].details) == {"linear_cls"}
    without = tiny.write_run(tmp_path / "without", class_token=False)
    with pytest.raises(ConfigError, match="pool is 'cls' but the model has no class token; use --pool mean"):
        evaluate(without, method="knn", pool="cls")


def test_few_shot(run: Path) -> None:
    evaluation = evaluate(run, labels_per_class=3, draws=2, train_images=None)
    assert list(evaluation.results) == ["knn", "linear"]
    figures = evaluation.figures()["pixels"]
    assert figures["knn20_std"] > 0
    assert 40 < figures["knn20"] < 95
    with pytest.raises(ConfigError, match="labels_per_class is 5000 and class '.' has 1.. labelled"):
        evaluate(run, labels_per_class=5000, train_images=None)


def test_the_paper_protocol(run: Path) -> None:
    figures = evaluate(run, method="linear", protocol="paper", pool="mean").figures()["model"]
    assert set(figures) == {"majority"} | {
        f"linear_paper_mean{end}" for end in ("", "_top5", "_low", "_high", "_macro")
    }


def test_what_is_recorded(run: Path) -> None:
    figures = suite.run(run, EvaluateOptions(method="knn", **FEW), COMPUTE)
    record = load_run(run).evaluations[-1]
    assert record["results"][0]["figures"] == figures
    assert record["method"] == "knn"
    assert record["options"]["data"]["source"] == "digits"
    assert record["data"]["train_images"] == 150
    assert record["data"]["test_images"] == 80
    assert record["environment"]["precision"] == "fp32"
    per_class = record["results"][0]["details"]["knn20"]["per_class"]
    assert sum(item["images"] for item in per_class) == 80
    right = sum(item["images"] * item["top1"] / 100 for item in per_class)
    assert 100 * right / 80 == pytest.approx(figures["knn20"])
    confusion = torch.tensor(record["results"][0]["details"]["knn20"]["confusion"])
    assert confusion.diagonal().sum() == pytest.approx(right)


def test_figures_of_several_subjects_in_one_record(run: Path) -> None:
    figures = suite.run(run, EvaluateOptions(labels_per_class=1, draws=1, **FEW), COMPUTE)
    assert {"knn20", "random.knn20", "pixels.knn20", "linear_cls"} <= set(figures)


def test_an_unreadable_test_image_counts_in_no_method(run: Path, tmp_path: Path) -> None:
    """Its neighbour, which is read in its place, is not scored twice."""
    pytest.importorskip("skimage.metrics", reason="pip install 'torchmae[eval]'")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for name in ("good", "bad"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100 if name == "good" else 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "test" / "good" / "2.png").write_bytes(b"nothing")
    data = {"data": DataOptions(source=str(tmp_path), num_workers=0, max_bad=0.5)}
    few = {"attentive": AttentiveOptions(epochs=1), "train_images": None, "test_images": None}
    tested = [
        *evaluate(run, **data, **few).results.values(),
        *evaluate(run, method="finetune", finetune=FinetuneConfig(epochs=1), **data, **few).results.values(),
    ]
    tables = [table["per_class"] for result in tested for table in result["model"].details.values()]
    assert [[row["images"] for row in table] for table in tables] == [[5, 4]] * 9
    options = ReconstructionOptions(ratios=(0.5,), strategies=("random",))
    filled = evaluate(run, method="reconstruction", reconstruction=options, **data).results["reconstruction"]
    assert filled["model"].details["images"] == 9
    given = {"normal": str(tmp_path / "train" / "good"), "test": str(tmp_path / "test")}
    evaluate(run, method="anomaly", **given, data=DataOptions(num_workers=0, max_bad=0.5))
    assert len((run / "anomaly_scores.csv").read_text(encoding="utf-8").splitlines()) == 10


def test_mended_labels_are_other_labels(run: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 1), dtype=np.uint8)
    bases = []
    for mended in (0, 0, 1):
        labels = np.arange(30) % 2
        labels[0] = mended
        np.savez(
            tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=255 - images, test_labels=labels
        )
        record = evaluate(run, method="knn", data=DataOptions(source=str(tmp_path / "a.npz"))).record
        bases.append({measured.basis for measured in figures_of_run([record]).values()})
    assert bases[0] == bases[1] != bases[2]


def test_no_rank_ends_the_process_that_calls(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def second_rank(*_: object) -> Iterator[Ranks]:
        yield Ranks(rank=1)

    monkeypatch.setattr(bench, "open_ranks", second_rank)
    with pytest.raises(ConfigError, match="labels_per_class is 5000"):
        evaluate(run, labels_per_class=5000, train_images=None)


def test_a_method_is_a_row(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
        return Result({"size": float(len(bench.data.test))}, {})

    rows = {
        "size": Method(measure, beside=(PIXELS,)),
        "tokens": Method(measure, "tokens", beside=(RANDOM, PIXELS)),
        "slow": Method(measure, beside=(RANDOM,), left_out=lambda *_: "slow is left out"),
        "alone": Method(measure),
    }
    monkeypatch.setattr(suite, "METHODS", rows)
    evaluation = evaluate(run)
    found = {name: [*by_subject] for name, by_subject in evaluation.results.items()}
    assert found == {"size": ["model", "pixels"], "tokens": ["model", "random"]}
    assert evaluation.notes == ("slow is left out",)
    assert evaluation.figures()["pixels"] == {"size": 80.0}


def test_methods_that_do_not_apply(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method is 'knnn'; did you mean 'knn'"):
        evaluate(run, method="knnn")
    named = {"preset": "vit_digits", "data": DataOptions(source="digits")}
    with pytest.raises(ConfigError, match="'pixels' has no patch tokens, which method 'attentive' needs"):
        evaluate("pixels", method="attentive", **named)
    with pytest.raises(ConfigError, match="'pixels' has no network, .* 'reconstruction' needs; evaluate a run"):
        evaluate("pixels", method="reconstruction", **named)


def test_reconstruction_needs_no_labels(run: Path) -> None:
    pytest.importorskip("skimage.metrics", reason="pip install 'torchmae[eval]'")
    options = ReconstructionOptions(ratios=(0.5,), strategies=("random",), images=20)
    evaluation = evaluate(run, method="reconstruction", reconstruction=options)
    assert evaluation.results["reconstruction"]["model"].details["images"] == 20
    assert evaluation.notes == ("PSNR and SSIM: masked patches as predicted",)
