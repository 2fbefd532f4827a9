"""Builds the documents as a site: `python docs/site/build.py [FOLDER]`, by default into site/.

English pages lie at the root, Chinese ones under zh/. A page without a `.zh-CN.md` appears there in English. Pages
made here: recipes and commands, from the package itself; the notebooks. Any warning is an error, such as a link that
leads nowhere. Nothing is fetched, and the pages ask no other host for anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Template

import nbformat
from latex2mathml.converter import convert as mathml

from torchmae import cli, settings

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
ROOT = DOCS.parent

PAGES = {
    "index.md": ("Quick start", "快速开始"),
    "your-data.md": ("Your own data in ten minutes", "十分钟用上自己的数据"),
    "tutorial.md": ("Tutorial", "教程"),
    "faq.md": ("Questions and answers", "常见问题"),
    "notebooks/build-a-masked-autoencoder.md": ("Notebook: build one", "笔记本：搭建一个"),
    "notebooks/use-your-backbone.md": ("Notebook: use your backbone", "笔记本：使用骨干网络"),
    "data.md": ("Data", "数据"),
    "recipes.md": ("Recipes", "配置方案"),
    "evaluation.md": ("What did it learn?", "它学到了什么"),
    "cases.md": ("Real cases", "真实案例"),
    "fields/satellite.md": ("Satellite", "遥感"),
    "fields/volumes.md": ("Volumes", "体数据"),
    "fields/microscopy.md": ("Microscopy", "显微图像"),
    "fields/signals.md": ("Signals", "信号"),
    "fields/sound.md": ("Sound", "声音"),
    "fields/video.md": ("Video", "视频"),
    "dense.md": ("Detection and segmentation", "检测与分割"),
    "extending.md": ("Parts of your own", "自己的部件"),
    "weights.md": ("Weights in and out", "权重的导入与导出"),
    "app.md": ("In the browser", "在浏览器里"),
    "scaling.md": ("Several GPUs, several machines", "多 GPU、多机"),
    "tracking.md": ("Trackers", "实验跟踪"),
    "performance.md": ("Where the time goes", "时间花在哪里"),
    "results.md": ("Results", "测量结果"),
    "commands.md": ("Commands", "命令"),
    "api.md": ("Python API", "Python 接口"),
    "CONTRIBUTING.md": ("Contributing", "参与开发"),
    "SECURITY.md": ("Security", "安全"),
    "CHANGELOG.md": ("Changes", "变更"),
}
"""Pages in the order of the menu, with their English and Chinese titles."""

FETCHED = re.compile(r"<(?:script|img|iframe|link rel=.?(?:stylesheet|preconnect))[^>]*https?://[^>]*>")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(#[^)\s]*)?(?=\))")


def main(out: Path) -> None:
    """Writes the site to `out`, which is replaced."""
    pages = (page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    unlisted = {page.replace(".zh-CN.md", ".md") for page in pages} - set(PAGES)
    if unlisted:
        sys.exit(f"not in the menu: {', '.join(sorted(unlisted))}; add them to PAGES in {Path(__file__).name}")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        generated = {"recipes.md": recipes_page(), "commands.md": commands_page(), **notebook_pages()}
        for chinese in (False, True):
            root = stage / ("zh" if chinese else "en")
            stage_pages(root / "docs", generated, chinese)
            shutil.copytree(HERE / "overrides", root / "overrides")
            (root / "zensical.toml").write_text(configuration(root / "docs", chinese), encoding="utf-8")
            build(root)
        shutil.move(stage / "zh" / "site", stage / "en" / "site" / "zh")
        for page in (stage / "en" / "site").rglob("*.html"):
            if fetched := FETCHED.search(page.read_text(encoding="utf-8")):
                sys.exit(f"{page.name} would ask another host: {fetched[0]}")
        if out.exists():
            shutil.rmtree(out)
        shutil.move(stage / "en" / "site", out)


def stage_pages(folder: Path, generated: dict[str, str], chinese: bool) -> None:
    """Puts the pages of one language into a folder, each under its English name."""
    shutil.copytree(DOCS / "images", folder / "images")
    shutil.copy(HERE / "style.css", folder)
    for name in PAGES:
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        if name in generated:
            page.write_text(generated[name], encoding="utf-8")
            continue
        translated = DOCS / name.replace(".md", ".zh-CN.md")
        home = ROOT if (ROOT / name).is_file() else DOCS
        original = translated if chinese and translated.is_file() else home / name
        if original.is_file():
            text = for_the_site(original.read_text(encoding="utf-8"), nested="/" in name)
            page.write_text(text, encoding="utf-8")


def for_the_site(text: str, *, nested: bool) -> str:
    """A page with links as they are within the site, and formulas as MathML, which needs no script.

    The line that links to its other language goes: the menu does that. `nested`: the page lies in a folder of docs/.
    """
    text = re.sub(r"^(?:\*\*(?:Language:|语言：)\*\* .*|\[(?:中文|English)\]\(\S+\))\n\n", "", text, flags=re.MULTILINE)

    def target(match: re.Match[str]) -> str:
        path = match[1] if nested else match[1].removeprefix("../")
        path = path.removeprefix("docs/").replace(".zh-CN.md", ".md").replace(".ipynb", ".md")
        return path.replace("README.md", "index.md") + (match[2] or "")

    parts = CODE.split(text)
    parts[::2] = [formulas(LINK.sub(target, part)) for part in parts[::2]]
    return "".join(parts)


def formulas(text: str) -> str:
    """Text without code, its TeX replaced by MathML."""
    # What latex2mathml does not know, in its own words.
    for ours, known in (("{aligned}", "{align*}"), (r"\bigl\lVert", "‖"), (r"\bigr\rVert", "‖")):
        text = text.replace(ours, known)
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: f"<div>{mathml(m[1], display='block')}</div>", text, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+)\$", lambda m: mathml(m[1]), text)


def configuration(docs: Path, chinese: bool) -> str:
    """Zensical's settings for one language."""
    titles = {name: title(name, chinese) for name in PAGES if (docs / name).is_file()}
    project = {
        "site_name": "torchmae",
        "site_description": "掩码自编码器预训练" if chinese else "Masked autoencoder pre-training",
        "use_directory_urls": False,
        "extra_css": ["style.css"],
    }
    nav = [f"  {{ {toml(shown)} = {toml(name)} }}," for name, shown in titles.items()]
    values = [f"{key} = {toml(value)}" for key, value in project.items()]
    name, link, lang = ("English", "../", "en") if chinese else ("中文", "zh/", "zh")
    values.append(f"extra.alternate = [{{ name = {toml(name)}, link = {toml(link)}, lang = {toml(lang)} }}]")
    head = "\n".join(["[project]", "nav = [", *nav, "]", *values])
    shared = Template((HERE / "zensical.toml").read_text(encoding="utf-8"))
    return f"{head}\n\n{shared.substitute(language='zh' if chinese else 'en', source=ROOT / 'src')}"


def title(name: str, chinese: bool) -> str:
    """How the menu calls a page; a Chinese menu says which pages are in English."""
    translated = (DOCS / name.replace(".md", ".zh-CN.md")).is_file()
    return PAGES[name][chinese] + ("（英文）" if chinese and not translated else "")


def toml(value: str | bool | list[str]) -> str:
    """A value as TOML, of which this much is JSON."""
    return json.dumps(value, ensure_ascii=False)


def recipes_page() -> str:
    """Every recipe: its first line in a table, then the file, whose head says command and measurements."""
    names = settings.recipe_names()
    rows = [f"| [`{name}`](#{name}) | {settings.recipe_summary(name)} |" for name in names]
    files = [f"## {name}\n\n```yaml\n{settings.recipe_path(name).read_text(encoding='utf-8')}```\n" for name in names]
    head = (
        "# Recipes\n\nA recipe is a named set of settings: `torchmae pretrain --recipe NAME`. Without one, `torchmae "
        "pretrain` chooses by kind and size of the data and by the device. Options given beside it override it.\n\n"
    )
    return head + "\n".join(["| recipe | for |", "|---|---|", *rows, "", *files])


def commands_page() -> str:
    """What every command says to `--help`."""
    sections = ["# Commands", "```text\n" + help_of() + "```"]
    for name in cli.COMMANDS:
        sections.append(f"## torchmae {name}\n\n```text\n{help_of(*name.split())}```")
    return "\n\n".join(sections) + "\n"


def help_of(*words: str) -> str:
    """What `torchmae WORDS --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main([*words, "--help"])
    return printed.getvalue().rstrip() + "\n"


def notebook_pages() -> dict[str, str]:
    """The notebooks as pages, without outputs: their Markdown as it stands, their code in blocks."""
    pages = {}
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        parts = [c.source if c.cell_type == "markdown" else f"```python\n{c.source}\n```" for c in cells]
        pages[f"notebooks/{path.stem}.md"] = "\n\n".join(parts).replace(".ipynb)", ".md)") + "\n"
    return pages


def build(root: Path) -> None:
    """Runs zensical in `root`; its messages are shown, and a warning ends the program."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(root / "zensical.toml")]
    status = subprocess.run(command, cwd=root, check=False).returncode
    if status != 0:
        sys.exit(f"the site was not built: zensical ended with status {status}")


if __name__ == "__main__":
    os.environ["COLUMNS"] = "110"  # the width of the help texts
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
