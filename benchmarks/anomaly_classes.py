"""Can a model that saw one class, or all but one, tell the rest apart? Pre-training and detection on labelled folders.

    python benchmarks/anomaly_classes.py --data FOLDER --normal one --classes airplane automobile [--minutes 2]

FOLDER holds train/CLASS/* and test/CLASS/*. For every class named, a model is pre-trained from scratch on the normal
training images alone ("one": that class; "nine": all the others), without labels, by `torchmae pretrain`; then
`torchmae evaluate --method anomaly` scores test images, beside baselines where it has any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

LIMIT = 500  # test images of each class, normal or not: the first by name


def link(folder: Path, names: list[str], out: Path, limit: int | None = None) -> None:
    """Links the classes' images into one folder: all, or of each class the first `limit`."""
    out.mkdir(parents=True)
    for name in names:
        for path in sorted((folder / name).iterdir())[:limit]:
            (out / f"{name}-{path.name}").symlink_to(path.resolve())


def command(*words: str) -> str:
    """Runs `torchmae` and gives what it printed."""
    done = subprocess.run([sys.executable, "-m", "torchmae", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torchmae {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def measure(data: Path, normal: list[str], anomalous: list[str], recipe: str, minutes: float) -> dict[str, float]:
    """AUROC of every score, trained and untrained."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link(data / "train", normal, folder / "normal")
        link(data / "test", normal, folder / "test" / "good", LIMIT)
        link(data / "test", anomalous, folder / "test" / "other", LIMIT)
        run = str(folder / "run")
        command(
            *("pretrain", "--recipe", recipe, "--data", str(folder / "normal"), "--max-minutes", str(minutes)),
            *("--out", run, "--progress", "none"),
        )
        words = ("--normal", str(folder / "normal"), "--test", str(folder / "test"), "--json")
        printed = command("evaluate", run, "--method", "anomaly", *words).splitlines()[-1]
        by_subject = json.loads(printed)["figures"]
        return {f"{subject} {key}": value for subject, row in by_subject.items() for key, value in row.items()}


def main() -> None:
    """Prints one line per class and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--normal", choices=("one", "nine"), default="one")
    parser.add_argument("--classes", nargs="*", help="default: all")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--recipe", default="cifar10")
    args = parser.parse_args()
    every = sorted(path.name for path in (args.data / "train").iterdir() if path.is_dir())
    results = []
    for name in args.classes or every:
        others = [other for other in every if other != name]
        normal, anomalous = ([name], others) if args.normal == "one" else (others, [name])
        results.append(measure(args.data, normal, anomalous, args.recipe, args.minutes))
        print(name, json.dumps(results[-1]), flush=True)
    print("mean", json.dumps({key: round(mean(row[key] for row in results), 3) for key in results[0]}))


if __name__ == "__main__":
    main()
