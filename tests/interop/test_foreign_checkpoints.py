"""Weights as others leave them: wrapped and prefixed, beside other values, in other layouts, or no weights at all."""

from __future__ import annotations

import argparse
import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchmae import presets
from torchmae.errors import CheckpointError
from torchmae.interop.files import plain, read_file
from torchmae.interop.reading import is_foreign, read_weights
from torchmae.interop.weights import build
from torchmae.nn.encoder import ViTEncoder
from torchmae.training.pretrained import load
from torchmae.training.saved_model import Description, write_description

State = dict[str, Tensor]


def state(seed: int = 0, prefix: str = "", **changes: Any) -> State:
    """A small encoder of 32 x 32 images, off its initial values; a width of 192 says that it has three heads."""
    sizes = {"input_size": (32, 32), "patch_size": (8, 8), "in_chans": 3, "embed_dim": 192, "depth": 2, "num_heads": 3}
    torch.manual_seed(seed)
    encoder = ViTEncoder(**{**sizes, **changes})
    return {f"{prefix}{name}": value + torch.randn_like(value) * 0.02 for name, value in encoder.state_dict().items()}


def same(given: State, wanted: State) -> bool:
    return given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)


# Which encoder


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda: state(), None),
        (lambda: {"model": state(), "epoch": 3, "args": "python train.py"}, None),
        (lambda: {"state_dict": state()}, "state_dict"),
        (lambda: {"model_ema": state(), "optimizer": {"lr": 0.1}}, "model_ema"),
        (lambda: {"state_dict": state(prefix="backbone.")}, "state_dict.backbone"),
        (lambda: {"teacher": state(prefix="module.backbone.")}, "teacher.module.backbone"),
        (lambda: {"a": {"b": {"encoder": state(prefix="module.")}}}, "a.b.encoder.module"),
        (lambda: {"model": state(prefix="_orig_mod.")}, "model._orig_mod"),
        (lambda: state(prefix="module."), "module"),
        (lambda: {"model": state(), "model_without_ddp": state()}, "model"),
    ],
)
def test_the_only_encoder_is_taken_and_said(tmp_path: Path, wrap: Callable[[], Any], note: str | None) -> None:
    torch.save(wrap(), tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert same(weights.encoder, state())
    taken = [said for said in weights.notes if said.startswith("taken from")]
    assert taken == ([] if note is None else [f"taken from {note} of the file"])


def test_wrappers_inside_names_are_taken_off(tmp_path: Path) -> None:
    inside = {name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): value for name, value in state().items()}
    torch.save(inside, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth").encoder, state())


def test_what_stands_beside_the_encoder_is_named(tmp_path: Path) -> None:
    beside = {"head.weight": torch.ones(2, 192), "head.bias": torch.ones(2), "projector.0.weight": torch.ones(3, 3)}
    torch.save({"state_dict": {**state(prefix="backbone."), **beside}}, tmp_path / "x.pth")
    assert "not used: state_dict.head, state_dict.projector" in read_weights(tmp_path / "x.pth").notes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lambda: {"student": state(prefix="module.b."), "teacher": state(1, "module.b.")}, ("student", "teacher")),
        (lambda: {"model": state(), "model_ema": state(1)}, ("model", "model_ema")),
        (lambda: {**state(prefix="student."), **state(1, "teacher.")}, ("student", "teacher")),
        (lambda: {**state(), **state(1, "ema.")}, (".", "ema")),
        (lambda: {"m": {**state(prefix="online.net."), **state(1, "target.net.")}}, ("m.online", "m.target")),
    ],
)
def test_of_several_encoders_one_is_chosen(tmp_path: Path, content: Callable[[], Any], parts: tuple[str, str]) -> None:
    path = tmp_path / "x.pth"
    torch.save(content(), path)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert f"holds 2 encoders: {', '.join(parts)}; choose one: {path}#{parts[1]}" in str(caught.value)
    for seed, part in enumerate(parts):
        chosen = Path(f"{path}#{part}")
        assert is_foreign(chosen)
        weights = read_weights(chosen)
        assert same(weights.encoder, state(seed))
    with pytest.raises(CheckpointError, match="holds no encoders under 'x'"):
        read_weights(Path(f"{path}#x"))


def test_a_mark_in_the_name_of_a_file_is_no_choice(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a#b.pth")
    assert same(read_weights(tmp_path / "a#b.pth").encoder, state())


# Files


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.7),
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.arange(3.0),
        np.arange(6, dtype=">i4").reshape(2, 3).T,
        np.zeros((0, 2)),
        np.array(["a", "b"]),
        np.array([object, None]),
        np.datetime64("2026-01-01"),
        PurePosixPath("/tmp/out"),
        Path("/tmp/out"),
        PureWindowsPath("C:/out"),
        argparse.Namespace(out=Path("/tmp"), lr=np.float32(0.1)),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:30],
)
def test_numpy_values_and_paths_beside_the_weights(tmp_path: Path, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype == object:
        value[0] = 1
    torch.save({"model": state(), "beside": value}, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth").encoder, state())
    read = plain(read_file(tmp_path / "x.pth")["beside"])
    if isinstance(value, np.ndarray) and value.dtype.kind in "fi":
        assert np.array_equal(read.numpy(), value)
    elif isinstance(value, np.generic) and value.dtype.kind in "fib":
        assert read == value and isinstance(read, int | float)


def test_parameters_may_be_numpy_arrays(tmp_path: Path) -> None:
    torch.save({name: value.numpy() for name, value in state().items()}, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth").encoder, state())


class Runs:
    """Asks for a call when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this must not be run",))


@pytest.mark.parametrize("inside", [Runs(), np.array([Runs()], dtype=object)], ids=["bare", "in an array"])
def test_code_is_refused_wherever_it_stands(tmp_path: Path, inside: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": state(), "best": np.float64(0.7), "beside": inside}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="torchmae does not run code from files"):
        read_weights(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


def saved(suffix: str, folder: Path, content: Any = None) -> bytes:
    path = folder / f"whole{suffix}"
    content = state() if content is None else content
    save_file(content, path) if suffix == ".safetensors" else torch.save({"model": content}, path)
    return path.read_bytes()


def archive(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "x.zip", "w") as file:
        file.writestr("a.npy", b"0")
    return (folder / "x.zip").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda *_: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "is a Git LFS pointer"),
        (lambda *_: b"\n <!DOCTYPE html>\n<html>403</html>", "is a web page"),
        (lambda *_: b"<HTML><head></head></HTML>", "is a web page"),
        (lambda *_: b'{"error": "Repository not found"}', "is text, which begins"),
        (lambda *_: b"", "is empty; copy or download it again"),
        (lambda *_: bytes(70_000), "70,000 bytes that are all zero"),
        (lambda suffix, folder: saved(suffix, folder)[:-1000], "is cut short"),
        (lambda suffix, folder: saved(suffix, folder)[:2000], "is cut short"),
        (lambda suffix, folder: gzip.compress(saved(suffix, folder)), "is compressed by gzip"),
        (lambda _, folder: archive(folder), "is an archive of other files (a.npy, ...)"),
        (
            lambda suffix, folder: saved(suffix, folder, {name: value * 0 for name, value in state().items()}),
            "holds nothing but zeros in ",
        ),
        (
            lambda suffix, folder: saved(suffix, folder, {**state(), "norm.bias": torch.full((192,), torch.nan)}),
            "values that are not finite in norm.bias",
        ),
    ],
)
def test_files_that_are_no_weights_are_named(
    tmp_path: Path, suffix: str, make: Callable[[str, Path], bytes], message: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(make(suffix, tmp_path))
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert caught.value.fix


def test_a_file_is_told_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    for suffix, other in ((".pth", ".safetensors"), (".safetensors", ".pth")):
        content = saved(suffix, tmp_path)
        (tmp_path / f"x{other}").write_bytes(content)
        assert same(read_weights(tmp_path / f"x{other}").encoder, state())


@pytest.mark.parametrize("ours", [False, True])
def test_a_pointer_in_a_folder_is_named(tmp_path: Path, ours: bool) -> None:
    if ours:
        arguments = presets.arguments("vit_digits")
        write_description(tmp_path / "model.json", Description(arguments, (0.3,), (0.2,), {}, None, "0.1.0"))
    else:
        config = '{"architecture": "vit_tiny_patch8_32", "model_args": {"img_size": 32}}'
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        load(tmp_path)


# Layouts


def save(path: Path, parameters: State) -> Path:
    save_file({name: value.contiguous() for name, value in parameters.items()}, path)
    return path


@pytest.mark.parametrize("parts", ["qv", "qkv", ""])
def test_split_biases_are_joined(tmp_path: Path, parts: str) -> None:
    wanted = state()
    given = dict(wanted)
    for i in range(2):
        biases = dict(zip("qkv", given.pop(f"blocks.{i}.attn.qkv.bias").chunk(3), strict=True))
        given |= {f"blocks.{i}.attn.{part}_bias": biases[part].clone() for part in parts}
        whole = [biases[part] if part in parts else torch.zeros(192) for part in "qkv"]
        wanted[f"blocks.{i}.attn.qkv.bias"] = torch.cat(whole)
    weights = read_weights(save(tmp_path / "x.safetensors", given))
    assert same(weights.encoder, wanted)
    assert len(weights.notes) == 1


@pytest.mark.parametrize("form", ["", "_proj"])
@pytest.mark.parametrize("key_bias", [True, False])
def test_queries_keys_and_values_are_joined(tmp_path: Path, form: str, key_bias: bool) -> None:
    wanted = state()
    given = dict(wanted)
    for i in range(2):
        block = f"blocks.{i}.attn."
        for kind in ("weight", "bias"):
            parts = dict(zip("qkv", given.pop(f"{block}qkv.{kind}").chunk(3), strict=True))
            if kind == "bias" and not key_bias:
                parts["k"] = torch.zeros(192)
                wanted[f"{block}qkv.bias"] = torch.cat([*parts.values()])
                del parts["k"]
            given |= {f"{block}{part}{form}.{kind}": value.clone() for part, value in parts.items()}
    weights = read_weights(save(tmp_path / "x.safetensors", given))
    assert same(weights.encoder, wanted)
    assert weights.notes[0] == "queries, keys and values joined"
    assert weights.notes[1].endswith("joined" if key_bias else "joined; zero for k")


def test_a_decoder_of_another_kind_is_named_and_left(tmp_path: Path) -> None:
    beside = {"decoder_pos_embed_spatial": torch.ones(1, 16, 64), "decoder_blocks.0.attn.q.weight": torch.ones(64, 64)}
    weights = read_weights(save(tmp_path / "x.safetensors", {**state(), **beside, "mask_token": torch.ones(1, 1, 64)}))
    assert same(weights.encoder, state())
    assert weights.decoder is None
    assert weights.notes == (weights.no_decoder,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.qkv.weight": torch.ones(576, 192, dtype=torch.int8)}, "holds torch.int8 in blocks.0.attn.qkv"),
        ({"pos_embed": torch.ones(17, 192)}, "pos_embed is (17, 192)"),
        ({"patch_embed.proj.weight": torch.ones(192, 192)}, "patch_embed.proj.weight is (192, 192)"),
    ],
)
def test_other_shapes_and_types_are_named(tmp_path: Path, change: State, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_weights(save(tmp_path / "x.safetensors", {**state(), **change}))
    assert message in str(caught.value)


def test_one_block_without_its_bias_is_damaged(tmp_path: Path) -> None:
    given = state()
    del given["blocks.1.attn.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"it lacks blocks\.1\.attn\.qkv\.bias"):
        read_weights(save(tmp_path / "x.safetensors", given))


CLIPS = {"input_size": (6, 32, 32), "patch_size": (2, 8, 8)}


def test_positions_say_their_grid_or_ask_for_it(tmp_path: Path) -> None:
    clips = save(tmp_path / "clips.safetensors", state(**CLIPS))
    wide = save(tmp_path / "wide.safetensors", state(input_size=(16, 48)))
    with pytest.raises(
        CheckpointError, match=r"48 positions .*: 3x4x4, 12x2x2; .*input_size \[6, 32, 32\], or \[32, 32\]"
    ):
        read_weights(clips)
    with pytest.raises(CheckpointError, match=r"12 positions .*: 3x4, 2x6; .*--model\.input_size \[24, 32\]"):
        read_weights(wide)
    for path, size in ((clips, (6, 32, 32)), (wide, (16, 48))):
        weights = read_weights(path, input_size=size)
        assert (weights.arguments["input_size"], weights.notes) == (size, ())
    with pytest.raises(CheckpointError, match="does not say for which grid"):
        read_weights(wide, input_size=(16, 64))
    square = read_weights(save(tmp_path / "square.safetensors", state()), input_size=(16, 64))
    assert square.arguments["input_size"] == (32, 32)  # to be resampled


def test_positions_without_a_row_for_the_class_token(tmp_path: Path) -> None:
    given = state()
    given["pos_embed"] = given["pos_embed"][:, 1:]
    weights = read_weights(save(tmp_path / "x.safetensors", given))
    assert not weights.encoder["pos_embed"][:, 0].any()
    assert torch.equal(weights.encoder["pos_embed"][:, 1:], given["pos_embed"])


def test_signals_are_of_any_length(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", state(input_size=(80,), patch_size=(8,)))
    assert read_weights(path).arguments["input_size"] == (80,)


@pytest.mark.parametrize("prefix", [True, False], ids=["with a class token", "without"])
def test_separable_positions_are_added_up(tmp_path: Path, prefix: bool) -> None:
    given = state(class_token=prefix, **CLIPS)
    del given["pos_embed"]
    space, time, token = torch.randn(1, 16, 192), torch.randn(1, 3, 192), torch.randn(1, 1, 192)
    given |= {"pos_embed_spatial": space, "pos_embed_temporal": time, **({"pos_embed_class": token} if prefix else {})}
    path = save(tmp_path / "x.safetensors", given)
    weights = read_weights(path)
    assert weights.arguments["input_size"] == (6, 32, 32)
    table = weights.encoder["pos_embed"]
    assert table.shape == (1, 48 + prefix, 192)
    for frame, place in ((0, 0), (1, 5), (2, 15)):
        assert torch.equal(table[0, prefix + frame * 16 + place], space[0, place] + time[0, frame])
    if prefix:
        assert torch.equal(table[:, :1], token)
    first = read_weights(path, input_size=(16, 16))  # a size to train on: theirs is known
    assert first.arguments["input_size"] == (32, 32)
    assert torch.equal(first.encoder["pos_embed"], table[:, : 16 + prefix])


@pytest.mark.parametrize("frames", [1, 2])
def test_one_frame_computes_what_a_still_clip_does(tmp_path: Path, frames: int) -> None:
    given = state(input_size=(3 * frames, 32, 32), patch_size=(frames, 8, 8))
    path = save(tmp_path / "x.safetensors", given)
    still = read_weights(path, input_size=(32, 32))
    assert (still.arguments["input_size"], still.arguments["patch_size"]) == ((32, 32), (8, 8))
    assert len(still.notes) == frames
    given["pos_embed"] = given["pos_embed"][:, :17]
    clip = build(read_weights(save(tmp_path / "first.safetensors", given), input_size=(frames, 32, 32)))
    images = torch.randn(2, 3, 32, 32)
    expected = clip.encode(images[:, :, None].expand(-1, -1, frames, -1, -1))
    torch.testing.assert_close(build(still).encode(images), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_another_kind_are_named(tmp_path: Path) -> None:
    given = state()
    del given["pos_embed"]
    given["blocks.0.attn.relative_position_bias_table"] = torch.ones(49, 3)
    with pytest.raises(CheckpointError, match=r"no pos_embed \(but blocks\.0\.attn\.relative_position_bias_table\)"):
        read_weights(save(tmp_path / "x.safetensors", given))


def test_heads_are_asked_for_only_where_nothing_says_them(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", state(embed_dim=64, num_heads=4))
    with pytest.raises(CheckpointError, match=r"how many attention heads a width of 64 .*--model\.num_heads"):
        read_weights(path)
    assert read_weights(path, num_heads=4).arguments["num_heads"] == 4
    known = save(tmp_path / "known.safetensors", state())
    assert read_weights(known, num_heads=6).arguments["num_heads"] == 3
