"""The documents as the tests of this folder read them."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of a page's fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


# As they stand, programs of the pages train for minutes. The suite trains less; `.ci/run` runs them as they stand, too.
AS_THEY_STAND = os.environ.get("TORCHMAE_TEST_PAGES") == "1"
LESS = (
    ("--recipe digits", "--recipe digits --epochs 2"),
    ('recipe="digits", out=str(RUN), epochs=15', 'recipe="digits", out=str(RUN), epochs=2'),
    ("EPOCHS = 60", "EPOCHS = 2"),
    ("epochs, batch_size = 20, 100", "epochs, batch_size = 2, 100"),
)


def trained_less(code: str) -> str:
    """A program with fewer epochs, or as it stands."""
    for long, short in () if AS_THEY_STAND else LESS:
        code = code.replace(long, short)
    return code
