"""`torchmae pretrain` as torchrun starts it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from group import run, start
from jobs import (
    choose_recipe,
    command,
    command_by_own_clock,
    command_of_each,
    embed_in_blocks,
    late_listing,
    of_one_job,
)
from PIL import Image
from safetensors.torch import load_file

from torchmae import files
from torchmae.errors import CheckpointError
from torchmae.evaluation.embedding import read_features
from torchmae.report.run import load_run
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.ranks import Ranks
from torchmae.training.saved_model import load_model

OPTIONS = (
    *("pretrain", "--recipe=digits", "--device=cpu", "--precision=fp32", "--epochs=3", "--batch=160", "--log-every=5"),
    *("--progress=plain", "--optim.name=adamw", "--model.depth=1", "--model.embed_dim=16", "--model.decoder_depth=1"),
    *("--model.decoder_embed_dim=16", "--eval.count=2", "--eval.images=20", "--eval.knn_train=100"),
    *("--eval.knn_val=50", "--checkpoint-minutes=1000"),
)
STEPS = 3 * 9  # 1437 images in batches of 160


def metrics(out: Path, kind: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank."""
    place = tmp_path_factory.mktemp("alone")
    assert run(1, command, *OPTIONS, "--out", str(place / "run"), logs=place) == [0]
    return place / "run"


def equal(out: Path, alone: Path) -> None:
    for kind, names in (("epoch", ("loss",)), ("val", ("loss", "explained_variance")), ("train", ("loss", "lr"))):
        ours, theirs = metrics(out, kind), metrics(alone, kind)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for name in names:
            assert [line.get(name) for line in ours] == pytest.approx([line.get(name) for line in theirs], rel=1e-4)
    # Before the first step the weights are the same bits, and so are the figures, whichever rank saw which image.
    (ours,), (theirs,) = metrics(out, "baseline"), metrics(alone, "baseline")
    assert {**ours, "time": 0} == {**theirs, "time": 0}
    assert {"knn_untrained", "linear_untrained", "knn_pixels", "linear_pixels"} <= ours.keys()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_make_one_run(alone: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    logs = tmp_path / "logs"
    assert run(2, command, *OPTIONS, "--out", str(out), f"--parallel={kind}", "--json", logs=logs) == [0, 0]
    equal(out, alone)
    model, _ = load_model(out)
    assert model.state_dict().keys() == load_file(alone / "model.safetensors").keys()
    assert (logs / "1.log").read_text() == ""  # one speaks
    figures = json.loads((logs / "0.log").read_text().splitlines()[-1])
    assert (figures["state"], figures["steps"]) == ("finished", STEPS)
    assert f"2 ranks ({kind})" in (logs / "0.log").read_text()
    names = {item.name for item in (out / "checkpoints" / f"step-{STEPS:08d}").iterdir()}
    assert ("shards" in names) == (kind == "fsdp")
    # One process goes on with what two wrote: there is nothing left to do, and the same bits come out of it.
    before = (out / "model.safetensors").read_bytes()
    assert run(1, command, "pretrain", "--resume", str(out), logs=tmp_path / "logs-resumed") == [0]
    assert (out / "model.safetensors").read_bytes() == before


def test_two_ranks_refine_together(tmp_path: Path) -> None:
    words = [*OPTIONS, "--data.val=none", "--refine.share=0.5", "--log-every=1", "--rank-timeout=1"]
    for length in ("--epochs=1", "--max-minutes=0.1"):
        out = tmp_path / length
        (one, weights), (other, others) = run(
            2, command_by_own_clock, *words, length, "--out", str(out), logs=tmp_path / "logs"
        )
        assert (one, other) == (0, 0)
        assert weights == others  # both went through the same steps at the same rates
        losses = [line["loss_contrast"] for line in metrics(out, "train") if "loss_contrast" in line]
        assert len(losses) == 4 if length == "--epochs=1" else len(losses) > 4
        assert np.isfinite(losses).all()


def test_a_killed_rank_ends_the_others_and_the_group_goes_on(alone: Path, tmp_path: Path) -> None:
    """As `torchrun --max-restarts --rdzv-id` does: all are started again with the same words."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    words = (*OPTIONS, "--out", str(out), "--checkpoint-minutes=0")
    processes = start(2, of_one_job, *words, logs=logs)
    while not (out / "checkpoints" / "step-00000004").exists():
        processes[0].join(0.01)
        assert processes[0].exitcode is None, (logs / "0.log").read_text()
    processes[1].kill()
    for process in processes:
        process.join()
    assert processes[1].exitcode == -signal.SIGKILL
    said = (logs / "0.log").read_text()
    assert "torchmae: rank 0 lost another (" in said
    assert "Traceback" not in said
    checkpoint = load_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert 4 <= checkpoint.state["step"] < STEPS
    assert run(2, of_one_job, *words, logs=tmp_path / "logs-again") == [0, 0]
    losses = [[line["loss"] for line in metrics(path, "epoch")] for path in (out, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_rank_looks_at_the_data(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((30, 32, 32, 3), dtype=np.uint8))
    answers = run(2, choose_recipe, "--data", str(tmp_path / "images.npy"), "--device", "cpu", logs=tmp_path)
    assert answers == [["cifar10-cpu", 1], ["cifar10-cpu", 0]]


def test_volumes_are_opened_alike_by_all_ranks(tmp_path: Path) -> None:
    np.save(tmp_path / "volumes.npy", np.random.default_rng(0).random((12, 16, 24, 24), dtype=np.float32))
    model = ("--model.input_size=[4, 8, 8]", "--model.patch_size=4", "--data.num_workers=0", "--epochs=1", "--batch=4")
    words = (*OPTIONS, "--data", str(tmp_path / "volumes.npy"), *model, "--out", str(tmp_path / "run"))
    assert run(2, command, *words, logs=tmp_path / "logs") == [0, 0]


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / "run" / name).write_text("")
    processes = start(2, command, *OPTIONS, "--out", str(tmp_path / "run"), logs=tmp_path / "logs")
    for process in processes:
        process.join()
    assert json.loads((tmp_path / "logs" / "0.json").read_text()) == 2
    assert processes[1].exitcode == 2
    said = [(tmp_path / "logs" / f"{rank}.log").read_text() for rank in range(2)]
    assert said[0].startswith(f"torchmae: {tmp_path}/run holds a run already; resume it with --resume ")
    assert said[1] == ""


def test_ranks_that_see_other_data_end_the_run_in_one_line(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    for name in ("ours", "theirs"):
        np.save(tmp_path / f"{name}.npy", images if name == "ours" else 255 - images)
    begin = [*OPTIONS, "--data.num_workers=0", "--out", str(tmp_path / "run")]
    for i, (words, told) in enumerate(
        [
            (
                [[*begin, "--data", str(tmp_path / f"{name}.npy")] for name in ("ours", "theirs")],
                "rank 1 sees other training images than rank 0; give all machines the same files",
            ),
            (
                [[*begin, "--data", str(tmp_path / name)] for name in ("ours.npy", "gone.npy")],
                "rank 1: no such file or folder: .*gone.npy",
            ),
        ]
    ):
        logs = tmp_path / f"logs-{i}"
        processes = start(2, command_of_each, *words, logs=logs)
        for process in processes:
            process.join(120)
        assert json.loads((logs / "0.json").read_text()) == 2
        assert processes[1].exitcode == 2
        assert re.search(f"torchmae: {told}", (logs / "0.log").read_text())
        assert "torchmae: " not in (logs / "1.log").read_text()


def test_rank_0_says_which_checkpoint_is_resumed(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(alone, tmp_path / "run")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) > 1
    assert run(2, late_listing, "pretrain", "--resume", str(tmp_path / "run"), logs=tmp_path / "logs") == [0, 0]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr(files, "LATE", 0.1)
    monkeypatch.setattr(Ranks, "on_main", lambda self, action: "step-00000099")
    monkeypatch.setattr(Ranks, "together", lambda self, action: action())
    with pytest.raises(CheckpointError, match="step-00000099: it does not show up here; let all machines see one"):
        load_checkpoint(tmp_path / "run" / "checkpoints", ranks=Ranks(1, 2))


def test_ranks_embed_together(alone: Path, tmp_path: Path) -> None:
    words = ("embed", str(alone), "--device=cpu", "--precision=fp32", "--progress=plain", "--batch=50")
    assert run(1, embed_in_blocks, *words, "--out", str(tmp_path / "one.npz"), logs=tmp_path / "logs-one") == [0]
    logs, out = tmp_path / "logs", tmp_path / "several.parquet"
    assert run(3, embed_in_blocks, *words, "--out", str(out), logs=logs) == [0, 0, 0]
    for ours, theirs in zip(read_features(out), read_features(tmp_path / "one.npz"), strict=True):
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs
    assert (logs / "0.log").read_text().splitlines()[-1] == f"{out}  (1,797 x 16 features)"
    assert (logs / "1.log").read_text() == ""
    assert not out.with_name("several.parquet.partial").exists()


def test_a_mistake_of_embedding_is_said_once(tmp_path: Path) -> None:
    processes = start(2, command, "embed", str(tmp_path / "no-run"), "--device=cpu", "--out=f.npz", logs=tmp_path)
    for process in processes:
        process.join()
    assert json.loads((tmp_path / "0.json").read_text()) == 2
    assert processes[1].exitcode == 2
    assert [len((tmp_path / f"{rank}.log").read_text().splitlines()) for rank in range(2)] == [1, 0]


EVALUATE = ("--device=cpu", "--precision=fp32", "--progress=plain", "--train-images=130", "--test-images=70")


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (2, ["--method=all", "--pool=mean", "--attentive.epochs=2", "--batch=32"]),
        (2, ["--method=linear", "--labels-per-class=3", "--draws=2"]),
        (2, ["--method=reconstruction", "--reconstruction.images=300"]),
    ],
    ids=lambda value: str(value),
)
def test_ranks_evaluate_together(alone: Path, tmp_path: Path, world_size: int, words: list[str]) -> None:
    records = []
    for count in (1, world_size):
        folder = tmp_path / f"run-{count}"
        shutil.copytree(alone, folder)
        logs = tmp_path / f"logs-{count}"
        more = [] if "--method=reconstruction" not in words else ["--test-images=300"]
        assert run(count, command, "evaluate", str(folder), *EVALUATE, *words, *more, logs=logs) == [0] * count
        (record,) = load_run(folder).evaluations
        records.append(record)
    assert len(records[0]["results"]) > 0
    for ours, theirs in zip(records[1]["results"], records[0]["results"], strict=True):
        assert (ours["method"], ours["subject"]) == (theirs["method"], theirs["subject"])
        assert ours["figures"] == pytest.approx(theirs["figures"], rel=1e-12)
    assert records[1]["data"] == records[0]["data"]
    assert records[1]["environment"]["ranks"] == world_size
    assert (logs / "1.log").read_text() == ""  # one speaks


def test_ranks_find_anomalies_together(alone: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, low, high in (("normal/a", 0, 60), ("test/good", 0, 60), ("test/crack", 150, 255)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(9):
            picture = random.integers(low, high, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    words = ("--method=anomaly", f"--normal={tmp_path / 'normal'}", f"--test={tmp_path / 'test'}", "--batch=4")
    shared = ("--device=cpu", "--precision=fp32", "--progress=none")
    outs = [tmp_path / "one", tmp_path / "two"]
    for count, out in enumerate(outs, 1):
        words_of = ("evaluate", str(alone), *words, *shared, f"--out={out}")
        assert run(count, command, *words_of, logs=tmp_path / f"logs-{count}") == [0] * count
    tables = [list(csv.reader((out / "anomaly_scores.csv").read_text().splitlines())) for out in outs]
    assert len(tables[0]) == 19
    for ours, theirs in zip(*tables, strict=True):
        assert ours == theirs  # with the masks of one rank
    assert (outs[1] / "pictures" / "anomaly.png").read_bytes() == (outs[0] / "pictures" / "anomaly.png").read_bytes()


@pytest.mark.parametrize("finetune", ["false", "true"])
def test_ranks_segment_together(alone: Path, tmp_path: Path, finetune: str) -> None:
    random = np.random.default_rng(0)
    for i in range(7):
        ids = np.kron(random.integers(0, 2, (2, 3)), np.ones((7, 6), int)).astype(np.uint8)
        for kind, values in (("images", ids * 150 + 40), ("masks", ids)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "data" / kind / f"{i}.png")
    words = ("--method=segmentation", f"--data={tmp_path / 'data'}", "--batch=4", "--segmentation.epochs=3")
    tuned = (f"--segmentation.finetune={finetune}", "--finetune.epochs=2", "--finetune.base_lr=1e-2")
    shared = ("--device=cpu", "--precision=fp32", "--progress=none", "--json")
    figures = []
    for count in (1, 2):
        words_of = ("evaluate", str(alone), *words, *tuned, *shared, f"--out={tmp_path / str(count)}")
        assert run(count, command, *words_of, logs=tmp_path / f"logs-{count}") == [0] * count
        results = load_run(alone).evaluations[-1]["results"]
        figures.append({f"{r['subject']}.{name}": value for r in results for name, value in r["figures"].items()})
    ours, theirs = ({k: v for k, v in found.items() if "seconds" not in k} for found in figures)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert any(name.endswith("_miou") for name in ours)


FINETUNE = (
    *("--method=finetune", "--finetune.epochs=2", "--finetune.batch-size=33", "--finetune.randaugment=0"),
    *("--finetune.mixup=0", "--finetune.cutmix=0", "--finetune.drop-path=0", "--finetune.evaluations=2"),
)


def test_ranks_fine_tune_together(alone: Path, tmp_path: Path) -> None:
    """130 images in batches of 33: the last one of an epoch has 31. Nothing is drawn that depends on the rank."""
    lines = []
    for count in (1, 2):
        out = tmp_path / f"out-{count}"
        words = ("evaluate", str(alone), *EVALUATE, *FINETUNE, "--finetune.accumulate=2", f"--out={out}")
        assert run(count, command, *words, logs=tmp_path / f"logs-{count}") == [0] * count
        lines.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["kind"] == theirs["kind"]
        figures = [{name: line[name] for name in line.keys() - {"kind", "time", "seconds"}} for line in (ours, theirs)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    weights = [load_file(tmp_path / f"out-{count}" / "model.safetensors") for count in (1, 2)]
    for name, value in weights[0].items():
        if not name.endswith("qkv.bias"):  # of which the keys' part has a gradient of rounding alone
            np.testing.assert_allclose(weights[1][name], value, rtol=1e-3, atol=2e-4, err_msg=name)


def test_what_is_for_one_process_says_so(tmp_path: Path) -> None:
    assert run(2, command, "export", str(tmp_path), logs=tmp_path) == [2, 2]
    says = "torchmae: export is for one process, and torchrun has started several; leave out torchrun\n"
    assert [(tmp_path / f"{rank}.log").read_text() for rank in range(2)] == [says, ""]
