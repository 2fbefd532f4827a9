"""One run, on any number of ranks."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from group import enter, free_port, run
from jobs import cut, identify, look, probe, take_long, train, wait_for_others

from torchmae.errors import ConfigError
from torchmae.training.compilation import check_compiler
from torchmae.training.ranks import ALONE, ranks_from_environment

REL = 1e-4
MUON_REL = 1e-2  # of gradients and weights: it makes matrices orthogonal in bf16, which turns rounding into more of it


def same(one: dict[str, Any], other: dict[str, Any], rel: float = REL) -> None:
    """Whether two runs tell the same: losses, gradient norms, updates, weights."""
    assert one["step"] == other["step"]
    assert one["losses"] == pytest.approx(other["losses"], rel=REL)
    for name in ("norms", "update"):
        assert one[name] == pytest.approx(other[name], rel=rel), name
    assert known(one) == pytest.approx(known(other), rel=rel)


def skip_without_compiler() -> None:
    try:
        check_compiler()
    except ConfigError as error:
        pytest.skip(str(error))


def known(run: dict[str, Any]) -> dict[str, float]:
    """The weights that a gradient moves: softmax does not see the bias of keys, whose gradient is rounding alone, and
    Adam makes steps of it all the same."""
    return {name: value for name, value in run["weights"].items() if not name.endswith("kv.bias")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run on one rank."""
    place = tmp_path_factory.mktemp("alone")
    (answer,) = run(1, train, str(place / "run"), {}, logs=place)
    return dict(answer)


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    answers, probed = zip(*run(3, identify, logs=tmp_path), strict=True)
    alone = probe(ALONE)
    assert len(np.unique(alone["knn10 of 203"])) == 4
    for found in probed:  # each had a part of the training images, and all say what one rank says
        assert found == json.loads(json.dumps(alone))
    rows, shares = [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]], ([0, 1], [2, 3], [4, 5, 6])
    assert list(answers) == [
        [rank, rank == 0, [2.0, 0.0], [3.0, 3.0], "0", [0, 1, 2], rows, shares[rank]] for rank in range(3)
    ]


def test_a_rank_that_lives_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    assert run(2, take_long, logs=tmp_path) == [[0, 0], [0, 1]]


def test_ranks_that_never_meet_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    context = multiprocessing.get_context("forkserver")
    words = [(wait_for_others, rank, 2, free_port(), tmp_path / f"{rank}.log", (3.0,)) for rank in range(2)]
    processes = [context.Process(target=enter, args=args) for args in words]
    for process in processes:
        process.start()
    for rank, told in ((0, "rank 0 of 2 waited .* for the others at 127.0.0.1"), (1, "rank 1 of 2 waited")):
        processes[rank].join(60)
        assert re.match(told, json.loads((tmp_path / f"{rank}.json").read_text()))


def test_an_environment_of_several_ranks_names_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks_from_environment() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is '2' and LOCAL_RANK is 'not set'; start ranks with torchrun"):
        ranks_from_environment()


def test_images_are_divided_in_the_batches_of_one_rank(tmp_path: Path) -> None:
    counts, size = [1, 3, 5, 9, 10, 12, 13], 3
    answers = run(3, look, counts, size, logs=tmp_path)
    for i, count in enumerate(counts):
        rows = list(range(100, 100 + count))
        batches = [rows[j : j + size] for j in range(0, count, size)]
        looked_at = [answer[i][0] for answer in answers]
        # As many passes on every rank, stand-ins of one image where there is no other batch left.
        assert {len(mine) for mine in looked_at} == {-(-len(batches) // 3)}
        assert [batch for mine in looked_at for batch in mine if batch in batches and batch != [100]] == [
            batch for batch in batches if batch != [100]
        ]
        assert all(batch in batches or batch == [100] for mine in looked_at for batch in mine)
        for answer in answers:
            assert answer[i][1:] == [rows, [len(batch) for batch in batches]]


@pytest.mark.parametrize(
    ("world_size", "changes", "model"),
    [
        (4, {"start_size": 4}, "vit"),
        (2, {"accumulate": 3, "optim": {"clip_grad": 0.1, "name": "muon"}}, "vit"),
        (2, {"accumulate": 2, "parallel": "fsdp"}, "cross"),
        (2, {}, "cross"),
        (2, {"accumulate": 2}, "gaps"),
        (4, {"parallel": "fsdp"}, "gaps"),
        (2, {"parallel": "fsdp", "accumulate": 2, "optim": {"clip_grad": 0.1}, "checkpoint_activations": True}, "vit"),
        (2, {"parallel": "fsdp", "compile": True, "activation_memory_budget": 0.5}, "vit"),
        (3, {"mask": {"strategy": "elements"}}, "mlp"),
    ],
    ids=lambda value: str(value),
)
def test_the_same_run_on_any_number_of_ranks(
    tmp_path: Path, world_size: int, changes: dict[str, Any], model: str
) -> None:
    if "compile" in changes:
        skip_without_compiler()
    (alone,) = run(1, train, str(tmp_path / "alone"), changes, model, logs=tmp_path / "logs-1")
    answers = run(world_size, train, str(tmp_path / "out"), changes, model, logs=tmp_path / "logs")
    assert len(alone["losses"]) == alone["step"] == 16
    for answer in answers:
        same(answer, alone, MUON_REL if changes.get("optim", {}).get("name") == "muon" else REL)


def test_a_model_in_shards_is_whole_nowhere_but_on_rank_0(tmp_path: Path) -> None:
    (one, kept, names, loaded), (other, *rest) = run(2, cut, logs=tmp_path)
    assert 0.4 < one <= other + one <= 1.01
    assert (kept, names > 0, loaded) == (True, True, True)
    assert rest == [True, 0, True]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_go_back_to_a_checkpoint_together(tmp_path: Path, kind: str) -> None:
    """With drop-path, which each rank draws for its images; and in bf16, the precision of most runs on GPUs."""
    changes = {"parallel": kind, "precision": "bf16"}
    answers = run(2, train, str(tmp_path / "out"), changes, "dropped", None, True, logs=tmp_path / "logs")
    assert answers[0] == answers[1]
    assert answers[0]["step"] == 16
    assert len(answers[0]["losses"]) == 8 + 16
    assert [not loss > 0 for loss in answers[0]["losses"][:9]] == [False] * 5 + [True] * 3 + [False]


@pytest.mark.parametrize("kinds", [("ddp", "ddp", "fsdp"), ("fsdp", "fsdp", "ddp")])
def test_stopped_and_gone_on_with_another_number_of_ranks(
    alone: dict[str, Any], tmp_path: Path, kinds: tuple[str, str, str]
) -> None:
    parts = []
    # A signal to one rank alone stops all of them at the same step.
    stops = ((1, 5, "SIGTERM"), (3, 11, "SIGINT"), None)
    sizes = (2, 4, 1 if kinds[2] == "ddp" else 2)
    for number, (world_size, kind, stop) in enumerate(zip(sizes, kinds, stops, strict=True)):
        changes = {"parallel": kind}
        logs = tmp_path / f"logs-{number}"
        answers = run(world_size, train, str(tmp_path / "out"), changes, "vit", stop, logs=logs)
        assert {answer["step"] for answer in answers} == {stop[1] if stop else 16}
        parts.append(answers[0])
    for name in ("losses", "norms"):
        assert [value for part in parts for value in part[name]] == pytest.approx(alone[name], rel=REL)
    assert known(parts[-1]) == pytest.approx(known(alone), rel=REL)


def test_gradients_exchanged_in_bf16_are_near(alone: dict[str, Any], tmp_path: Path) -> None:
    answers = run(2, train, str(tmp_path / "out"), {"compress_gradients": True}, logs=tmp_path / "logs")
    assert answers[0]["losses"] == answers[1]["losses"]
    assert answers[0]["losses"] == pytest.approx(alone["losses"], rel=1e-2)
    assert answers[0]["norms"] != pytest.approx(alone["norms"], rel=1e-6)
