from __future__ import annotations

from typing import Any

import pytest

from torchmae.report.evaluations import Figure, evaluation_tables, figures_of, figures_of_run


def record(knn: float, **others: Any) -> dict[str, Any]:
    figures = {"knn20": knn, "knn20_top5": 80.0, "knn20_low": knn - 1, "knn20_high": knn + 1.25}
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "method": "all",
        "options": {"method": "all", "labels_per_class": None},
        "data": {"train_images": 10000, "test_images": 5000},
        "results": [
            {"method": "knn", "subject": "pixels", "figures": {"knn20": 38.1}},
            {"method": "knn", "subject": "model", "figures": figures, "details": {"confusion": [[1, 2]]}},
        ],
        **others,
    }


def test_a_table_has_the_model_first_and_intervals_beside_figures() -> None:
    (table,), left = evaluation_tables([record(42.0)])
    assert left == 0
    assert (table.title, table.columns) == ("knn", ("This model", "Raw pixels"))
    assert table.rows == (
        ("knn20", (Figure("42.0", "41.0 to 43.2"), Figure("38.1"))),
        ("knn20_top5", (Figure("80.0"), Figure())),
    )
    assert table.remark == "10,000 training images, 5,000 test images, 2026-01-02"


def test_the_same_evaluation_again_replaces_the_first() -> None:
    few = record(30.0, options={"labels_per_class": 10})
    tables, left = evaluation_tables([record(42.0), few, record(43.0)])
    assert [table.title for table in tables] == ["knn", "knn, 10 labels per class"]
    assert tables[0].rows[0][1][0].value == "43.0" and left == 0


def test_only_the_latest_are_shown() -> None:
    tables, left = evaluation_tables([record(1.0, options={"seed": seed}) for seed in range(9)])
    assert (len(tables), left) == (6, 3)


def test_a_record_may_be_its_own_result() -> None:
    (table,), _ = evaluation_tables([{"method": "finetune", "figures": {"top1": 89.77, "epochs": True, "name": "x"}}])
    assert (table.title, table.columns, table.remark) == ("finetune", ("This model",), "")
    assert table.rows == (("top1", (Figure("89.8"),)),)


@pytest.mark.parametrize(
    "other", [{}, {"method": "knn"}, {"figures": [1]}, {"results": [1, {"figures": {}}]}, {"figures": {"a": None}}]
)
def test_what_holds_no_figures_is_passed_over(other: dict[str, Any]) -> None:
    assert figures_of(other) == {}
    assert evaluation_tables([other]) == ([], 0)
    assert figures_of_run([other]) == {}


def test_figures_of_a_run_are_its_own_models_and_the_latest() -> None:
    few = record(30.0, options={"labels_per_class": 10})
    figures = figures_of_run([record(42.0), few, record(43.0)])
    assert figures["knn20"] == Figure("43.0", "42.0 to 44.2")
    assert figures["knn20, 10 labels per class"].value == "30.0"
    assert len(figures) == 4
