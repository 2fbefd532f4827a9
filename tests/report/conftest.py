from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_run(folder)
    return folder
