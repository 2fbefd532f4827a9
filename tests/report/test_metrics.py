from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_run import summary, train_records, val_records, write_metrics, write_run
from parsed_page import Page

from torchmae.commands.evaluate import figure_table
from torchmae.report.comparison import write_comparison
from torchmae.report.html import write_report
from torchmae.report.metrics import METRICS, Figure, Metric, Unit, figures_as_text, measure_of
from torchmae.report.table import final_table


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("knn20", ("Accuracy, %", "kNN, k = 20")),
        ("linear_mean", ("Accuracy, %", "linear probe, patch mean")),
        ("linear_c0.1", ("Accuracy, %", "linear probe, patch mean, C = 0.1")),
        ("linear_paper_cls", ("Accuracy, %", "linear probe, as in the paper, class token")),
        ("linear_c0.1_macro", ("Accuracy, %", "linear probe, patch mean, C = 0.1, mean of the classes")),
        ("majority", ("Accuracy, %", "always the commonest class")),
        ("attentive", ("Accuracy, %", "attentive probe")),
        ("finetune", ("Accuracy, %", "fine-tuned")),
        ("finetune_random", ("Accuracy, %", "trained from random weights")),
        ("finetune_seconds", ("Training", "seconds")),
        ("finetune_random_loss", ("Training", "loss")),
        ("anomaly_patch_knn_max", ("AUROC", "kNN distance, oddest patch")),
        ("anomaly_patch_knn_pixel", ("AUROC", "kNN distance of patches, pixels")),
        ("anomaly_patch_knn_aupro", ("AUPRO (false positive rates up to 0.3)", "AUPRO, kNN distance of patches")),
        ("random_0.75_psnr", ("PSNR, dB", "random, 75% masked")),
        ("block_0.5_ssim_interpolation", ("SSIM", "block, 50% masked", "interpolation")),
        ("grid_0.9_explained_variance", ("Explained variance", "grid, 90% masked")),
        ("knn_untrained", ("Accuracy, %", "kNN accuracy", "the untrained network")),
        ("new", ("Figure", "new")),
        ("anomaly_new", ("Figure", "anomaly_new")),
    ],
)
def test_names_in_words(name: str, measure: tuple[str, ...]) -> None:
    unit, label, beside = measure_of(name)
    assert (unit.name, label, *filter(None, [beside])) == measure


def test_every_figure_of_a_detector_has_words() -> None:
    from torchmae.evaluation.anomaly import SCORES

    assert {measure_of(f"anomaly_{name}").unit.name for name in SCORES} == {"AUROC"}


def test_what_belongs_to_a_figure_goes_with_it() -> None:
    accuracy = {"knn20": 42.04, "knn20_top5": 80.0, "knn20_low": 41.0, "knn20_high": 43.26}
    assert figures_as_text(accuracy) == {"knn20": Figure("42.0", "41.0 to 43.3", "80.0")}
    assert figures_as_text({"linear_cls": 30.0, "linear_cls_std": 1.25}) == {"linear_cls": Figure("30.0", "± 1.2")}
    assert figures_as_text({"alone_low": 5.0}) == {"alone_low": Figure("5")}


def test_each_unit_has_its_digits() -> None:
    figures = {"anomaly_knn": 0.98765, "random_0.5_psnr": 21.456, "finetune_seconds": 1234.5, "new": 0.00123}
    texts = {name: figure.value for name, figure in figures_as_text(figures).items()}
    assert texts == {
        "anomaly_knn": "0.988", "random_0.5_psnr": "21.46", "finetune_seconds": "1,234.5", "new": "0.00123"
    }  # fmt: skip


@pytest.fixture
def iou(monkeypatch: pytest.MonkeyPatch) -> Unit:
    """A figure from outside, as a row of METRICS."""
    unit = Unit("IoU, %", "{:.2f}".format, "{:.2f}%".format)
    monkeypatch.setitem(METRICS, r"iou_(?P<name>\w+)", Metric("IoU of {name}", unit, max))
    monkeypatch.setitem(METRICS, "iou", Metric("Mean IoU", unit, max, ("untrained",), "features"))
    return unit


def test_a_metric_from_outside_has_its_words_and_digits(iou: Unit) -> None:
    assert measure_of("iou_road") == (iou, "IoU of road", "")
    assert figures_as_text({"iou_road": 12.3456, "iou_road_std": 1.0}) == {"iou_road": Figure("12.35", "± 1.00")}


def test_a_metric_from_outside_is_in_every_table(tmp_path: Path, iou: Unit) -> None:
    for name, value in (("a", 41.5), ("b", 52.25)):
        write_run(tmp_path / name)
        val = [{**record, "iou": value} for record in val_records()]
        write_metrics(tmp_path / name, [*train_records(), *val, {"kind": "baseline", "step": 0, "iou_untrained": 12.0}])
        line = {"method": "segmentation", "results": [{"figures": {"iou": value, "iou_road": value + 1}}]}
        (tmp_path / name / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    table = final_table({**summary(), "iou": 41.5, "iou_untrained": 12.0})
    assert "Mean IoU 41.50 12.00" in [" ".join(line.split()) for line in table.splitlines()]
    rows = figure_table({"model": {"iou": 41.5, "iou_road": 42.5}}).columns
    assert [list(column.cells) for column in rows] == [["Mean IoU", "IoU of road"], ["41.50", "42.50"]]

    page = Page(write_report(tmp_path / "a").read_text(encoding="utf-8"))
    words = page.words()
    assert "Features of kNN Linear probe Mean IoU" in words and "Mean IoU 41.50 IoU of road 42.50" in words
    assert "Mean IoU over steps: this model from 41.50% to 41.50%; the untrained network 12.00%." in page.html

    words = Page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "ab.html").read_text("utf-8")).words()
    assert "Mean IoU 41.50% 52.25% of the untrained network 12.00% 12.00%" in words
    assert "By torchmae evaluate: IoU, %" in words and "IoU of road 42.50 53.25" in words
