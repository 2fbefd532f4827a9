from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small import RUNTIME, Images, images, train, vit
from torch import Tensor

from torchmae.building import pretrain_settings
from torchmae.config import ModelConfig, OptimConfig, PretrainConfig, RefineConfig
from torchmae.data.loader import Batch, Plan
from torchmae.errors import CheckpointError, Interrupted, TrainingError
from torchmae.nn.mae import MaskedAutoencoder
from torchmae.nn.masking import Masker
from torchmae.training import compilation, pretrain, pretrain_task, trainer, window
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.optim import build_optimizers, lr_factor, set_lr
from torchmae.training.pretrain_task import PretrainTask
from torchmae.training.progress import Display
from torchmae.training.ranks import Ranks, one_line_when_lost
from torchmae.training.refine import RefineTask
from torchmae.training.runtime import Runtime
from torchmae.training.state import State, input_range, restore
from torchmae.training.trainer import Evaluator, out_of_memory, train_step
from torchmae.training.window import Step

# 10 images in batches of 4: an epoch is 4, 4, 2.
CONFIG = PretrainConfig(epochs=3, batch_size=4, log_every=2, optim=OptimConfig(lr=1e-3))


def test_each_target_has_its_own_loss_and_the_first_is_the_one_that_validation_measures(tmp_path: Path) -> None:
    model, loader = vit(hog_weight=3.0), images(8)
    masker = Masker(model.encoder)
    with torch.no_grad():
        output = model.train()(loader.images, masker(0, 0, np.arange(8)))
        alone = model.eval()(loader.images, masker(0, 0, np.arange(8))).loss
    config = replace(CONFIG, batch_size=8, epochs=1, log_every=1, accumulate=2, seed=0)
    _, tracker = train(config, model, loader, tmp_path)
    (step,), (epoch,) = tracker.of("train"), tracker.of("epoch")
    assert step["loss"] == epoch["loss"] == pytest.approx(alone.item(), rel=1e-5)
    assert step["loss_hog"] == pytest.approx(output.losses[1].item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(step["loss"] + 3 * step["loss_hog"], rel=1e-5)


def test_the_loop_is_the_plain_one(tmp_path: Path) -> None:
    model, loader = vit(), images(10)
    state, tracker = train(replace(CONFIG, log_every=1), model, loader, tmp_path)

    plain, plan = vit(), Plan(10, 4, 0)
    (optimizer,) = build_optimizers(plain, CONFIG.optim, 4)
    losses = []
    for batch in loader.train_batches(plan, 0, 9):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor(len(losses), 9, CONFIG.optim)
        loss = plain(
            batch.images,
            Masker(plain.encoder, **asdict(CONFIG.mask))(0, batch.epoch, batch.indices, torch.device("cpu")),
        ).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (state.step, state.total_steps) == (9, 9)
    assert [record["loss"] for record in tracker.of("train")] == losses
    assert [record["lr"] for record in tracker.of("train")] == [1e-3 * lr_factor(i, 9, CONFIG.optim) for i in range(9)]
    assert [record["epoch"] for record in tracker.of("train")] == [(i + 1) / 3 for i in range(9)]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    epochs = tracker.of("epoch")
    assert [(record["step"], record["epoch"]) for record in epochs] == [(3, 1), (6, 2), (9, 3)]
    assert [record["loss"] for record in epochs] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert losses[-1] < losses[0]


def test_a_line_of_progress_is_the_mean_since_the_last(tmp_path: Path) -> None:
    _, every = train(replace(CONFIG, log_every=1), vit(), images(10), tmp_path / "a")
    _, some = train(replace(CONFIG, log_every=4), vit(), images(10), tmp_path / "b")
    losses = [record["loss"] for record in every.of("train")]
    lines = some.of("train")
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9]  # every fourth step, and where an epoch ends
    ends = [0, *(line["step"] for line in lines)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(ends)]
    assert [line["loss"] for line in lines] == pytest.approx(means)
    assert [line["step"] for line in lines if "grad_norm" in line] == [4, 8]
    assert {"epoch", "loss", "lr", "images_per_s", "data_wait", "seconds"} < set(lines[0])


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [
        (10, 1, [10]),
        (10, 2, [5, 10]),
        (10, 3, [4, 7, 10]),
        (9, 4, [3, 5, 7, 9]),
        (2, 4, [1, 2]),
        (1, 1, [1]),
        (5, 0, []),
    ],
)
def test_when_an_evaluator_is_due(total: int, count: int, steps: list[int]) -> None:
    assert Evaluator(count, lambda _: {}).due(total, 3) == set(steps)


def test_evaluators_run_when_due_and_in_order(tmp_path: Path) -> None:
    seen: list[tuple[str, int, bool]] = []
    model = vit()

    def evaluator(name: str, figures: dict[str, float]) -> Callable[[int], dict[str, float]]:
        def run(step: int) -> dict[str, float]:
            seen.append((name, step, model.training))
            model.eval()
            return figures

        return run

    evaluators = [
        Evaluator(3, evaluator("loss", {"loss": 0.5})),
        Evaluator(2, evaluator("knn", {"knn": 70.0})),
        Evaluator(9, evaluator("pictures", {})),
    ]
    _, tracker = train(CONFIG, model, images(10), tmp_path, evaluators=evaluators)
    assert [step for name, step, _ in seen if name == "loss"] == [3, 6, 9]
    assert [step for name, step, _ in seen if name == "knn"] == [5, 9]
    assert [step for name, step, _ in seen if name == "pictures"] == list(range(1, 10))
    assert tracker.of("val") == [
        {"kind": "val", "step": 3, "epoch": 1.0, "loss": 0.5},
        {"kind": "val", "step": 5, "epoch": 5 / 3, "knn": 70.0},
        {"kind": "val", "step": 6, "epoch": 2.0, "loss": 0.5},
        {"kind": "val", "step": 9, "epoch": 3.0, "loss": 0.5, "knn": 70.0},
    ]
    firsts = {step: training for name, step, training in reversed(seen)}
    assert all(firsts.values())  # back in training mode after each evaluation
    assert model.training


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pretrain, "time", made)
    monkeypatch.setattr(trainer, "time", made)
    monkeypatch.setattr(window, "time", made)
    return made


class Slow(Images):
    """Each batch takes a second to come."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(images(10).images)
        self.clock = clock

    def train_batches(self, plan: Plan, start: int, stop: int, **ranks: int) -> Iterator[Batch]:
        for batch in super().train_batches(plan, start, stop, **ranks):
            self.clock.now += 1
            yield batch


def test_seconds_are_those_of_training(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*args: Any, **kwargs: Any) -> Step:
        clock.now += 3
        return train_step(*args, **kwargs)

    def slow_save(*args: Any) -> None:
        clock.now += 50
        save(*args)

    def evaluate(_: int) -> dict[str, float]:
        clock.now += 100
        return {"loss": 1.0}

    save = trainer.save
    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer, "save", slow_save)
    config = replace(CONFIG, checkpoint_minutes=4.5)
    state, tracker = train(config, vit(), Slow(clock), tmp_path, evaluators=[Evaluator(4, evaluate)])
    assert state.seconds == 9 * 4
    assert [line["seconds"] for line in tracker.of("train")] == [4 * line["step"] for line in tracker.of("train")]
    assert {line["data_wait"] for line in tracker.of("train")} == {0.25}
    assert tracker.of("train")[0]["images_per_s"] == 8 / 8
    assert clock.now == 1000 + 9 * 4 + 4 * 100 + 3 * 50  # saved at the start and after steps 7 and 9


def test_checkpoints_come_by_the_clock(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(trainer, "save", lambda folder, task, state: saved.append(state.step))

    def evaluate(_: int) -> dict[str, float]:
        clock.now += 30
        return {}

    train(replace(CONFIG, checkpoint_minutes=1), vit(), Slow(clock), tmp_path, evaluators=[Evaluator(9, evaluate)])
    assert saved == [0, 2, 4, 6, 8, 9]  # 31 seconds a step, and always after the last


class Recording(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("none")
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def test_minutes_become_steps(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probing = []

    def step(task: PretrainTask, *args: Any) -> Step:
        # The first steps are slow, as those of a cold machine are; they do not count.
        probing.append(all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))
        clock.now += 5.0 if len(probing) <= 5 else 0.25
        return train_step(task, *args)

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(pretrain, "train_step", step)
    config = replace(CONFIG, max_minutes=0.1, log_every=100)
    display = Recording()
    state, _ = train(config, model, images(10), tmp_path, display=display)
    assert state.total_steps == 6 / 0.25
    assert probing == [True] * 16 + [False] * 23  # the first step of the run begins with the same weights
    assert display.said[:1] == ["250 ms a step: 24 steps in 0.1 minutes"]
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_second_stage_takes_the_minutes_that_are_left(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[PretrainTask] = []
    stages_of = pretrain.stages_of

    def step(task: PretrainTask, *args: Any) -> Step:
        steps.append(task)
        slower = 1 if len(steps) <= 30 else 1.2  # than when the speed was measured
        clock.now += slower * (1.0 if isinstance(task, RefineTask) else 0.25)
        return train_step(task, *args)

    for module in (trainer, pretrain):
        monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(pretrain, "stages_of", lambda settings, _: stages_of(settings, None))
    config = replace(CONFIG, max_minutes=0.2, log_every=1, refine=RefineConfig(share=0.5))
    display = Recording()
    state, tracker = train(config, vit(), images(10), tmp_path, display=display)
    assert [line.split(":")[1].strip() for line in display.said[:2]] == [
        "24 steps in 0.1 minutes",
        "6 steps that refine in 0.1 minutes",
    ]
    # Not 6 steps: 4.8 seconds were left.
    assert (state.first_steps, state.total_steps, state.second_step) == (24, 24 + 4, 4.0)
    assert state.seconds == pytest.approx(24 * 0.3 + 4 * 1.2)
    assert len(tracker.of("train")) == 28


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_a_run_ends_on_time_when_the_machine_changes_its_speed(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    measured: list[int] = []

    def step(task: PretrainTask, *args: Any) -> Step:
        clock.now += 0.25 * (factor if training and clock.now - training[0] > 15 else 1)
        return train_step(task, *args)

    training: list[float] = []
    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(pretrain, "train_step", step)
    monkeypatch.setattr(trainer, "set_lr", lambda *args: (training or training.append(clock.now)) and set_lr(*args))
    config = replace(CONFIG, max_minutes=1.0, log_every=2)
    evaluator = Evaluator(4, lambda step: measured.append(step) or {})  # type: ignore[func-returns-value]
    state, tracker = train(config, vit(), images(10), tmp_path, evaluators=[evaluator])
    assert state.seconds == pytest.approx(60, abs=0.25 * factor * config.log_every)
    assert state.step == state.total_steps == pytest.approx(60 + 45 / 0.25 / factor, abs=2)
    assert len(measured) == 4
    assert sorted(set(measured)) == measured
    assert measured[-1] == state.total_steps
    assert [line["lr"] for line in tracker.of("train")][-1] < 0.01 * max(line["lr"] for line in tracker.of("train"))


def test_measuring_takes_a_share_of_the_time_and_changes_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def step(*args: Any, **kwargs: Any) -> Step:
        calls.append(1)
        clock.now += 1.0
        return train_step(*args, **kwargs)

    monkeypatch.setattr(pretrain, "train_step", step)
    seconds = pretrain.measure_speed(
        pretrain_settings(CONFIG, model), model, images(10), Plan(10, 4, 0), RUNTIME, at_least=21
    )  # type: ignore[arg-type]
    assert (seconds, len(calls)) == (1.0, 5 + 21)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch hides it, but not from this filter
@pytest.mark.parametrize(("start_size", "count"), [(None, 1), (4, 2)])
def test_measuring_compiles_full_batches_only(
    monkeypatch: pytest.MonkeyPatch, start_size: int | None, count: int
) -> None:
    graphs = []
    monkeypatch.setattr(compilation, "check_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(1) or graph))
    config = replace(CONFIG, compile=True, start_size=start_size)
    loader = images(10)  # every third batch has 2 images
    pretrain.measure_speed(pretrain_settings(config, vit()), vit(), loader, Plan(10, 4, 0), RUNTIME, at_least=0)  # type: ignore[arg-type]
    assert len(graphs) == count
    torch.compiler.reset()


def test_accumulation_reaches_the_last_partial_batch(tmp_path: Path) -> None:
    losses = []
    for parts in (1, 3):
        config = replace(CONFIG, accumulate=parts, log_every=1)
        _, tracker = train(config, vit(), images(10), tmp_path / str(parts))
        losses.append([line["loss"] for line in tracker.of("train")])
    assert len(losses[0]) == 9
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def finite(folder: Path) -> bool:
    """Whether every number in every checkpoint is finite."""
    numbers: list[Tensor] = []
    for path in (folder / "checkpoints").iterdir():
        numbers += load_file(path / "model.safetensors").values()
        for optimizer in torch.load(path / "optimizer.pt", weights_only=True):
            numbers += (value for values in optimizer["state"].values() for value in values.values())
    return all(torch.isfinite(value).all() for value in numbers)


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_a_step_without_a_finite_loss_is_left_out(tmp_path: Path, log_every: int) -> None:
    loader, whole = images(10), images(10)
    spoilt = int(Plan(10, 4, 0).indices(4)[1][0])
    loader.images[spoilt] = torch.nan
    bad = [i + 1 for i in range(9) if spoilt in Plan(10, 4, 0).indices(i)[1]]
    model, display = vit(), Recording()
    config = replace(CONFIG, log_every=log_every)
    state, tracker = train(config, model, loader, tmp_path, display=display)
    assert (state.step, state.lr_scale) == (9, 1.0)
    assert display.warned == [f"step {step} skipped: the loss is nan and the gradient's norm nan" for step in bad]
    assert sum(line.get("skipped", 0) for line in tracker.of("train")) == 3
    assert all(math.isfinite(line["loss"]) for line in tracker.of("epoch"))
    assert finite(tmp_path)

    plain, plan = vit(), Plan(10, 4, 0)  # a run that never saw those batches
    task = PretrainTask(pretrain_settings(CONFIG, plain), plain, RUNTIME, 4)
    for step, batch in enumerate(whole.train_batches(plan, 0, 9)):
        if step + 1 not in bad:
            set_lr(task.optimizers, lr_factor(step, 9, CONFIG.optim))
            mask = Masker(plain.encoder, **asdict(CONFIG.mask))(0, batch.epoch, batch.indices, torch.device("cpu"))
            train_step(task, (batch.images, mask))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


class Poisoned(Images):
    """From a step on, each of its batches is not a number as often as it is told."""

    def __init__(self, first: int, times: int) -> None:
        super().__init__(images(10).images)
        self.first, self.times = first, times

    def train_batches(self, plan: Plan, start: int, stop: int, **ranks: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().train_batches(plan, start, stop, **ranks), start):
            spoilt = step >= self.first and self.times > 0
            self.times -= spoilt
            yield replace(batch, images=batch.images * (math.nan if spoilt else 1))


def test_steps_in_a_row_send_back_to_the_checkpoint_at_half_the_rate(tmp_path: Path) -> None:
    display = Recording()
    config = replace(CONFIG, log_every=1)
    state, tracker = train(config, vit(), Poisoned(4, 3), tmp_path, display=display)
    assert display.warned[-1] == (
        "3 steps in a row, by step 7, have no finite loss or gradient: back to the checkpoint of step 0, "
        "from there at 0.5 times the learning rate"
    )
    assert (state.step, state.lr_scale) == (9, 0.5)
    again = tracker.of("train")[7:]
    assert [line["step"] for line in again] == list(range(1, 10))
    assert [line["lr"] for line in again] == [1e-3 * lr_factor(i, 9, CONFIG.optim) / 2 for i in range(9)]
    epochs = tracker.of("epoch")[-3:]
    assert [line["loss"] for line in epochs] == pytest.approx(
        [sum(line["loss"] for line in again[i : i + 3]) / 3 for i in (0, 3, 6)]
    )
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["lr_scale"] == 0.5


def test_steps_in_a_row_count_wherever_they_lie(tmp_path: Path) -> None:
    display = Recording()
    state, _ = train(replace(CONFIG, log_every=9), vit(), Poisoned(1, 3), tmp_path, display=display)
    assert display.warned[-1].startswith("3 steps in a row, by step ")
    assert (state.step, state.lr_scale) == (9, 0.5)


def test_a_run_that_never_mends_ends(tmp_path: Path) -> None:
    display = Recording()
    with pytest.raises(TrainingError) as caught:
        train(replace(CONFIG, max_skipped=2), vit(), Poisoned(2, 10**6), tmp_path, display=display)
    said = str(caught.value)
    assert said.startswith("2 steps in a row, by step 4, have no finite loss or gradient; ")
    assert said.endswith(
        f"; go on from it with a smaller step: torchmae pretrain --resume {tmp_path} --optim.lr LR "
        "(or --optim.clip_grad 1, or --precision fp32)"
    )
    assert 0 < said.index("input values are not finite") < said.index("--optim.lr")
    assert caught.value.exit_status == 1
    assert [line.split(", from there")[1] for line in display.warned if "back to" in line] == [
        f" at {scale:g} times the learning rate" for scale in (0.5, 0.25, 0.125)
    ]
    assert finite(tmp_path)


@pytest.mark.parametrize(
    ("error", "accumulate", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "resume with --accumulate 2 (the same steps in less memory)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "resume with --accumulate 4"),
        (torch.AcceleratorError("CUDA error: out of memory"), 1, "resume with --accumulate 2"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1, "resume with"),
        (MemoryError(), 4, "resume with --checkpoint_activations true, or choose a smaller model"),
    ],
)
def test_memory_that_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, accumulate: int, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(TrainingError) as caught:
        train(replace(CONFIG, accumulate=accumulate), vit(), images(10), tmp_path)
    said = str(caught.value)
    assert said.startswith(f"out of memory on cpu: 4 images a step in parts of {-(-4 // accumulate)}; {advice}")
    assert said.endswith("or start again with --batch_size 2")
    assert load_checkpoint(tmp_path / "checkpoints") is not None


def test_memory_that_runs_out_names_the_batch_that_was_computed() -> None:
    task = PretrainTask(pretrain_settings(replace(CONFIG, batch_size=4096), vit()), vit(), RUNTIME, 10)
    with pytest.raises(TrainingError) as caught, out_of_memory(task, 10):
        raise MemoryError
    said = str(caught.value)
    assert said.startswith("out of memory on cpu: 10 images a step in parts of 10; resume with --accumulate 2 ")
    assert said.endswith("or start again with --batch_size 5")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([-9999.0, 2.0], ["from -1e+04 to 2 after", "far from 0"]),
        ([math.nan, -1.0, 2.0], ["1 input values are not finite", "from -1 to 2 after"]),
        ([math.inf], ["1 input values are not finite"]),
    ],
)
def test_the_range_of_inputs_in_words(values: list[float], named: list[str]) -> None:
    said = input_range(torch.tensor(values))
    assert all(words in said for words in named)
    assert ("far from 0" in said) == ("far from 0" in named)


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, torch.AcceleratorError, dist.DistBackendError])
def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RuntimeError]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("a fault of ours")

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(kind, match="a fault of ours"):
        train(CONFIG, vit(), images(10), tmp_path)


def test_another_rank_that_is_gone_is_no_lack_of_memory() -> None:
    with (
        pytest.raises(TrainingError, match="^rank 0 lost another"),
        one_line_when_lost(Ranks(0, 2, 0, 2), "resume"),
        out_of_memory(PretrainTask(pretrain_settings(CONFIG, vit()), vit(), RUNTIME, 4), 4),
    ):
        raise dist.DistBackendError("NCCL error: remote process exited or there was a network error")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_activations_computed_twice_change_nothing(tmp_path: Path, accumulate: int) -> None:
    results = []
    for again in (False, True):
        model = vit(depth=2, drop_path=0.3)
        config = replace(CONFIG, accumulate=accumulate, checkpoint_activations=again, model=ModelConfig(drop_path=0.3))
        train(config, model, images(10), tmp_path / str(again))
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert list(results[0]) == list(results[1])


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, where: str) -> None:
    model = vit()
    held: list[torch.optim.Optimizer] = []

    def spoil(_: int) -> dict[str, float]:
        with torch.no_grad():
            if where == "weights":
                model.get_parameter("decoder.mask_token")[..., 0] = torch.inf
            else:
                next(iter(held[0].state.values()))["exp_avg_sq"][0] = torch.inf
        return {}

    with pytest.MonkeyPatch.context() as patch:
        build = build_optimizers
        patch.setattr(pretrain_task, "build_optimizers", lambda *args: held.extend(build(*args)) or held)
        with pytest.raises(TrainingError, match=r"^the weights are not finite after step 9; the last good"):
            train(CONFIG, model, images(10), tmp_path, evaluators=[Evaluator(1, spoil)])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert finite(tmp_path)


def interrupted_and_resumed(
    config: PretrainConfig, make: Callable[[], MaskedAutoencoder], out: Path
) -> MaskedAutoencoder:
    """A run that is stopped after each third of its steps and goes on with a new model each time."""
    loader = images(10)
    for _ in range(3):
        checkpoint = load_checkpoint(out / "checkpoints")
        evaluators = [Evaluator(3, lambda _: signal.raise_signal(signal.SIGTERM) or {})]
        model = make()
        with pytest.raises(Interrupted) if checkpoint is None or checkpoint.state["step"] < 6 else nullcontext():
            train(config, model, loader, out, evaluators=evaluators, checkpoint=checkpoint)
    return model


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, accumulate=2, optim=OptimConfig(name="muon", clip_grad=0.1)),
        replace(CONFIG, model=ModelConfig(drop_path=0.5)),
        replace(CONFIG, batch_size=16, epochs=9),
    ],
    ids=["adamw", "muon", "drop_path", "one step an epoch"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, config: PretrainConfig) -> None:
    def make() -> MaskedAutoencoder:
        return vit(drop_path=config.model.drop_path, depth=2)

    whole = make()
    state, _ = train(config, whole, images(10), tmp_path / "a")
    resumed = interrupted_and_resumed(config, make, tmp_path / "b")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    checkpoints = [load_checkpoint(tmp_path / name / "checkpoints") for name in "ab"]
    assert checkpoints[0] is not None
    assert checkpoints[1] is not None
    assert {**checkpoints[0].state, "seconds": 0} == {**checkpoints[1].state, "seconds": 0}
    assert asdict(state)["epoch_loss"] == 0.0


def test_drop_path_draws_by_the_step(tmp_path: Path) -> None:
    plain, dropped = vit(depth=2), vit(depth=2, drop_path=0.9)
    train(CONFIG, plain, images(10), tmp_path / "a")
    train(replace(CONFIG, model=ModelConfig(drop_path=0.9)), dropped, images(10), tmp_path / "b")
    assert not torch.equal(*(model.get_parameter("encoder.blocks.1.mlp.fc1.weight") for model in (plain, dropped)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_evaluation_is_saved_too(tmp_path: Path, number: signal.Signals) -> None:
    evaluators = [Evaluator(2, lambda _: signal.raise_signal(number) or {"loss": 1.0})]
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        train(CONFIG, vit(), images(10), tmp_path / "my run", evaluators=evaluators)
    assert str(caught.value) == (
        f"stopped by {number.name} after step 5 of 9, all saved; "
        f"go on with: torchmae pretrain --resume '{tmp_path}/my run'"
    )
    assert caught.value.exit_status == 128 + number
    checkpoint = load_checkpoint(tmp_path / "my run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_in_the_last_step_finishes(tmp_path: Path) -> None:
    evaluators = [Evaluator(1, lambda _: signal.raise_signal(signal.SIGINT) or {})]
    state, _ = train(CONFIG, vit(), images(10), tmp_path, evaluators=evaluators)
    assert state.step == 9


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    # A shell that starts this in the background has SIGINT ignored; what comes back after the first is Python's own.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)

    def twice(_: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    try:
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, vit(), images(10), tmp_path, evaluators=[Evaluator(2, twice)])
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_run_that_was_done_is_done(tmp_path: Path) -> None:
    model = vit()
    train(CONFIG, model, images(10), tmp_path)
    again = vit()
    state, tracker = train(CONFIG, again, images(10), tmp_path, checkpoint=load_checkpoint(tmp_path / "checkpoints"))
    assert (state.step, tracker.records) == (9, [])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_resumed_run_keeps_its_steps_and_takes_new_rates(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(CONFIG, vit(), images(10), tmp_path, evaluators=[Evaluator(3, lambda _: signal.raise_signal(2) or {})])
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    config = replace(CONFIG, max_minutes=1.0, epochs=50, log_every=1, optim=OptimConfig(lr=1e-4))
    runtime = Runtime(torch.device("cpu"), "bf16", 1)
    state, tracker = train(config, vit(), images(10), tmp_path, checkpoint=checkpoint, runtime=runtime)
    assert (state.step, state.total_steps, state.precision) == (9, 9, "bf16")
    assert [line["lr"] for line in tracker.of("train")] == [1e-4 * lr_factor(i, 9, config.optim) for i in range(3, 9)]
    saved = json.loads((tmp_path / "checkpoints" / "step-00000009" / "state.json").read_text())
    assert saved == asdict(state)
    assert saved["data"] == "abc"


def test_a_checkpoint_from_a_device_whose_optimiser_works_otherwise(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(CONFIG, vit(), images(10), tmp_path, evaluators=[Evaluator(3, lambda _: signal.raise_signal(2) or {})])
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    for group in checkpoint.optimizers[0]["param_groups"]:
        group.update(fused=False, peak_lr=5.0)
    model = vit()
    (optimizer,) = build_optimizers(model, CONFIG.optim, 4)
    restore(checkpoint, model, [optimizer], "fp32")
    assert [(group["fused"], group["peak_lr"]) for group in optimizer.param_groups] == [(True, 1e-3)] * 2
    whole, _ = train(CONFIG, vit(), images(10), tmp_path, checkpoint=checkpoint)
    assert whole.step == 9


def test_the_rate_is_for_the_images_that_there_are(tmp_path: Path) -> None:
    config = replace(CONFIG, batch_size=256, epochs=2, log_every=1, optim=OptimConfig(base_lr=1e-3, warmup=0.0))
    _, tracker = train(config, vit(), images(16), tmp_path)
    assert tracker.of("train")[0]["lr"] == pytest.approx(1e-3 * 16 / 256)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    train(CONFIG, vit(), images(10), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    with pytest.raises(CheckpointError) as caught:
        restore(checkpoint, vit(decoder_depth=2), build_optimizers(vit(), CONFIG.optim, 4), "fp32")
    assert str(caught.value) == (
        f"{checkpoint.path} does not fit the model: decoder.blocks.1.norm1.weight is missing in the checkpoint and "
        "(16,) in the model, and 11 more differ; resume with the run's own settings"
    )
    for model, optim in ((vit(embed_dim=32), CONFIG.optim), (vit(), OptimConfig(name="muon"))):
        with pytest.raises(
            CheckpointError, match=r"^\S+step-00000009 does not fit the model: .*own settings$"
        ) as caught:
            restore(checkpoint, model, build_optimizers(model, optim, 4), "fp32")
        assert "\n" not in str(caught.value)
    strange = replace(checkpoint, state={"step": 3})
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(strange, vit(), build_optimizers(vit(), CONFIG.optim, 4), "fp32")


def test_state_is_what_a_checkpoint_holds() -> None:
    state = State(3, 9, 1.5, 0.25, "fp32", "abc")
    assert State(**json.loads(json.dumps(asdict(state)))) == state
    two = replace(state, first_steps=5, second_step=3.0)
    assert (state.remaining, two.remaining, replace(two, step=6, stage=1).remaining) == (6, 2 + 4 * 3, 3)
