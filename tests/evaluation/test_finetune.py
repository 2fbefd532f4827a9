"""Fine-tuning: rates by hand, draws of labels, and runs that repeat, resume, learn and refuse."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchmae import presets
from torchmae.config import DataConfig
from torchmae.config.finetune import PAPER, SMALL, FinetuneConfig
from torchmae.data.opening import Data, open_data
from torchmae.data.transforms import Normalisation
from torchmae.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from torchmae.evaluation import finetune, finetune_training
from torchmae.nn.classifier import ViTClassifier
from torchmae.training import state as state_module
from torchmae.training import trainer
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.progress import Display
from torchmae.training.runtime import Runtime
from torchmae.training.saved_classifier import load_classifier
from torchmae.training.saved_model import Description, write_description

RUNTIME = Runtime(torch.device("cpu"), "fp32", 1)
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
ARGUMENTS = presets.arguments("vit_digits", in_chans=1, decoder_num_heads=2, **TINY)
NORMALISATION = Normalisation((0.5,), (0.25,), (0.0,), (1.0,), {"uint8": 255.0}, "dataset")
# Everything that draws random numbers is on.
CONFIG = FinetuneConfig(
    epochs=3, batch_size=16, base_lr=0.02, randaugment=5, drop_path=0.2, crop_scale=(0.6, 1.0), checkpoint_minutes=0
)


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return presets.construct(ARGUMENTS)


def data_of(folder: Path, images: Any, labels: Any, config: FinetuneConfig = CONFIG, **tests: Any) -> Data:
    path = folder / f"{len(list(folder.glob('*.npz')))}.npz"
    # The same images a little brighter, because the training images themselves are refused.
    tests = {"test_images": images + np.uint8(1), "test_labels": labels, **tests}
    np.savez(path, train_images=images, train_labels=labels, **tests)
    settings = DataConfig(
        source=str(path),
        val="test",
        flip=False,
        crop_scale=config.for_input((8, 8), 1).crop_scale,
        mean=NORMALISATION.mean,
        std=NORMALISATION.std,
    )
    return open_data(settings, input_size=(8, 8), channels=1, device=RUNTIME.device)


def bars(count: int = 45) -> tuple[Any, Any]:
    """Images of three classes: bright above, bright below, or dark; with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = random.integers(0, 100, (count, 8, 8, 1))
    images[labels == 0, :4] += 150
    images[labels == 1, 4:] += 150
    return images.astype(np.uint8), labels


def run(data: Data, out: Path, config: FinetuneConfig = CONFIG, **options: Any) -> dict[str, float]:
    assert data.val is not None
    return finetune.finetune(
        model(seed=99),
        NORMALISATION,
        data.train,
        data.val,
        ("above", "below", "dark"),
        config=config,
        runtime=RUNTIME,
        out=out,
        display=Display("none"),
        **options,
    ).figures


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_classifier(out)[0].state_dict()


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# What stands still: settings, rates, draws.


def test_layers_from_the_bottom_up() -> None:
    names = {"cls_token": 0, "patch_embed.proj.weight": 0, "blocks.0.attn.qkv.bias": 1, "blocks.11.norm1.weight": 12}
    names |= {"fc_norm.weight": 13, "head.bias": 13}
    classifier = ViTClassifier(3, **{**model().encoder.arguments, "depth": 12})
    assert {name: classifier.layer_of(name) for name in names} == names


def test_layerwise_rates_by_hand() -> None:
    classifier = ViTClassifier(3, **model().encoder.arguments)
    groups = finetune_training.parameter_groups(classifier, lr=0.8, layer_decay=0.5, weight_decay=0.05)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in classifier.named_parameters()}
    assert found["head.weight"] == (0.8, 0.05)
    assert found["head.bias"] == (0.8, 0.0)
    assert found["fc_norm.weight"] == (0.8, 0.0)
    assert found["blocks.1.mlp.fc1.weight"] == (0.4, 0.05)
    assert found["blocks.0.mlp.fc1.weight"] == (0.2, 0.05)
    assert found["blocks.0.norm1.weight"] == (0.2, 0.0)
    assert found["patch_embed.proj.weight"] == (0.1, 0.05)
    assert found["cls_token"] == (0.1, 0.0)
    assert all(group["peak_lr"] == group["lr"] for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(list(classifier.parameters()))


def test_the_papers_settings_and_those_of_small_images() -> None:
    assert FinetuneConfig().for_input((224, 224), 3) == PAPER
    assert FinetuneConfig().for_input((65, 32), 1) == PAPER
    assert FinetuneConfig().for_input((64, 32), 3) == SMALL
    assert FinetuneConfig(randaugment=0, batch_size=7).for_input((64, 64), 3) == SMALL._replace(
        randaugment=0, batch_size=7
    )


def test_what_other_input_cannot_have_is_off() -> None:
    assert FinetuneConfig().for_input((224, 224), 5) == PAPER._replace(randaugment=0)
    assert FinetuneConfig().for_input((128,), 3) == PAPER._replace(randaugment=0, mixup=0, cutmix=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "pretraned"}, "finetune.init is 'pretraned'; did you mean 'pretrained'"),
        ({"batch_size": 0}, "finetune.batch_size is 0; it must be 1 or more"),
        ({"layer_decay": 1.5}, r"finetune.layer_decay is 1.5; it must lie in \(0, 1]"),
        ({"betas": (0.9, 1.0)}, r"finetune.betas is 1; it must lie in \[0, 1\)"),
        ({"crop_scale": (0.5, 1.5)}, r"finetune.crop_scale is 1.5; it must lie in \(0, 1]"),
        ({"randaugment": 11}, r"finetune.randaugment is 11; it must lie in \[0, 10]"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**changes)


def test_a_plan_of_a_subset_goes_through_all_of_it() -> None:
    plan = finetune_training.SubsetPlan(4, 3, 0, rows=np.array([3, 5, 7, 9]))
    epochs = [np.concatenate([plan.indices(step)[1] for step in steps]) for steps in ((0, 1), (2, 3))]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [[3, 5, 7, 9]] * 2
    assert plan.steps_per_epoch == 2


def test_accumulation_takes_the_same_step() -> None:
    images, targets = torch.randn(10, 1, 8, 8), torch.arange(10) % 3
    results = []
    for parts in (1, 3):
        torch.manual_seed(0)
        config = replace(CONFIG, accumulate=parts, drop_path=0.0)
        classifier, _ = finetune.start_classifier(model(), 3, config)
        task = finetune_training.FinetuneTask(config, classifier, lambda *pair: pair, RUNTIME, 10, 0)
        losses = [trainer.train_step(task, (images, targets)).loss for _ in range(3)]
        results.append((torch.stack(losses), classifier.blocks[0].attn.qkv.weight))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0][0][2] < results[0][0][0]


# Runs.


def test_it_learns_and_leaves_a_classifier_that_gives_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sizes = data_of(tmp_path, *bars()), []
    original = finetune.predict

    def spied(model: Any, batches: Any, runtime: Runtime) -> Any:
        kept = [*batches]
        sizes.append([len(batch.labels) for batch in kept])
        return original(model, kept, runtime)

    config = replace(CONFIG, epochs=20, mixup=0.0, cutmix=0.0, randaugment=0)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "predict", spied)
        figures = run(data, tmp_path / "out", config, test_batch_size=20)
    assert sizes == [[20, 20, 5]]
    assert figures["finetune"] > 90
    assert figures["finetune_low"] <= figures["finetune"] <= figures["finetune_high"]
    assert figures["finetune_images"] == 45
    loaded, description = load_classifier(tmp_path / "out")
    assert description.normalisation == NORMALISATION
    assert data.val is not None
    rankings, labels = map(torch.cat, finetune.predict(loaded, data.val.eval_batches(np.arange(45), 10), RUNTIME))
    assert 100 * (rankings[:, 0] == labels).sum().item() / 45 == figures["finetune"]
    lines = metrics(tmp_path / "out")
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == list(range(1, 21))
    assert lines[-1]["finetune"] == figures["finetune"]
    assert lines[-2]["loss"] == figures["finetune_loss"] < lines[0]["loss"]


def test_the_same_settings_give_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    data = data_of(tmp_path, *bars())
    figures = [run(data, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert same(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    assert figures[0]["finetune_loss"] != figures[2]["finetune_loss"]


def test_few_labels_are_exact_and_by_seed_and_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = bars()
    data = data_of(tmp_path, images, labels)
    seen: list[set[int]] = []
    original = finetune_training.train

    def train(*args: Any, plan: Any, **options: Any) -> Any:
        seen.append(set(plan.rows.tolist()))
        return original(*args, plan=plan, **options)

    monkeypatch.setattr(finetune_training, "train", train)
    config = replace(CONFIG, epochs=1)
    for i, (seed, draw) in enumerate(((0, 0), (0, 0), (0, 1), (1, 0))):
        figures = run(data, tmp_path / f"{i}", config, labels_per_class=4, seed=seed, draw=draw)
        assert figures["finetune_images"] == 12
    assert [np.bincount(labels[sorted(rows)]).tolist() for rows in seen] == [[4, 4, 4]] * 4
    assert seen[0] == seen[1]
    assert len({frozenset(rows) for rows in seen}) == 3


def test_scratch_and_pretrained_differ_where_they_begin(tmp_path: Path) -> None:
    pretrained = model()
    for init in ("pretrained", "random"):
        torch.manual_seed(3)
        classifier, arguments = finetune.start_classifier(pretrained, 3, replace(CONFIG, init=init))
        own = classifier.blocks[0].attn.qkv.weight
        assert torch.equal(own, pretrained.encoder.blocks[0].attn.qkv.weight) == (init == "pretrained")
        assert arguments["drop_path"] == 0.2
    data = data_of(tmp_path, *bars())
    run(data, tmp_path / "a")
    run(data, tmp_path / "b", replace(CONFIG, init="random"))
    assert not same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("ema", [None, 0.9])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    data = data_of(tmp_path, *bars())
    config = replace(CONFIG, ema=ema, evaluations=3)
    whole = run(data, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        fail_at(patch, 5, KeyError("killed"))
        with pytest.raises(KeyError, match="killed"):
            run(data, tmp_path / "parts", config)
    with pytest.raises(CheckpointError, match="cannot load the classifier"):
        load_classifier(tmp_path / "parts")
    parts = run(data, tmp_path / "parts", config, resume=True)
    assert {**parts, "finetune_seconds": 0} == {**whole, "finetune_seconds": 0}
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert [line["step"] for line in metrics(tmp_path / "parts") if line["kind"] == "val"] == [3, 6, 9]
    again = run(data, tmp_path / "parts", config, resume=True)  # one that has ended is measured once more
    assert again["finetune"] == whole["finetune"]
    assert metrics(tmp_path / "parts")[-1] == metrics(tmp_path / "whole")[-1]


def test_a_signal_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(tmp_path, *bars())
    config = replace(CONFIG, checkpoint_minutes=5)
    run(data, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 9, all saved") as caught:
            run(data, tmp_path / "parts", config)
    assert caught.value.exit_status == 143
    run(data, tmp_path / "parts", config, resume=True)
    assert same(tmp_path / "whole", tmp_path / "parts")


def fail_at(patch: pytest.MonkeyPatch, call: int, what: Exception | signal.Signals) -> None:
    """Makes the call-th training step raise, or send a signal."""
    original, calls = trainer.train_step, count(1)

    def step(*args: Any) -> Any:
        if next(calls) == call:
            if isinstance(what, Exception):
                raise what
            signal.raise_signal(what)
        return original(*args)

    patch.setattr(trainer, "train_step", step)


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    data = data_of(tmp_path, *bars())
    run(data, tmp_path / "plain")
    run(data, tmp_path / "average", replace(CONFIG, ema=0.5))
    run(data, tmp_path / "last", replace(CONFIG, ema=0.0))
    assert not same(tmp_path / "plain", tmp_path / "average")
    assert same(tmp_path / "plain", tmp_path / "last")  # an average with no memory


def poison(patch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Makes the images of some training steps, counted from 1, not finite."""
    original, done = trainer.train_step, count(1)

    def step(task: Any, inputs: Any, *args: Any) -> Any:
        images, targets = inputs
        return original(task, (images * torch.nan if next(done) in calls else images, targets), *args)

    patch.setattr(trainer, "train_step", step)


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(tmp_path, *bars())
    poison(monkeypatch, {2})
    warned: list[str] = []
    monkeypatch.setattr(Display, "warn", lambda _, text: warned.append(text))
    figures = run(data, tmp_path / "out", replace(CONFIG, ema=0.9))
    assert [line.split(":")[0] for line in warned] == ["step 2 skipped"]
    assert np.isfinite(list(figures.values())).all()
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    epochs = [line["loss"] for line in metrics(tmp_path / "out") if line["kind"] == "epoch"]
    assert len(epochs) == 3
    assert 0.8 < epochs[0] < 1.6  # the mean of the images that counted


def test_steps_in_a_row_send_back_to_the_checkpoint_at_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path, *bars())
    with monkeypatch.context() as patch:
        poison(patch, {4, 5, 6})
        run(data, tmp_path / "out", replace(CONFIG, checkpoint_minutes=5))
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.state["step"], checkpoint.state["lr_scale"]) == (9, 0.5)
    assert [line["step"] for line in metrics(tmp_path / "out") if line["kind"] == "epoch"] == [3, 6, 9]


def test_one_that_never_mends_ends_and_its_advice_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path, *bars())
    with monkeypatch.context() as patch:
        poison(patch, set(range(2, 100)))
        with pytest.raises(TrainingError, match=r"--resume and a smaller --finetune\.base_lr"):
            run(data, tmp_path / "out", replace(CONFIG, checkpoint_minutes=5))
    smaller = replace(CONFIG, base_lr=0.005)
    run(data, tmp_path / "out", smaller, resume=True)
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["settings"]["base_lr"] == 0.005
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    peaks = [group["peak_lr"] for group in checkpoint.optimizers[0]["param_groups"]]
    assert max(peaks) == pytest.approx(0.005 * 16 / 256)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_one_that_an_earlier_version_began_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """Its state had other names: no precision, no data, nothing of skipped steps."""
    data = data_of(tmp_path, *bars())
    config = replace(CONFIG, ema=ema)
    run(data, tmp_path / "whole", config)
    save = state_module.save_checkpoint

    def save_as_before(folder: Path, model: Any, optimizers: Any, state: dict[str, Any], ranks: Any) -> None:
        names = ("step", "total_steps", "seconds", "epoch_loss", "loss", "job")
        save(folder, model, optimizers, {name: state[name] for name in names}, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_checkpoint", save_as_before)
        fail_at(patch, 6, KeyError("killed"))
        with pytest.raises(KeyError, match="killed"):
            run(data, tmp_path / "parts", config)
    run(data, tmp_path / "parts", config, resume=True)
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient may overflow where the loss does not."""
    data = data_of(tmp_path, *bars())
    original = trainer.train_step

    def step(task: Any, *args: Any) -> Any:
        done = original(task, *args)
        with torch.no_grad():
            task.model.classifier.head.weight[0, 0] = torch.inf
        return done

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(TrainingError, match="the weights are not finite after step 1; the last good checkpoint was"):
        run(data, tmp_path / "out")
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 0


# What a user can get wrong.


def test_wrong_folders_and_settings_when_resuming(tmp_path: Path) -> None:
    data = data_of(tmp_path, *bars())
    with pytest.raises(CheckpointError, match="holds no fine-tuning to go on with"):
        run(data, tmp_path / "a", resume=True)
    run(data, tmp_path / "a", replace(CONFIG, epochs=1))
    with pytest.raises(ConfigError, match="is not an empty folder"):
        run(data, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"epochs is 3 and was 1 in .*; resume with the settings it began with"):
        run(data, tmp_path / "a", resume=True)
    run(data, tmp_path / "read", replace(CONFIG, epochs=1), reading={"nodata": 0.0})
    with pytest.raises(ConfigError, match="the images are read in another way than before"):
        run(data, tmp_path / "read", replace(CONFIG, epochs=1), reading={"nodata": 1.0}, resume=True)
    few: dict[str, Any] = {"labels_per_class": 2}
    run(data, tmp_path / "few", replace(CONFIG, epochs=1), **few)
    with pytest.raises(ConfigError, match="other images are drawn than before"):
        run(data, tmp_path / "few", replace(CONFIG, epochs=1), **few, groups=torch.arange(45) // 15, resume=True)
    with pytest.raises(ConfigError, match="seed is 1 and was 0 in"):
        run(data, tmp_path / "a", replace(CONFIG, epochs=1), resume=True, seed=1)
    images, labels = bars()
    other = data_of(tmp_path, images + np.uint8(1), labels)
    with pytest.raises(DataError, match="the training images have changed"):
        run(other, tmp_path / "a", replace(CONFIG, epochs=1), resume=True)


def test_mended_labels_and_another_process_stop_a_resumed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = bars()
    config = replace(CONFIG, epochs=1)
    run(data_of(tmp_path, images, labels), tmp_path / "a", config)
    mended = data_of(tmp_path, images, np.where(np.arange(45) < 1, 1, labels))
    data = data_of(tmp_path, images, labels)
    with pytest.raises(DataError, match="the training labels have changed"):
        run(mended, tmp_path / "a", config, resume=True)

    def taken(_: Path) -> None:
        raise BlockingIOError

    monkeypatch.setattr("torchmae.training.run_folder.lock_file", taken)
    with pytest.raises(CheckpointError, match="another process is training in .*; wait for it"):
        run(data, tmp_path / "a", config, resume=True)


def test_the_mlp_model_cannot(tmp_path: Path) -> None:
    mlp = presets.build("mlp", in_chans=1, input_size=(8, 8))
    with pytest.raises(ConfigError, match="no patches to fine-tune on; use a vit model"):
        finetune.start_classifier(mlp, 3, CONFIG)


def test_a_pretrained_model_is_no_classifier(tmp_path: Path) -> None:
    description = Description(ARGUMENTS, (0.5,), (0.25,), {"strategy": "random", "ratio": 0.75}, None, "0")
    write_description(tmp_path / "model.json", description)
    with pytest.raises(CheckpointError, match="holds no classifier; give the folder that fine-tuning wrote"):
        load_classifier(tmp_path)
