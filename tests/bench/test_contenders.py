from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchmae import presets
from torchmae.bench import contenders
from torchmae.bench.contenders import (
    OURS,
    PHASES,
    TIMM_BLOCKS,
    Contender,
    build,
    model_arguments,
    peer_sizes,
    process_of,
    seconds_of,
)
from torchmae.config import MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from torchmae.errors import ConfigError
from torchmae.machine import SPIN_COUNT
from torchmae.nn.layers import Block
from torchmae.nn.masking import num_keep, random_mask
from torchmae.training.runtime import Runtime

MODEL = ModelConfig(
    preset="vit_tiny_32_p4",
    input_size=16,
    in_chans=2,
    embed_dim=24,
    depth=2,
    num_heads=2,
    mlp_ratio=3.0,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=4,
)
CONFIG = PretrainConfig(model=MODEL, batch_size=4, threads=1, precision="fp32", optim=OptimConfig(lr=1e-3))
PACKAGES = {"transformers": "transformers", TIMM_BLOCKS: "timm", "lightly": "lightly.models"}
CPU = torch.device("cpu")


def require(code: str) -> None:
    if code in PACKAGES:
        pytest.importorskip(PACKAGES[code])


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("code", [OURS, *PACKAGES])
def test_a_step_trains_every_weight(code: str) -> None:
    require(code)
    contender = build(code, CONFIG)
    before = {name: p.detach().clone() for name, p in contender.model.named_parameters() if p.requires_grad}
    losses = [contender.run() for _ in range(3)]
    assert all(loss.shape == () and not loss.requires_grad and loss.isfinite() for loss in losses)
    same = [name for name, p in contender.model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert same == []
    assert contender.images.shape == (4, 2, 16, 16)
    assert (contender.runtime.precision, contender.runtime.threads) == ("fp32", 1)


@pytest.mark.parametrize("code", PACKAGES)
def test_peers_have_as_many_weights_and_the_same_images(code: str) -> None:
    require(code)
    ours, theirs = build(OURS, CONFIG), build(code, CONFIG)
    assert trained(theirs.model) == trained(ours.model)
    assert torch.equal(theirs.images, ours.images)


# That of transformers' model equals ours in tests/nn/test_parity.py.
@pytest.mark.parametrize("norm_pix", [True, False])
def test_lightlys_loss_is_ours_with_our_weights_and_mask(norm_pix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    require("lightly")
    config = replace(CONFIG, model=replace(MODEL, norm_pix=norm_pix))
    ours, theirs = build(OURS, config), build("lightly", config)
    names = {"encoder.": "encoder.vit.", "decoder.embed.": "decoder_embed.", "decoder.pred.": "decoder_pred."}
    weights = {}
    for name, value in ours.model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(prefix, "") + name.removeprefix(prefix)] = value
    # Theirs has a row of zeros for the class token.
    weights["decoder.pos_embed"] = torch.nn.functional.pad(weights["decoder.pos_embed"], (0, 0, 1, 0))
    theirs.model.load_state_dict(weights)
    mask = random_mask(torch.rand(4, 16), (4, 4), 0.75)
    tokens = torch.cat([torch.zeros(4, 1, dtype=torch.int64), mask.ids_keep + 1], dim=1), mask.ids_masked + 1
    monkeypatch.setattr(theirs.model._utils, "random_token_mask", lambda *args, **kwargs: tokens)
    expected = ours.model(ours.images, mask).loss
    torch.testing.assert_close(theirs.model(theirs.images), expected, rtol=1e-5, atol=1e-5)


def test_with_timms_blocks_the_loss_is_ours() -> None:
    require(TIMM_BLOCKS)
    config = replace(CONFIG, model=replace(MODEL, drop_path=0.5))
    ours, theirs = build(OURS, config), build(TIMM_BLOCKS, config)
    kinds = {type(module).__module__ for module in theirs.model.modules()}
    assert "timm.models.vision_transformer" in kinds and not any(isinstance(m, Block) for m in theirs.model.modules())
    assert [m.drop_prob for m in theirs.model.modules() if hasattr(m, "drop_prob")] == [0.5, 0.5]  # the last block's
    theirs.model.load_state_dict(ours.model.state_dict())
    mask = random_mask(torch.rand(4, 16), (4, 4), 0.75)
    losses = [item.model.eval()(ours.images, mask).loss for item in (ours, theirs)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_our_masks_differ_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = build(OURS, CONFIG)
    masks: list[Any] = []
    contender.model.register_forward_pre_hook(lambda _, args: masks.append(args[1].ids_keep))
    contender.run()
    contender.run()
    assert not torch.equal(*masks)


def test_lightly_hides_as_many_patches_and_counts_hidden_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    require("lightly")
    contender = build("lightly", replace(CONFIG, mask=MaskConfig(ratio=0.6)))
    utils = contender.model._utils
    masks = []
    draw = utils.random_token_mask
    monkeypatch.setattr(utils, "random_token_mask", lambda *a, **k: masks.append(draw(*a, **k)) or masks[-1])
    contender.run()
    keep, hidden = masks[0]
    assert (keep[:, 0] == 0).all()  # the class token
    assert keep.shape[1] - 1 == num_keep(16, 0.6)
    assert keep.shape[1] + hidden.shape[1] == 17


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75, 0.9])
def test_a_peer_keeps_as_many_patches(ratio: float) -> None:
    config = replace(CONFIG, mask=MaskConfig(ratio=ratio))
    sizes = peer_sizes(config, model_arguments(config))
    assert int(16 * (1 - sizes.mask_ratio)) == num_keep(16, ratio)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"decoder": "cross"}, "model.decoder"),
        ({"class_token": False}, "model.class_token"),
        ({"drop_path": 0.1}, "model.drop_path"),
        ({"input_size": (16, 32)}, "model.input_size"),
        ({"patch_size": (4, 8)}, "model.patch_size"),
    ],
)
def test_what_a_peer_cannot_do_is_named(change: dict[str, Any], name: str) -> None:
    config = replace(CONFIG, model=replace(MODEL, **change))
    with pytest.raises(ConfigError, match=f"transformers has no equal of this {name}; "):
        build("transformers", config)


def test_other_masks_and_networks_have_no_peer() -> None:
    with pytest.raises(ConfigError, match="no equal of this mask.strategy"):
        build("transformers", replace(CONFIG, mask=MaskConfig(strategy="block")))
    for code in ("transformers", TIMM_BLOCKS):
        with pytest.raises(ConfigError, match="no equal of this model.preset"):
            build(code, replace(CONFIG, model=ModelConfig(preset="mlp")))


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers is not installed; pip install 'torchmae\[bench\]'"):
        build("transformers", CONFIG)


def test_arguments_are_the_presets_and_the_settings() -> None:
    assert model_arguments(PretrainConfig(model=ModelConfig(preset="vit_base"))) == presets.arguments("vit_base")
    assert model_arguments(CONFIG)["embed_dim"] == 24


class FakeTime:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(contenders.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def contender(run: Any, task: Any = None, precision: str = "fp32") -> Contender:
    return Contender(nn.Linear(1, 1), task, run, Runtime(CPU, precision, 1), {}, torch.zeros(64, 1))


def test_seconds_are_those_of_one_of_many(clock: FakeTime) -> None:
    assert seconds_of(lambda: clock.takes(2), 5, CPU) == 2


def test_without_a_number_of_steps_a_turn_takes_about_a_second(clock: FakeTime) -> None:
    taken: list[float] = []
    item = contender(lambda: (clock.takes(0.01), taken.append(clock.now)))
    assert item.turn(None) == pytest.approx(6400)
    assert len(taken) == 101  # one that is not counted
    assert item.turn(3) == pytest.approx(6400)
    assert len(taken) == 105


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_rate_of_a_matrix_product_is_its_operations_over_its_time(
    precision: str, dtype: torch.dtype, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        assert {a.dtype, b.dtype, out.dtype} == {dtype}
        rows.append(len(a))
        clock.takes(2 * len(a) ** 3 / 1e9)

    monkeypatch.setattr(contenders.torch, "mm", product)
    item = contender(None, precision=precision)
    assert item.matrix_product_rate(10) == pytest.approx(1e9)
    assert item.matrix_product_rate() == pytest.approx(1e9)
    assert rows[-1] == 512  # the largest power of two of at most a second


def test_a_step_is_split_where_model_and_optimisers_are_called(clock: FakeTime) -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            clock.takes(2)

    def forward(images: torch.Tensor) -> None:
        clock.takes(3)

    task = SimpleNamespace(forward=forward, optimizers=[Slow([torch.ones(1)]) for _ in range(2)])

    def run() -> None:
        clock.takes(1)  # mask
        for _ in range(2):  # accumulation
            task.forward(None)
            clock.takes(5)  # backward
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    shares = contender(run, task).shares()
    assert shares == pytest.approx({"mask": 1 / 21, "forward": 6 / 21, "backward": 10 / 21, "optimiser": 4 / 21})
    assert tuple(shares) == PHASES
    before = clock.now
    run()  # nothing is left of the clock
    assert task.forward is forward and clock.now == before + 21


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_peak_is_what_weights_moments_and_a_batch_take_and_not_much_more() -> None:
    # 12288 x 512 weights twice: 48 MiB in fp32, their gradients and two moments each as much again; activations and
    # batch are small beside it.
    values = 2 * 12288 * 512 + 12288 + 512
    model = ModelConfig(preset="mlp", input_size=64, hidden_dim=512, output_relu=False, loss_on="all")
    config = PretrainConfig(model=model, batch_size=4, precision="fp32", threads=1)
    config = replace(config, mask=replace(config.mask, strategy="elements"))
    with process_of(OURS, config) as call:
        peak = call("first_steps")["peak_memory"]
    assert 4 * 4 * values <= peak < 4 * 4 * values + 100 * 2**20


def test_a_mistake_in_the_other_process_and_its_end_are_said_here() -> None:
    config = PretrainConfig(model=ModelConfig(preset="vit_tiny_32_p4", num_heads=5), threads=1, batch_size=4)
    with process_of(OURS, config) as call:
        for name in ("first_steps", "shares"):
            with pytest.raises(ConfigError, match="192 cannot be divided among 5 heads"):
                call(name)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(ConfigError, match="^batches of 4 do not fit into memory; "):
            call("shares")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["GPU", "CPU"])
def test_memory_that_does_not_suffice_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise error

    calls, answers = [("first_steps", ())], []

    def receive() -> Any:
        if calls:
            return calls.pop()
        raise EOFError

    monkeypatch.setattr(contenders, "build", build)
    monkeypatch.setattr(contenders.signal, "signal", lambda *_: None)
    contenders._serve(SimpleNamespace(recv=receive, send=answers.append), OURS, CONFIG)  # type: ignore[arg-type]
    assert [str(answer) for answer in answers] == ["batches of 4 do not fit into memory; lower batch_size"]


@pytest.mark.parametrize(
    ("code", "given", "seen"),
    [(OURS, None, SPIN_COUNT), (OURS, "7", "7"), ("transformers", SPIN_COUNT, None), ("transformers", "7", "7")],
)
def test_threads_wait_as_those_of_the_code_do(
    code: str, given: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    found: list[str | None] = []

    class Process:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            found.append(os.environ.get("GOMP_SPINCOUNT"))

        def terminate(self) -> None: ...

        def join(self) -> None: ...

    context = SimpleNamespace(Process=Process, Pipe=contenders.get_context("spawn").Pipe)
    monkeypatch.setattr(contenders, "get_context", lambda _: context)
    with process_of(code, CONFIG):
        assert os.environ.get("GOMP_SPINCOUNT") == given
    assert found == [seen]
