"""Links of the pages lead somewhere, and their commands have options that exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from pages import DOCS, FENCE, PAGES, ROOT, blocks

from torchmae import cli, settings

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
SPAN = re.compile(r"`(torchmae [^`]+)`")
OPTION = re.compile(r"`(--[^`]+)`")
SUBCOMMANDS = {"bench": ("step", "data", "train"), "data": ("inspect", "pack")}


def anchors(page: Path) -> set[str]:
    """Of each heading, what a hosting site's Markdown makes of it."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[`*]|\[(.+?)\]\(.*?\)", r"\1", title) for title in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} points to {target}, which does not exist"
        assert file.is_relative_to(ROOT), f"{page.name} points out of the repository: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} points to {target}#{anchor}: no such heading"


def commands(page: Path) -> list[str]:
    """What a page tells to type: lines of its shell blocks, and `torchmae ...` within its text."""
    text = page.read_text(encoding="utf-8")
    shell = "".join(code for language, code in blocks(page) if language == "sh").replace("\\\n", " ")
    lines = [line[line.index("torchmae ") :] for line in shell.splitlines() if re.match(r".*\btorchmae [a-z]", line)]
    return [*lines, *(" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text)))]


@cache
def help_of(*words: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return printed.getvalue()


def options_of(*words: str) -> set[str]:
    """The options of a command, with underscores for dashes. RUN may be given as --init-from everywhere."""
    found = re.findall(r"(?<![\w-])--?[a-z][\w.-]*", help_of(*words))
    return {word.replace("-", "_") for word in [*found, "--init-from"]}


def spellings(option: str) -> set[str]:
    """As given, and with the full name for an alias."""
    given = (option.partition("=")[0], settings.normalise([option])[0].partition("=")[0])
    return {word.replace("-", "_") for word in given}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line.replace("`", ""), comments=True)[1:]
        if words[0].startswith("-") or words[0].isupper():  # torchmae --version; torchmae COMMAND
            continue
        assert words[0] in cli.COMMANDS, line
        path = words[: 2 if words[1:2] and words[1] in SUBCOMMANDS.get(words[0], ()) else 1]
        known = options_of(*path)
        for option in (word for word in words if word.startswith("--") and word not in ("--help", "--version")):
            assert spellings(option) & known, f"{line}: no option {option}"
        if "--recipe" in words and (name := words[words.index("--recipe") + 1]) != "NAME":
            assert name in settings.recipe_names(), line


def test_options_named_in_answers_exist() -> None:
    paths = [[name, *part] for name in cli.COMMANDS for part in [[], *([sub] for sub in SUBCOMMANDS.get(name, ()))]]
    known = set().union(*(options_of(*path) for path in paths))
    for page in (DOCS / "faq.md", DOCS / "faq.zh-CN.md"):
        named = OPTION.findall(page.read_text(encoding="utf-8"))
        assert len(named) > 20
        for option in named:
            assert spellings(option.split()[0]) & known, f"{page.name}: no option {option}"


def test_commands_are_found() -> None:
    assert len(commands(DOCS / "faq.md")) > 15
    assert len(commands(DOCS / "your-data.md")) >= 8
