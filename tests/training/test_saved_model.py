from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import mlp, vit

from torchmae import presets
from torchmae.errors import CheckpointError
from torchmae.nn.classifier import ViTClassifier
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.training.checkpoint import save_checkpoint
from torchmae.training.saved_classifier import ClassifierDescription, load_classifier, save_classifier
from torchmae.training.saved_model import Description, load_model, write_description, write_weights

ARGUMENTS = presets.arguments(
    "vit_digits", depth=1, embed_dim=16, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2
)
DESCRIPTION = Description(
    ARGUMENTS, (0.3,), (0.1 + 0.2,), {"strategy": "random", "ratio": 0.75}, ("zero", "one"), "0.1.0"
)


def write(folder: Path, model: MaskedAutoencoder, description: Description = DESCRIPTION) -> None:
    write_description(folder / "model.json", description)
    write_weights(folder / "model.safetensors", model.state_dict())


def same(one: MaskedAutoencoder, other: MaskedAutoencoder) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = vit()
    write(tmp_path, model)
    loaded, description = load_model(tmp_path)
    assert same(model, loaded)
    assert not loaded.training
    assert description == DESCRIPTION
    assert description.input_size == (8, 8)


def test_an_mlp_too(tmp_path: Path) -> None:
    arguments = presets.arguments("mlp", input_size=(8, 8), in_chans=1, hidden_dim=12)
    write(tmp_path, mlp(), Description(arguments, (0.5,), (0.5,), {}, None, "0.1.0"))
    assert same(load_model(tmp_path)[0], mlp())


def test_a_run_under_way_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    write_description(tmp_path / "model.json", DESCRIPTION)
    with pytest.raises(CheckpointError, match=r"has no weights yet; let the run save a checkpoint first$"):
        load_model(tmp_path)
    model = vit()
    save_checkpoint(tmp_path / "checkpoints", model.state_dict(), [], {"step": 3})
    assert same(load_model(tmp_path)[0], model)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model: cannot read model\.json; give a run folder of"):
        load_model(tmp_path)
    write(tmp_path, vit())
    good = json.loads((tmp_path / "model.json").read_text())
    for text, message in (
        ("{", "model.json is damaged: "),
        ("[]", "model.json is damaged: "),
        (json.dumps({**good, "format": 2}), "model.json has format 2; this torchmae reads 1; update torchmae"),
        (json.dumps({"format": 1}), "model.json is damaged: "),
        (json.dumps({**good, "more": 1}), "model.json is damaged: "),
        (json.dumps({**good, "reading": {"pages": "odd"}}), "model.json is damaged: "),
        (json.dumps({**good, "arguments": {"depth": 1}}), "cannot load the model in "),
        (json.dumps({**good, "arguments": {**good["arguments"], "depth": 2}}), "cannot load the model in "),
        (json.dumps({**good, "arguments": {**good["arguments"], "patch_size": [3, 3]}}), "cannot load the model in "),
    ):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "model.json").write_text(json.dumps(good))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short: it has 100 bytes of "):
        load_model(tmp_path)


def test_a_classifier_no_larger_than_its_weights(tmp_path: Path) -> None:
    sizes = {"input_size": (8, 8), "patch_size": (2, 2), "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    arguments = {**sizes, "num_classes": 3}
    save_classifier(tmp_path, ViTClassifier(**arguments), ClassifierDescription(arguments, (0.5,), (0.2,), None, "0"))
    assert load_classifier(tmp_path)[1].arguments["embed_dim"] == 16
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"depth": 1', '"depth": 1000000000'))
    with pytest.raises(CheckpointError, match="1,000,000,000 blocks"):
        load_classifier(tmp_path)
    (tmp_path / "model.json").write_text(text.replace('"embed_dim": 16', '"embed_dim": 160000'))
    with pytest.raises(CheckpointError, match="parameters and the weights hold"):
        load_classifier(tmp_path)
