from __future__ import annotations

from typing import Any

import pytest

from torchmae.report.evaluations import figures_of, figures_of_run, latest_evaluations
from torchmae.report.metrics import Figure, Row

ACCURACY = "Accuracy, %"


def record(knn: float, **others: Any) -> dict[str, Any]:
    figures = {"knn20": knn, "knn20_top5": 80.0, "knn20_low": knn - 1, "knn20_high": knn + 1.25}
    return {
        "method": "all",
        "options": {"method": "all", "labels_per_class": None, "out": None},
        "data": {"train_images": 10000, "test_images": 5000},
        "environment": {"command": "torchmae evaluate a", "started": "2026-01-02T03:04:05+00:00"},
        "results": [
            {"method": "knn", "subject": "pixels", "figures": {"knn20": 38.1}},
            {"method": "knn", "subject": "model", "figures": figures, "details": {"confusion": [[1, 2]]}},
        ],
        "notes": ["3 of 5,000 held-out images have a near twin"],
        **others,
    }


def test_a_table_has_the_model_first_and_intervals_beside_figures() -> None:
    (evaluation,), left = latest_evaluations([record(42.0)])
    assert left == 0
    assert (evaluation.title, evaluation.command) == ("knn", "torchmae evaluate a")
    assert evaluation.notes == ("3 of 5,000 held-out images have a near twin",)
    assert evaluation.remark == "10,000 training images, 5,000 test images, 2026-01-02"
    (table,) = evaluation.tables
    assert (table.head, table.columns) == (ACCURACY, ("This model", "Raw pixels"))
    assert table.rows == (Row("kNN, k = 20", (Figure("42.0", "41.0 to 43.2", "80.0"), Figure("38.1"))),)


def test_units_do_not_share_a_table() -> None:
    figures = {"finetune": 70.0, "finetune_low": 69.0, "finetune_high": 71.0, "finetune_loss": 1.5,
               "finetune_images": 1000.0, "finetune_seconds": 125.0}  # fmt: skip
    (evaluation,), _ = latest_evaluations([record(0.0, results=[{"method": "finetune", "figures": figures}])])
    (table,) = evaluation.tables
    assert table.rows == (Row("fine-tuned", (Figure("70.0", "69.0 to 71.0"),)),)
    assert "5,000 test images, 1,000 labels, 2 min 5 s of training, training loss 1.500, 2026" in evaluation.remark
    figures = {"random_0.5_psnr": 20.0, "random_0.5_psnr_interpolation": 18.0, "random_0.5_ssim": 0.5}
    (evaluation,), _ = latest_evaluations([{"method": "reconstruction", "figures": figures}])
    assert [(table.head, table.columns) for table in evaluation.tables] == [
        ("PSNR, dB", ("This model", "Interpolation")),
        ("SSIM", ("This model",)),
    ]
    assert evaluation.tables[0].rows == (Row("random, 50% masked", (Figure("20.00"), Figure("18.00"))),)


def test_the_same_evaluation_again_replaces_the_first() -> None:
    few = record(30.0, options={"labels_per_class": 10})
    evaluations, left = latest_evaluations([record(42.0), few, record(43.0)])
    assert [item.title for item in evaluations] == ["knn", "knn, 10 labels per class"]
    assert evaluations[0].tables[0].rows[0][1][0].value == "43.0" and left == 0


def test_only_the_latest_are_shown() -> None:
    evaluations, left = latest_evaluations([record(1.0, options={"seed": seed}) for seed in range(9)])
    assert (len(evaluations), left) == (6, 3)


def test_a_record_may_be_its_own_result() -> None:
    line = {"method": "finetune", "figures": {"top1": 89.77, "epochs": True, "name": "x"}}
    (evaluation,), _ = latest_evaluations([line])
    assert (evaluation.title, evaluation.remark, evaluation.command) == ("finetune", "", "")
    assert evaluation.tables[0].rows == (Row("top1", (Figure("89.8"),)),)


@pytest.mark.parametrize(
    "other", [{}, {"method": "knn"}, {"figures": [1]}, {"results": [1, {"figures": {}}]}, {"figures": {"a": None}}]
)
def test_what_holds_no_figures_is_passed_over(other: dict[str, Any]) -> None:
    assert figures_of(other) == {}
    assert latest_evaluations([other]) == ([], 0)
    assert figures_of_run([other]) == {}


def test_figures_of_a_run_are_its_own_models_and_the_latest() -> None:
    few = record(30.0, options={"labels_per_class": 10})
    figures = figures_of_run([record(42.0), few, record(43.0)])
    assert figures[ACCURACY, "kNN, k = 20"].figure == Figure("43.0", "42.0 to 44.2", "80.0")
    assert figures[ACCURACY, "kNN, k = 20, 10 labels per class"].figure.value == "30.0"
    assert len(figures) == 2


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"options": {"method": "knn", "labels_per_class": None, "out": "b"}}, True),
        ({"data": {"train_images": 500, "test_images": 5000}}, False),
        ({"options": {"labels_per_class": None, "pool": "cls"}}, False),
    ],
)
def test_figures_can_be_compared_on_the_same_images_with_the_same_options(changes: dict[str, Any], same: bool) -> None:
    one, other = (figures_of_run([item]) for item in (record(42.0), record(30.0, **changes)))
    assert (one[ACCURACY, "kNN, k = 20"].basis == other[ACCURACY, "kNN, k = 20"].basis) == same
