"""Each kind of input through every command: signals of one and twelve channels, bands without data, volumes, clips."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from field_files import clip, scene, sound, volume
from PIL import Image

import torchmae
from torchmae import visualize
from torchmae.app.session import Session
from torchmae.cli import main
from torchmae.evaluation.embedding import read_features

COUNT = 20  # of which four are held out
RNG = np.random.default_rng(0)


class Kind(NamedTuple):
    name: str
    word: str  # for its samples
    files: list[Path]
    run: Path

    def out(self, name: str) -> Path:
        return self.run.parent / name


def make_signal(path: Path, number: int) -> Path:
    wave = np.sin(np.arange(64) / (3 + 4 * (number % 2))) * 0.5
    return sound(path.with_suffix(".wav"), (wave + 0.05 * RNG.normal(size=64))[:, None], 360)


def make_leads(path: Path, number: int) -> Path:
    wave = np.sin(np.arange(64) / (3 + 4 * (number % 2)))
    leads = [(lead + 1) * wave + lead + 0.05 * RNG.normal(size=64) for lead in range(12)]
    np.save(path.with_suffix(".npy"), np.stack(leads, -1).astype(np.float32))
    return path.with_suffix(".npy")


def make_bands(path: Path, number: int) -> Path:
    rows, columns = np.mgrid[:16, :16]
    base = np.sin(columns / (1 + number % 2) + number) * np.cos(rows / 3)
    values = np.stack([1000 + 500 * band + 300 * base + 10 * RNG.normal(size=base.shape) for band in range(5)])
    values[:, :5, :6] = -9999
    values[:, 12:] = -9999 if number % 3 == 0 else values[:, 12:]
    names = ["blue", "green", "red", "nir", "swir"]
    return scene(path.with_suffix(".tif"), values.astype(np.float32), names, nodata=-9999)


def make_volume(path: Path, number: int) -> Path:
    z, y, x = np.mgrid[:8, :8, :8]
    ball = ((x - 4) ** 2 + (y - 4) ** 2 + (z - 4) ** 2) < 6 + 8 * (number % 2)
    return volume(path.with_suffix(".nii"), (800 * ball - 1000 + 20 * RNG.normal(size=ball.shape)).astype(np.float32))


def make_clip(path: Path, number: int) -> Path:
    return clip(path.with_suffix(".avi"), 6 + number % 2, "mjpeg")


MAKERS = {
    "signal": ("signal", make_signal, "[64]", "[8]"),
    "leads": ("signal", make_leads, "[64]", "[8]"),
    "bands": ("image", make_bands, "[16,16]", "[4,4]"),
    "volume": ("volume", make_volume, "[8,8,8]", "[4,4,4]"),
    "clip": ("clip", make_clip, "[4,24,32]", "[2,8,8]"),
}
SMALL = [
    *("--recipe", "digits", "--model.embed_dim", "16", "--model.depth", "1", "--model.num_heads", "2"),
    *("--model.decoder_embed_dim", "16", "--model.decoder_depth", "1", "--epochs", "2", "--batch_size", "8"),
    *("--data.num_workers", "0", "--progress", "none", "--device", "cpu", "--trackers", "none", "--eval.count", "1"),
]


@pytest.fixture(scope="module", params=MAKERS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """A data set of two classes, and a run on it."""
    word, make, size, patch = MAKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    files = []
    for number in range(COUNT):
        place = folder / "data" / ("even", "odd")[number % 2] / f"{number:02}"
        place.parent.mkdir(parents=True, exist_ok=True)
        files.append(make(place, number))
    axes = ["--data.axes", "LC"] if request.param == "leads" else []
    run = folder / "run"
    sizes = ["--model.input_size", size, "--model.patch_size", patch]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(visualize, "REPORT_POINTS", 4)
        assert main(["pretrain", "--data", str(folder / "data"), "--out", str(run), *SMALL, *sizes, *axes]) == 0
        yield Kind(request.param, word, files, run)


def call(*words: str | Path) -> None:
    assert main([*map(str, words), "--device", "cpu"]) == 0


def drawn(path: Path) -> np.ndarray:
    """The picture in a file, RGBA."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGBA"))


def num_colours(path: Path) -> int:
    return len(np.unique(drawn(path).view(np.uint32)))


@pytest.mark.usefixtures("pictures_of_features")
def test_pretrain_and_resume(kind: Kind) -> None:
    weights = (kind.run / "model.safetensors").read_bytes()
    assert main(["pretrain", "--resume", str(kind.run), "--progress", "none"]) == 0
    assert (kind.run / "model.safetensors").read_bytes() == weights
    description = torchmae.load(kind.run).description
    assert description.kind == kind.word
    assert description.bands == (("blue", "green", "red", "nir", "swir") if kind.name == "bands" else None)
    assert len(list((kind.run / "pictures").iterdir())) == 4  # four images make no map


def test_reconstruct(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    for given, count in (kind.files[:2], 2), ([kind.files[0].parent], 8), ([kind.files[0].parents[1]], 8):
        call("reconstruct", kind.run, *given, "--out", kind.out("a.png"))
        said = f"{count} {kind.word}s" if len(given) == 1 else ""
        assert said in capsys.readouterr().out
        assert num_colours(kind.out("a.png")) > 20
    if kind.name == "bands":
        first = torchmae.load(kind.run).prepare(kind.files[0])
        assert first.valid is not None and not first.images[~first.valid.expand_as(first.images)].any()
        call("reconstruct", kind.run, kind.files[0], "--show", "[nir, red, 2]", "--out", kind.out("b.png"))
        call("reconstruct", kind.run, kind.files[0], "--show", "[5]", "--out", kind.out("c.png"))
        colours = [drawn(kind.out(name)) for name in ("b.png", "c.png")]
        assert (colours[0][..., 3] == colours[1][..., 3]).all() and (colours[0] != colours[1]).any()
        assert main(["reconstruct", str(kind.run), str(kind.files[0]), "--show", "[reed]"]) == 2
        assert "'red'" in capsys.readouterr().err


def test_evaluate(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    call("evaluate", kind.run, "--method", "knn", "--progress", "none")
    assert f"16 training and 4 test {kind.word}s of 2 classes" in capsys.readouterr().out
    masks = ["--reconstruction.strategies", "[random]", "--reconstruction.ratios", "[0.5]"]
    call("evaluate", kind.run, "--method", "reconstruction", *masks, "--progress", "none")
    assert f"4 test {kind.word}s" in capsys.readouterr().out
    data = kind.files[0].parents[1]
    call("evaluate", kind.run, "--method", "anomaly", "--normal", data / "even", "--test", data, "--progress", "none")
    assert f"10 normal {kind.word}s, 20 to test" in capsys.readouterr().out
    assert num_colours(kind.run / "pictures" / "anomaly.png") > 20


def test_embed(kind: Kind) -> None:
    call("embed", kind.run, "--out", kind.out("f.npz"), "--precision", "fp32", "--progress", "none")
    found = read_features(kind.out("f.npz"))
    assert found.features.shape == (COUNT, 16) and np.isfinite(found.features).all()
    loaded = torchmae.load(kind.run)
    images, valid, names = loaded.prepare(kind.files[0].parents[1])
    order = {Path(name).name: row for row, name in enumerate(found.paths)}
    rows = [order[Path(name).name] for name in names]
    np.testing.assert_allclose(found.features[rows], loaded.encode(images, valid=valid), atol=2e-3)
    assert (valid is not None) == (kind.name == "bands")


@pytest.mark.parametrize("what", ["pca", "attention", "neighbours", "map", "ratios"])
def test_visualize(kind: Kind, what: str) -> None:
    call("visualize", kind.run, "--kind", what, "--method", "pca", "--out", kind.out(f"{what}.png"))
    assert num_colours(kind.out(f"{what}.png")) > 5
    with Image.open(kind.out(f"{what}.png")) as picture:
        assert kind.word in picture.info["Description"]
    if what not in ("map", "neighbours"):
        call("visualize", kind.run, kind.files[0].parent, "--kind", what, "--out", kind.out("of.png"))
    if kind.name == "bands" and what == "pca":  # the corner without data is transparent beside the image too
        empty = drawn(kind.out("of.png"))[60:, :, 3] == 0
        assert empty.mean() > 0.1


def test_report(kind: Kind) -> None:
    assert main(["report", str(kind.run)]) == 0
    page = re.sub(r"data:[^\"]*", "", (kind.run / "report.html").read_text())
    assert f"held-out {kind.word}s" in page
    assert kind.word == "image" or not re.search(r"held-out images|training images", page)


def test_export(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    formats = ["safetensors", "timm", "hf-vit", *(["onnx"] if kind.name in ("leads", "clip") else [])]
    for to in formats:
        for module in {"timm": ["timm"], "hf-vit": ["transformers"], "onnx": ["onnx", "onnxscript"]}.get(to, []):
            pytest.importorskip(module)
        done = main(["export", str(kind.run), "--to", to, "--out", str(kind.out(to))])
        if to in ("timm", "hf-vit") and kind.word != "image":
            assert done == 2
            assert capsys.readouterr().err.endswith("use --to onnx, safetensors\n")
        else:
            assert done == 0
            card = (kind.out(to) / "README.md").read_text()
            assert f"16 {kind.word}s, 4 held out" in card
            assert ("nir" in card) == (kind.name == "bands")
    if "onnx" in formats:  # signals of 12 channels, and clips
        session = pytest.importorskip("onnxruntime").InferenceSession(kind.out("onnx") / "model.onnx")
        loaded = torchmae.load(kind.run)
        images = torch.randn(5, loaded.model.encoder.in_chans, *loaded.model.encoder.input_size)
        features, tokens = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(features, loaded.encode(images).numpy(), atol=1e-5)
        np.testing.assert_allclose(tokens[:, 1:], loaded.encode(images, "tokens").numpy(), atol=1e-5)
    if kind.word == "image":  # from the stored values to features, by the export's own preprocessing
        transformers = pytest.importorskip("transformers")
        values = (1000 + 500 * np.arange(5) + 200 * RNG.random((16, 16, 5))).astype(np.float32)  # none is clipped
        processor = transformers.AutoImageProcessor.from_pretrained(kind.out("hf-vit"))
        inputs = processor(values, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        theirs = transformers.ViTModel.from_pretrained(kind.out("hf-vit"), add_pooling_layer=False).eval()
        loaded = torchmae.load(kind.run)
        with torch.no_grad():
            found = theirs(inputs).last_hidden_state[:, 1:].mean(1)
        torch.testing.assert_close(found, loaded.encode(loaded.preprocess(values)), rtol=1e-4, atol=1e-4)
    same = torchmae.load(kind.out("safetensors")).description
    assert same == torchmae.load(kind.run).description


def test_the_page(kind: Kind) -> None:
    loaded = torchmae.load(kind.run)
    runtime = visualize.Runtime(torch.device("cpu"), "fp32", 1)
    data = visualize.open_run_data(kind.run, loaded, runtime, None, None)
    session = Session([("a", loaded)], torch.device("cpu"), data)
    picture, example = session.open(kind.files[0]), session.example(0)
    rows, columns = session.grid
    assert rows * columns == loaded.model.encoder.num_patches
    np.testing.assert_allclose(session.original(example), session.examples[0], atol=1e-5)
    masked = session.draw_mask("random", 0.5, 0)
    (filled,) = session.fill(picture, masked)
    assert filled.error.shape == (rows, columns)
    hidden = np.zeros(rows * columns, dtype=bool)
    hidden[list(masked)] = True
    without_data = np.isinf(session.original(picture)).any() if kind.name == "bands" else False
    assert without_data == (kind.name == "bands")
    assert (np.isnan(filled.error.ravel()) == ~hidden).all()
    shown, made = session.original(picture), filled.reconstructed
    if shown.ndim == 3:  # patches that are not masked stay
        sides = shown.shape[1] // rows, shown.shape[2] // columns
        pixels = hidden.reshape(rows, columns).repeat(sides[0], 0).repeat(sides[1], 1)
        np.testing.assert_allclose(made[:, ~pixels], shown[:, ~pixels], atol=1e-5)
    (seen,) = session.look(picture)
    assert seen.colours.shape == (rows, columns, 3) and seen.attention is not None
    assert seen.attention.shape == (2, rows, columns)
