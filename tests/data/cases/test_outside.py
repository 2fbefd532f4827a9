"""A format that is added from outside: the example of docs/data.md, in every command."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchmae import cli
from torchmae.data.formats import FORMATS
from torchmae.data.layouts import open_splits

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["depth_format.py"])
    (code,) = (part for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:] if "FORMATS[" in part)
    code = code.partition("```")[0]
    assert len(code.splitlines()) < 30
    before = dict(FORMATS)
    exec(compile(code, "depth_format.py", "exec"), {"__name__": "depth_format"})
    yield code
    FORMATS.clear()
    FORMATS.update(before)


@pytest.mark.usefixtures("example")
def test_the_example_trains_inspects_packs_embeds_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "scans"
    folder.mkdir()
    images = rng.integers(500, 4000, (24, 8, 10)).astype(np.uint16)
    for i, image in enumerate(images):
        (folder / f"{i:02d}.depth").write_bytes(b"DEPTH" + struct.pack("<II", 8, 10) + image.tobytes())
    np.testing.assert_array_equal(open_splits(str(folder))["train"].read(5)[..., 0], images[5])

    assert cli.main(["data", "inspect", str(folder), "--json", "--sheet", str(tmp_path / "sheet.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["splits"]["train"]["formats"] == {"depth": 24}
    assert "12-bit values in uint16" in facts["notes"]
    assert np.asarray(Image.open(tmp_path / "sheet.png")).std() > 20

    pytest.importorskip("pyarrow")
    for form in ("parquet", "wds", "npy"):
        assert cli.main(["data", "pack", str(folder), str(tmp_path / form), "--format", form]) == 0
        packed = open_splits(str(tmp_path / form))["train"]
        np.testing.assert_array_equal(packed.read(7)[..., 0], images[7])
    train = ["pretrain", "--data", str(folder), "--recipe", "digits", "--epochs", "1", "--data.num_workers", "2"]
    assert cli.main([*train, "--data.cache", "none", "--batch", "8", "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["embed", str(tmp_path / "run"), "--out", str(tmp_path / "features.npz")]) == 0
    assert "12-bit values in uint16" in capsys.readouterr().err
    with np.load(tmp_path / "features.npz") as features:
        assert len(features["features"]) == 24
    shown = sorted((tmp_path / "run" / "reconstructions").glob("*.png"))[-1]
    assert np.asarray(Image.open(shown).convert("L")).std() > 20
    picture = tmp_path / "filled.png"
    assert cli.main(["reconstruct", str(tmp_path / "run"), str(folder / "00.depth"), "--out", str(picture)]) == 0
    assert np.asarray(Image.open(picture).convert("L")).std() > 20
