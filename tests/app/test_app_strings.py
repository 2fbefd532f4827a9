from __future__ import annotations

import re
import string

import pytest

from torchmae.app.strings import LANGUAGES, TEXT, preferred


def places(text: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(text)} - {None}


def test_every_language_says_the_same_things() -> None:
    assert TEXT.keys() == LANGUAGES.keys()
    english, chinese = TEXT["en"], TEXT["zh"]
    assert {key: places(text) for key, text in english.items()} == {key: places(text) for key, text in chinese.items()}
    assert [key for key, text in chinese.items() if not re.search(r"[\u4e00-\u9fff]", text)] == []


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-GB,en;q=0.9,zh;q=0.8", "en"),
        ("de,zh;q=0.4,en;q=0.5", "en"),
        ("de-DE", "en"),
        ("", "en"),
        ("zh;q=x", "en"),
        ("ZH-tw", "zh"),
    ],
)
def test_the_language_of_a_browser(header: str, language: str) -> None:
    assert preferred(header) == language
