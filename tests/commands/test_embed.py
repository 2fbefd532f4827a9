from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_run

from torchmae.cli import main
from torchmae.evaluation.embedding import read_features
from torchmae.training.pretrained import load

QUICK = ["--threads", "1", "--precision", "fp32", "--progress", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


def test_the_runs_own_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features.npz"
    assert main(["embed", str(run), "--out", str(out), *QUICK]) == 0
    assert capsys.readouterr().out == f"{out}  (1,797 x 16 features)\n"
    content = read_features(out)
    assert content.features.shape == (1797, 16)
    assert content.paths[0] == "digits/0"
    assert np.bincount(content.labels).sum() == 1797
    assert main(["embed", str(run), "--out", str(out), *QUICK]) == 2
    assert "exists already; remove it, or choose another --out" in capsys.readouterr().err


def test_tokens_of_one_split_of_other_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).random((6, 10, 10, 1)).astype(np.float32)
    source, out = tmp_path / "data.npz", tmp_path / "tokens.parquet"
    np.savez(source, images=images, test_images=images[:4])
    options = ["--data", str(source), "--split", "test", "--pool", "tokens"]
    assert main(["embed", str(run), *options, "--out", str(out), *QUICK, "--progress", "plain"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}  (4 x 16 x 16 features)\n"
    assert "images of 10x10 are cropped and resampled to the model's 8x8" in printed.err
    content = read_features(out)
    assert content.labels.tolist() == [-1] * 4
    pretrained = load(run)
    expected = pretrained.encode(pretrained.preprocess(*images[:4]), "tokens")
    np.testing.assert_allclose(content.features, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.csv"], "out is 'a.csv'; give a name that ends in .npz or .parquet"),
        (["--out", "file/a.npz"], "cannot write file/a.npz.partial: Not a directory; choose another --out"),
        (["--split", "test"], "split is 'test'; choose from train, val"),
        (["--pool", "max"], "pool is 'max'; did you mean 'mean'?"),
        (["--mask.ratio", "0.5"], "unknown option 'mask.ratio'"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["embed", str(run), *options, *QUICK]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
