"""Checkpoints, models and others' weights with damage, also where every checksum was made to match it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import FUZZ, damaged, damaged_json, reads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from torchmae import presets
from torchmae.errors import CheckpointError
from torchmae.interop import names
from torchmae.interop.reading import read_weights
from torchmae.training.checkpoint import load_checkpoint, save_checkpoint
from torchmae.training.saved_model import Description, load_model, write_description, write_weights

WEIGHTS = {"a": torch.ones(2, 3), "b": torch.zeros(4)}


def checkpoint(folder: Path) -> Path:
    """A whole checkpoint."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    return save_checkpoint(folder, WEIGHTS, [optimizer.state_dict()], {"step": 3})


def seal(path: Path) -> None:
    """Makes the checksums match what is there, as whoever changes a checkpoint on purpose does."""
    sums = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != "checksums.json"
    }
    (path / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("sealed", [False, True], ids=["", "sealed"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "checksums.json"])
def test_checkpoints(folder: Path, name: str, sealed: bool) -> None:
    path = checkpoint(folder)
    files = sorted(file.name for file in path.iterdir())

    @FUZZ
    @given(damaged((path / name).read_bytes()))
    def check(raw: bytes) -> None:
        (path / name).write_bytes(raw)
        if sealed:
            seal(path)
        reads_or_refuses(lambda: load_checkpoint(folder))

    check()
    assert sorted(file.name for file in path.iterdir()) == files
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("name", ["/dev/zero", "../../../../../../../../dev/zero", "pipe", "a\0b", "\x1b[2J"])
def test_checksums_of_files_that_are_not_the_checkpoints(folder: Path, name: str) -> None:
    path = checkpoint(folder)
    os.mkfifo(path / "pipe")
    sums = json.loads((path / "checksums.json").read_text())
    (path / "checksums.json").write_text(json.dumps({name: "", **sums}))
    with pytest.raises(CheckpointError, match="no whole checkpoint is left") as caught:
        load_checkpoint(folder)
    assert str(caught.value).isprintable()


class Evil:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("evil",)


def test_nothing_is_unpickled(folder: Path) -> None:
    path = checkpoint(folder)
    torch.save([{"state": Evil()}], path / "optimizer.pt")
    seal(path)
    with pytest.raises(CheckpointError, match=r"is no checkpoint of torchmae: .*Weights only"):
        load_checkpoint(folder)
    torch.save({"model": Evil()}, folder / "weights.pth")
    with pytest.raises(CheckpointError, match=r"is no file of plain tensors: it asks for \S*mkdir"):
        read_weights(folder / "weights.pth")


# A model of torchmae's own

ARGUMENTS = presets.arguments(
    "vit_digits", embed_dim=8, depth=1, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2
)


@pytest.fixture
def model(folder: Path) -> Path:
    write_description(
        folder / "model.json",
        Description(ARGUMENTS, (0.5,), (0.2,), {"strategy": "random", "ratio": 0.75}, ("a", "b"), "0.1.0"),
    )
    write_weights(folder / "model.safetensors", presets.construct(ARGUMENTS).state_dict())
    return folder


def test_a_model_json(model: Path) -> None:
    path = model / "model.json"

    @FUZZ
    @given(st.one_of(damaged_json(json.loads(path.read_text())), st.just("[" * 100_000)))
    def check(text: str) -> None:
        path.write_text(text)
        reads_or_refuses(lambda: load_model(model))

    check()


def test_its_weights(model: Path) -> None:
    path = model / "model.safetensors"

    @FUZZ
    @given(damaged(path.read_bytes()))
    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        reads_or_refuses(lambda: load_model(model))

    check()


@pytest.mark.parametrize(
    "changes", [{"depth": 10**9}, {"decoder_depth": 10**9}, {"embed_dim": 2**20}, {"input_size": [2**20, 2**20]}]
)
def test_a_model_json_of_a_larger_model_takes_no_memory(model: Path, changes: dict[str, Any]) -> None:
    values = json.loads((model / "model.json").read_text())
    values["arguments"] |= changes
    (model / "model.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"model.json describes [0-9,]+ (parameters|blocks) and the weights hold"):
        load_model(model)


# Weights of others

STATE = names.to_official(
    presets.construct(
        presets.arguments(
            "vit_tiny_32_p4", input_size=8, embed_dim=8, depth=1, num_heads=2,
            decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
        )
    ).state_dict()
)  # fmt: skip
ENCODER = {name: value for name, value in STATE.items() if not name.startswith(("decoder", "mask"))}


def test_a_checkpoint_file(folder: Path) -> None:
    path = folder / "x.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(norm_pix_loss=True, num_heads=2, decoder_num_heads=2)}, path)
    assert read_weights(path).decoder is not None

    @FUZZ
    @given(damaged(path.read_bytes()))
    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        reads_or_refuses(lambda: read_weights(path))

    check()
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.ones(3),
        None,
        {},
        {"model": {}},
        {"model": {1: torch.ones(2)}},
        {"model": STATE, "args": torch.ones(2)},
        {"model": STATE, "args": {"num_heads": "x", "decoder_num_heads": 2}},
        {"model": STATE, "args": {"num_heads": 2, "decoder_num_heads": 0}},
        {"model": STATE, "args": {"num_heads": 2, "decoder_num_heads": 2, "mean": 3, "std": 0}},
        {"model": {**STATE, "blocks.999999999.attn.qkv.weight": torch.ones(1)}, "args": {"num_heads": 2}},
        {"model": {**STATE, "pos_embed": torch.ones(())}, "args": {"num_heads": 2}},
        {"model": {**STATE, "patch_embed.proj.weight": torch.ones(8, 3, 0, 0)}, "args": {"num_heads": 2}},
    ],
)
def test_a_file_that_holds_something_else(folder: Path, content: Any) -> None:
    torch.save(content, folder / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        read_weights(folder / "x.pth")
    assert str(caught.value).isprintable()


CONFIGS: dict[str, dict[str, Any]] = {
    "transformers": {
        "model_type": "vit",
        "hidden_act": "gelu",
        "image_size": 8,
        "num_channels": 3,
        "num_attention_heads": 2,
    },
    "timm": {
        "architecture": "vit_tiny_patch4_8",
        "model_args": {"img_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2},
        "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    },
}


@pytest.mark.parametrize("library", CONFIGS)
def test_a_folder_of_another_library(folder: Path, library: str) -> None:
    config = folder / "config.json"
    save_file({name: value.contiguous() for name, value in ENCODER.items()}, folder / "model.safetensors")

    @FUZZ
    @given(st.one_of(damaged_json(CONFIGS[library]), st.just("[" * 100_000)))
    def check(text: str) -> None:
        config.write_text(text)
        reads_or_refuses(lambda: read_weights(folder))

    check()


def test_an_index_that_names_files_elsewhere(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIGS["timm"]))

    @FUZZ
    @given(damaged_json({"metadata": {}, "weight_map": {"norm.weight": "../a.safetensors", "norm.bias": "a"}}))
    def check(text: str) -> None:
        (folder / "model.safetensors.index.json").write_text(text)
        reads_or_refuses(lambda: read_weights(folder))

    check()


def test_the_header_of_a_safetensors_file(folder: Path) -> None:
    raw = save({name: value.contiguous() for name, value in ENCODER.items()})
    (length,) = struct.unpack("<Q", raw[:8])
    header, tensors = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    (folder / "config.json").write_text(json.dumps(CONFIGS["timm"]))

    @FUZZ
    @given(damaged_json(header))
    def check(text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + tensors)
        reads_or_refuses(lambda: read_weights(folder))

    check()
