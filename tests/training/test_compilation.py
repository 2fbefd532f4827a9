from __future__ import annotations

import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from small import images, mlp, train, vit
from torch import Tensor, nn
from torch._functorch import config as functorch

from torchmae.config import OptimConfig, PretrainConfig
from torchmae.errors import ConfigError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training import compilation
from torchmae.training.compilation import MAX_WHOLE, check_compiler, compile_model, full_batches_only, parts


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        check_compiler()
    with pytest.raises(ConfigError, match="compiler"):
        compile_model(nn.Linear(2, 2), torch.device("cpu"))


def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match="headers"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    check_compiler()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of batch, above 3, that are compiled for a layer of 3 values, without machine code."""
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        sizes.append(next(value.shape[0] for value in example if value.shape[-1] == 3 and value.shape[0] > 3))
        return graph.forward

    monkeypatch.setattr(compilation, "check_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return sizes


@pytest.mark.parametrize("sizes", [(4, 4, 2, 4, 2), (2, 4, 2, 4)], ids=["full first", "short first"])
def test_only_full_batches_are_compiled(compiled: list[int], sizes: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compile_model(model, torch.device("cpu"))
    plain = {size: model[1](model[0](torch.ones(size, 3))) for size in (4, 2)}
    with full_batches_only(True) as step:
        for size in sizes:
            with step(size == 4, ()):
                assert torch.allclose(model(torch.ones(size, 3)), plain[size])
        model.eval()
        model(torch.ones(5, 3))
    assert compiled == [4]
    model(torch.ones(6, 3))  # the stance is the default again: a new shape is compiled
    assert compiled == [4, 6]


def test_each_size_of_images_is_compiled_once(compiled: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    compile_model(model, torch.device("cpu"))
    with full_batches_only(True) as step:
        for length in (4, 4, 6, 5, 6, 4):
            with step(length != 5, (length,)):  # a full batch of its size, but for 5
                model(torch.ones(length, 3))
    assert compiled == [4, 6]


def test_one_run_after_another_is_compiled(compiled: list[int]) -> None:
    sizes = list(range(4, 4 + torch._dynamo.config.recompile_limit + 2))
    for size in sizes:  # PyTorch compiles so many shapes of one function, and says in a warning that it has stopped
        model = nn.Sequential(nn.Linear(3, 3))
        with full_batches_only(True) as step:
            compile_model(model, torch.device("cpu"))
            with step(True, ()):
                model(torch.ones(size, 3))
    assert compiled == sizes


def depth(count: int, **changes: float) -> MaskedAutoencoder:
    return vit(depth=count - 1, decoder_depth=1, **changes)


@pytest.mark.parametrize(
    ("model", "by_block", "count"),
    [
        (depth(MAX_WHOLE), False, 1),
        (depth(MAX_WHOLE + 1), False, MAX_WHOLE + 1),
        (depth(3), True, 3),
        (depth(MAX_WHOLE + 1, drop_path=0.1), False, MAX_WHOLE + 1),
        (mlp(), True, 1),
    ],
    ids=["few blocks", "many blocks", "between blocks", "rates that differ", "no blocks"],
)
def test_a_deep_model_is_compiled_block_by_block(model: MaskedAutoencoder, by_block: bool, count: int) -> None:
    found = parts(model, by_block)
    assert len(found) == count
    assert (found == [model]) is (count == 1)


def test_blocks_of_different_drop_rates_share_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    monkeypatch.setattr(compilation, "check_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: codes.append(1) or graph))
    model = vit(depth=5, drop_path=0.4).train()
    with full_batches_only(True) as step, step(True, ()):
        compile_model(model, torch.device("cpu"), by_block=True)
        for block in model.encoder.blocks:
            block(torch.ones(2, 3, 16))
    assert len(codes) == 2  # one for rate 0, one for all the others


# torch hides this one, but not from a filter that makes errors of warnings.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@pytest.fixture
def without_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled to graphs, forward and backward, as ever, and these run by PyTorch."""
    monkeypatch.setattr(compilation, "check_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))


@pytest.mark.usefixtures("without_machine_code")
def test_the_budget_saves_memory_and_changes_nothing() -> None:
    def kept(budget: float | None) -> tuple[int, Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = vit(depth=2)
        images, noise = torch.randn(4, 1, 8, 8), torch.rand(4, Masker(model.encoder, "random").noise_count)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with full_batches_only(budget is not None) as step, step(True, ()):
            if budget is not None:
                compile_model(model, torch.device("cpu"), budget=budget)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(images, Masker(model.encoder, "random", 0.5).from_noise(noise)).loss
            loss.backward()
        held = {parameter.data_ptr() for parameter in model.parameters()}
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return sum(size for at, size in sizes.items() if at not in held), loss, gradients

    _, loss, gradients = kept(None)
    sizes = []
    for budget in (1.0, 0.4):
        size, compiled_loss, compiled_gradients = kept(budget)
        sizes.append(size)
        assert torch.allclose(compiled_loss, loss, rtol=1e-5)
        for name, value in gradients.items():
            assert torch.allclose(compiled_gradients[name], value, rtol=1e-4, atol=1e-6), name
    assert sizes[0] > 1.3 * sizes[1]


@pytest.mark.usefixtures("without_machine_code")
def test_a_compiled_run_is_the_same_run_and_leaves_a_plain_model(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        model = vit(depth=2)
        budget = {"compile": True, "activation_memory_budget": 0.5} if compiled else {}
        config = PretrainConfig(epochs=3, batch_size=4, log_every=1, optim=OptimConfig(lr=1e-3), **budget)
        _, tracker = train(config, model, images(10), tmp_path / str(compiled))
        results.append([line["loss"] for line in tracker.of("train")])
        assert not any("forward" in vars(module) for module in model.modules())
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert functorch.activation_memory_budget == 1.0


@pytest.mark.skipif(not all(map(shutil.which, ("g++", "cc"))), reason="compiles for the processor")
def test_the_loss_of_a_single_target_keeps_its_gradient() -> None:
    model = mlp().train()
    masker = Masker(model.encoder, "elements", 0.5)
    mask = masker.from_noise(torch.rand(4, masker.noise_count))
    wanted = model(torch.ones(4, 1, 8, 8), mask)
    with full_batches_only(True) as step, step(True, ()):
        compile_model(model, torch.device("cpu"))
        output = model(torch.ones(4, 1, 8, 8), mask)
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    gradients = [torch.autograd.grad(found.loss, model.parameters()) for found in (output, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_budget_without_compilation() -> None:
    with pytest.raises(ConfigError, match=r"activation_memory_budget is 0\.5, and only a compiled model"):
        PretrainConfig(activation_memory_budget=0.5)
    with pytest.raises(ConfigError, match="activation_memory_budget"):
        PretrainConfig(activation_memory_budget=1.5, compile=True)


def test_nothing_is_compiled_unless_asked() -> None:
    with full_batches_only(False) as step, step(True, ()):
        pass
