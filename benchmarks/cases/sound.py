"""Spoken digits, of speakers that were never heard before (Free Spoken Digit Dataset, CC BY-SA 4.0).

    python benchmarks/cases/sound.py fsdd

Two speakers of six are for the test. Pre-training hears the others without labels.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main, read_table, write_table

TEST = ("theo", "yweweler")


def prepare(data: Path, work: Path) -> None:
    """Lists: unlabelled.csv, and digits.csv with digits, speakers and splits."""
    rows = read_table(data / "labels.csv")
    heard = [row for row in rows if row["speaker"] not in TEST]
    place = data / "recordings"
    write_table(work / "unlabelled.csv", ("file",), [(place / row["file"],) for row in heard])
    of_all = [(row, "test" if row["speaker"] in TEST else "train") for row in rows]
    digits = [(place / row["file"], row["digit"], row["speaker"], split) for row, split in of_all]
    write_table(work / "digits.csv", ("file", "label", "speaker", "split"), digits)


DIGITS = {"source": "digits.csv", "group": "speaker"}
PROBES = {"kNN, %": "knn20", "linear probe, %": "linear_mean"}
CASE = Case(
    "sound",
    prepare,
    {"data": {"source": "unlabelled.csv", "val": "none"}, "recipe": "sound"},
    {
        "digits": ({"data": DIGITS, "method": "knn,linear", "pool": "mean"}, PROBES),
    },
    chinese={"linear probe": "线性探针", ", %": "，%"},
)

if __name__ == "__main__":
    main(CASE, __doc__)
