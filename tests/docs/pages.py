"""The documents as the tests of this folder read them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of a page's fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


programs_of_minutes = pytest.mark.skipif(
    os.environ.get("TORCHMAE_TEST_PAGES") != "1",
    reason="programs of pages train for minutes: TORCHMAE_TEST_PAGES=1 runs them as they stand, and .ci/run does",
)
