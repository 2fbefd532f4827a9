"""Some channels, by name or number, in the order given: in training, and in whatever is done with the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import torchmae
from torchmae.config.data import DataOptions
from torchmae.data.arrays import ArraySource
from torchmae.data.formats import FORMATS, Format, open_item
from torchmae.data.items import ArrayItem, Context
from torchmae.data.layouts import open_splits
from torchmae.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
BANDS = RNG.random((12, 8, 8, 4), np.float32)


def scene(data: bytes, context: Context) -> ArrayItem:
    values = np.frombuffer(data, "<f4", offset=5).reshape(8, 8, 4)
    return ArrayItem(values, form="scene", bands=("B2", "B3", "B8", "B12"))


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FORMATS, "scene", Format((".scene",), rb"SCENE", scene))
    (tmp_path / "scenes").mkdir()
    for i, values in enumerate(BANDS):
        (tmp_path / "scenes" / f"{i:02d}.scene").write_bytes(b"SCENE" + values.tobytes())
    return tmp_path / "scenes"


@pytest.mark.parametrize(
    ("given", "places"), [(["B12", "B2"], [3, 0]), ([1, 4, "B8"], [0, 3, 2]), (["2"], [1]), ([3, 3, 3], [2, 2, 2])]
)
def test_channels_in_the_order_given(scenes: Path, given: list[int | str], places: list[int]) -> None:
    options = DataOptions(channels=given)
    source = open_splits(str(scenes), Context.of(options))["train"]
    np.testing.assert_array_equal(source.read(3), BANDS[3][..., places])
    item = source.open(3)
    assert item.bands == tuple(("B2", "B3", "B8", "B12")[place] for place in places)
    np.testing.assert_array_equal(item.read(((1, 3), (2, 5))), BANDS[3][1:4, 2:7][..., places])


@pytest.mark.parametrize(
    ("given", "fix"), [("B13", "did you mean 'B3'"), (5, "choose from B2, B3, B8, B12, or 1 to 4"), (0, "1 to 4")]
)
def test_a_channel_that_is_not_there(scenes: Path, given: int | str, fix: str) -> None:
    content = (scenes / "00.scene").read_bytes()
    with pytest.raises(DataError, match=fix):
        open_item(content, Context(channels=(given,)))
    with pytest.raises(ConfigError, match="leave data.channels out"):
        open_splits("digits", Context(channels=(1,)))


def test_no_data_of_other_channels_does_not_count(tmp_path: Path) -> None:
    images = BANDS.copy()
    images[:, :3, :, 1] = np.nan
    source = ArraySource(images, context=Context(channels=(1, 3)))
    assert source.read_valid(0)[1] is None
    assert source.with_channels(2) is source
    assert ArraySource(images).read_valid(0)[1].sum() == 5 * 8


def test_a_run_keeps_its_channels(scenes: Path, tmp_path: Path) -> None:
    run = torchmae.pretrain(
        {"source": scenes, "num_workers": 0, "channels": ["B8", "B2"]},
        recipe="digits",
        epochs=1,
        batch_size=4,
        out=tmp_path / "run",
        progress="none",
    )
    about = json.loads((run.path / "model.json").read_text())
    assert about["reading"] == {"channels": ["B8", "B2"]}
    assert about["arguments"]["in_chans"] == 2
    np.testing.assert_allclose(about["mean"], BANDS[..., [2, 0]].mean((0, 1, 2)), atol=0.05)
    model = torchmae.load(run.path)
    image = model.preprocess(scenes / "00.scene")
    np.testing.assert_array_equal(image, model.preprocess(BANDS[0][..., [2, 0]]))
    torchmae.embed(run.path, {"num_workers": 0}, out=tmp_path / "features.npz")
    assert len(np.load(tmp_path / "features.npz")["features"]) == 12
