from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchmae.errors import CheckpointError
from torchmae.evaluation.suite import RECORDS, append_record
from torchmae.report.run import load_run


def test_each_record_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    records = [{"figures": {"knn20": 44.0 + i}, "text": "a\nb é"} for i in range(3)]
    for record in records:
        assert append_record(tmp_path, record) == tmp_path / RECORDS
    assert load_run(tmp_path).evaluations == tuple(records)
    assert len((tmp_path / RECORDS).read_text(encoding="utf-8").splitlines()) == 3


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    append_record(tmp_path, {"a": 1})
    with (tmp_path / RECORDS).open("a", encoding="utf-8") as file:
        file.write('{"b": 2, "lo')
    assert load_run(tmp_path).evaluations == ({"a": 1},)
    append_record(tmp_path, {"c": 3})
    assert load_run(tmp_path).evaluations == ({"a": 1}, {"c": 3})
    assert json.loads((tmp_path / RECORDS).read_text(encoding="utf-8").splitlines()[-1]) == {"c": 3}


def test_where_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*evaluations.jsonl: No such file or directory; the figu"):
        append_record(tmp_path / "none", {})
