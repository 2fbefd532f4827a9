"""Links of the pages lead somewhere, and their commands have options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pages import DOCS, FENCE, PAGES, ROOT, blocks
from PIL import Image

from torchmae import cli, settings
from torchmae.config.base import settings_of

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
SPAN = re.compile(r"`(torchmae [^`]+)`")
OPTION = re.compile(r"`(--[^`]+)`")


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


def check_option(word: str, *commands: cli.Command) -> None:
    """ConfigError unless a setting of the commands has this name."""
    kinds = {kind for command in commands for kind in command.kinds}
    name = word.split()[0].removeprefix("--").partition("=")[0]
    if name not in ("config", "help", "version"):
        settings.full_name(name, settings_of(*kinds))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line.replace("`", ""), comments=True)[1:]
        if words[0].startswith("-") or words[0].isupper():  # torchmae --version; torchmae COMMAND
            continue
        name = " ".join(words[:2]) if " ".join(words[:2]) in cli.COMMANDS else words[0]
        if any(full.startswith(f"{name} ") for full in cli.COMMANDS):
            assert words[1:] in ([], ["step|data|train"]), line
            continue
        assert name in cli.COMMANDS, line
        for option in (word for word in words if word.startswith("--")):
            check_option(option, cli.COMMANDS[name])
        if "--recipe" in words and (name := words[words.index("--recipe") + 1]) != "NAME":
            assert name in settings.recipe_names(), line


@pytest.mark.parametrize("path", sorted((DOCS / "images").glob("*.png")), ids=lambda path: path.name)
def test_pictures_of_the_pages_can_be_read(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()
        assert min(picture.size) > 100


def test_options_named_in_answers_exist() -> None:
    for page in (DOCS / "faq.md", DOCS / "faq.zh-CN.md"):
        named = OPTION.findall(page.read_text(encoding="utf-8"))
        assert len(named) > 20
        for option in named:
            check_option(option, *cli.COMMANDS.values())


def test_commands_are_found() -> None:
    assert len(commands(DOCS / "faq.md")) > 15
    assert len(commands(DOCS / "your-data.md")) >= 8
