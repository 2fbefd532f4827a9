"""What a case is, and how it is measured: runs of several seeds, each beside its untrained twin and raw values.

A case's program says how its data is divided, how a run is pre-trained, and what is measured. `main` does it, keeps
every figure in benchmarks/results/cases/NAME.json, and writes the picture and the table of the pages that have a place
for them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image

import torchmae

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cases"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
HEADERS = {"en": ("pre-trained", "untrained", "raw values"), "zh": ("预训练", "未训练", "原始数值")}
SUBJECTS = {"model": "", "random": "random.", "pixels": "pixels."}  # and the prefix of their figures


@dataclass(frozen=True)
class Case:
    """One kind of data, from files to figures.

    Attributes:
        name: of the results, and of the table in the pages.
        prepare: makes what `pretrain` and `measured` name from the data set's folder, in an empty folder, which it is
            given second and which is the working folder later.
        pretrain: options of `torchmae.pretrain`; the seed, the output and the time are added.
        measured: by name, options of `torchmae.evaluate` and the figures of it that are shown, by title; a figure whose
            name ends in "_random" is that of the untrained twin.
        chinese: parts of titles, and what stands for them in the Chinese pages.
        picture: file in the first run's folder, whose upper half the pages show; null: none.
    """

    name: str
    prepare: Callable[[Path, Path], None]
    pretrain: Mapping[str, Any]
    measured: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]] = field(default_factory=dict)
    chinese: Mapping[str, str] = field(default_factory=dict)
    picture: str | None = None


def main(case: Case, doc: str | None) -> None:
    """The command of a case: `python benchmarks/cases/NAME.py DATA`. What is there already is not measured again."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data set")
    parser.add_argument("--work", type=Path, default=Path("cases") / case.name, help="folder for runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5, help="of pre-training, for each seed")
    args = parser.parse_args()
    data = args.data.resolve()
    if not args.work.exists():
        making = args.work.with_name(f"{args.work.name}.making")
        making.mkdir(parents=True)
        case.prepare(data, making)
        making.rename(args.work)
    os.chdir(args.work)
    figures: list[dict[str, float]] = []
    for seed in range(args.seeds):
        run = Path(f"run-{seed}")
        if not (run / "summary.json").exists():
            if run.exists():
                torchmae.pretrain(resume=run)
            else:
                torchmae.pretrain(**case.pretrain, max_minutes=args.minutes, seed=seed, out=str(run))
        figures.append(measure(case, run, seed))
        print(json.dumps(figures[-1]), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {"case": case.name, "minutes": args.minutes, "environment": environment(), "seeds": figures}
    (RESULTS / f"{case.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if case.picture is not None:
        with Image.open(Path("run-0") / case.picture) as picture:
            upper = picture.crop((0, 0, picture.width, round(0.51 * picture.height)))  # of six rows, three
            upper.save(ROOT / "docs" / "images" / f"case-{case.name}.png", optimize=True)
    for page in PAGES:
        text, language = page.read_text(encoding="utf-8"), "zh" if page.name.endswith(".zh-CN.md") else "en"
        if f"<!-- {case.name} -->" in text:
            page.write_text(render(text, case, found, language), encoding="utf-8")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str | Path, ...]]) -> None:
    """Writes a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def measure(case: Case, run: Path, seed: int) -> dict[str, float]:
    """Every figure of a run, of its untrained twin and of raw values, as "TITLE.SUBJECT"; kept in RUN/case.json."""
    kept = run / "case.json"
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, (options, shown) in case.measured.items():
        if f"seconds.{name}" in found:
            continue
        since = time.perf_counter()
        out = {"out": str(options["out"]).format(seed=seed)} if "out" in options else {}
        given = torchmae.evaluate(str(run), **{**options, **out}, seed=seed)
        for title, figure in shown.items():
            if figure.endswith("_random"):
                found[f"{title}.random"] = given[figure]
                continue
            for subject, prefix in SUBJECTS.items():
                if prefix + figure in given:
                    found[f"{title}.{subject}"] = given[prefix + figure]
        found[f"seconds.{name}"] = time.perf_counter() - since
        kept.write_text(json.dumps(found))
    found["minutes"] = json.loads((run / "summary.json").read_text())["seconds"] / 60
    return found


def environment() -> dict[str, str | int]:
    """What figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": processor, "cores": cores, "torch": torch.__version__, "torchmae": torchmae.__version__}


def render(text: str, case: Case, found: Mapping[str, Any], language: str) -> str:
    """A page with the table of the case between its two marks."""
    rows = [f"| | {' | '.join(HEADERS[language])} |", "|---|---|---|---|"]
    for title in dict.fromkeys(title for _, shown in case.measured.values() for title in shown):
        cells = [cell([seed.get(f"{title}.{subject}") for seed in found["seeds"]]) for subject in SUBJECTS]
        for part, translated in case.chinese.items() if language == "zh" else ():
            title = title.replace(part, translated)
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return between(text, case.name, "\n".join(rows))


def between(text: str, name: str, table: str) -> str:
    """A page with the table between the two marks of this name, if it has them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


def cell(values: list[float | None]) -> str:
    """Mean and deviation over the seeds of figures; of areas under curves, in percent."""
    known = [value if value > 1 else 100 * value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.1f}" if len({*known}) == 1 else f"{mean(known):.1f} ± {stdev(known):.1f}"
