"""Runs over several hosts with addresses of their own, and what goes wrong between them.

The hosts are network namespaces, which only root can make: set TORCHMAE_TEST_CLUSTER, as `.ci/run` does where it can.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hosts import HERE, Network, network

from torchmae.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(
    "TORCHMAE_TEST_CLUSTER" not in os.environ,
    reason="hosts of its own, as root with iproute2: set TORCHMAE_TEST_CLUSTER",
)
STEPS = 50  # 77 images in batches of 16, 10 epochs
PATIENCE = 300.0  # seconds, on a machine that has other work to do


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, without a run folder."""
    data = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(data, np.random.default_rng(0).integers(0, 255, (96, 8, 8), dtype=np.uint8))
    return [
        *("pretrain", "--recipe=digits", f"--data={data}", "--device=cpu", "--precision=fp32", "--epochs=10"),
        *("--batch=16", "--log-every=1", "--progress=plain", "--optim.name=adamw", "--model.depth=1"),
        *("--model.embed_dim=16", "--model.decoder_depth=1", "--model.decoder_embed_dim=16", "--eval.count=1"),
        *(
            "--eval.images=10",
            "--eval.knn_count=0",
            "--data.num_workers=0",
            "--checkpoint-minutes=0",
            "--trackers=none",
        ),
    ]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one host."""
    folder = tmp_path_factory.mktemp("alone")
    run_alone([*words, "--out", str(folder / "run")], folder)
    assert sorted(losses(folder / "run")) == list(range(1, STEPS + 1))
    return folder / "run"


def run_alone(words: list[str], folder: Path) -> None:
    environment = {**os.environ, "SLOW_STEPS": str(folder / "no")}
    subprocess.run([sys.executable, str(HERE / "job.py"), *words], check=True, env=environment)


def losses(out: Path) -> dict[int, float]:
    """The loss of every step."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def saved(out: Path) -> int:
    """The step of the newest checkpoint, by its name."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def reaches(out: Path, step: int) -> Callable[[], bool]:
    return lambda: saved(out) >= step


def ended(hosts: Network, *statuses: int, seconds: float = PATIENCE) -> None:
    """Every host has ended with its status, within so many seconds, and has no process left."""
    end = time.monotonic() + seconds
    found = [host.wait(end - time.monotonic()) for host in hosts.hosts]
    assert found == list(statuses), hosts.said()
    assert [host.processes() for host in hosts.hosts] == [[]] * len(statuses)


def ours(said: str) -> list[str]:
    """What torchmae said of errors."""
    return [line for line in said.splitlines() if line.startswith("torchmae: ")]


def plain(hosts: Network, words: list[str]) -> None:
    for host in hosts.hosts:
        host.torchrun(str(len(hosts.hosts)), *words)


def own_names_lead_nowhere(hosts: Network, words: list[str]) -> None:
    """As Debian's installer leaves /etc/hosts."""
    for host in hosts.hosts:
        host.names[host.name] = "127.0.1.1"
        host.torchrun("2", *words, meet_at="host-a")


def no_names(hosts: Network, words: list[str]) -> None:
    for host in hosts.hosts:
        host.names = {}
        first = int(host is hosts.hosts[0])
        host.torchrun("3", *words, options=[f"--local-addr={host.address}", f"--rdzv-conf=is_host={first}"])


@pytest.mark.parametrize(
    ("count", "slow", "begin"),
    [(2, True, plain), (2, False, own_names_lead_nowhere), (3, False, no_names)],
    ids=["slow and lossy", "own names at 127.0.1.1", "no names"],
)
def test_hosts_make_the_run_of_one(
    alone: Path,
    words: list[str],
    tmp_path: Path,
    count: int,
    slow: bool,
    begin: Callable[[Network, list[str]], None],
) -> None:
    with network(count, tmp_path, slow=slow) as hosts:
        begin(hosts, [*words, "--out", str(tmp_path / "run")])
        ended(hosts, *[0] * count)
        assert f"{count} ranks" in hosts.hosts[0].said()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


def test_a_name_that_does_not_resolve(words: list[str], tmp_path: Path) -> None:
    with network(2, tmp_path) as hosts:
        del hosts.hosts[1].names["host-a"]
        plain(hosts, [*words, "--out", str(tmp_path / "run"), "--rank_timeout=0.3"])
        ended(hosts, 1, 1)
        (told,) = ours(hosts.hosts[1].said())
        assert re.search("rank 1 cannot find the address .* 'host-a'; start torchrun .* --local-addr", told)
        (told,) = ours(hosts.hosts[0].said())
        assert re.search(r"rank 0 of 2 waited 0\.[34]\d? minutes for the others at host-a:", told)
    assert not (tmp_path / "run").exists()


def test_a_link_that_is_cut(alone: Path, words: list[str], tmp_path: Path) -> None:
    """For a while, then for good: the run goes on, then ends on both sides, and can be resumed."""
    out = tmp_path / "run"
    with network(2, tmp_path) as hosts:
        hosts.slow_steps.write_text("1")
        plain(hosts, [*words, "--out", str(out), "--rank_timeout=0.25"])
        hosts.wait_for(reaches(out, 3), PATIENCE)
        hosts.plug(hosts.hosts[1], False)
        time.sleep(4)
        before = saved(out)
        hosts.plug(hosts.hosts[1], True)
        hosts.wait_for(reaches(out, before + 2), PATIENCE)
        hosts.plug(hosts.hosts[1], False)
        end = time.monotonic() + 60
        for host in hosts.hosts:
            hosts.wait_for(lambda host=host: bool(ours(host.said())), end - time.monotonic())  # type: ignore[misc]
            (told,) = ours(host.said())
            assert re.search(r"rank \d heard nothing from another for 0.25 minutes .* --rank_timeout; resume", told)
        # torchrun asks its store, on the first host, once more, by itself for a minute.
        assert hosts.hosts[0].wait(60) == 1
        hosts.plug(hosts.hosts[1], True)
        assert hosts.hosts[1].wait(PATIENCE) == 1
        assert [host.processes() for host in hosts.hosts] == [[], []]
    checkpoint = load_checkpoint(out / "checkpoints", pytest.fail)
    assert checkpoint is not None
    assert before < checkpoint.state["step"] < STEPS
    run_alone(["pretrain", "--resume", str(out)], tmp_path)
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)


def test_a_host_vanishes_and_comes_back(
    alone: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even that of rank 0: the run goes on with two hosts, then with three again; everywhere it is the same command."""
    out = tmp_path / "run"
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Soon enough for a test: when torchrun takes a host for lost, and how long it waits for more of them.
    soon = "--rdzv-conf=last_call_timeout=12,keep_alive_interval=1,keep_alive_max_attempt=5"
    options = ["--max-restarts=10", "--rdzv-id=a-job", soon, "--monitor-interval=0.5"]

    def rounds(several: str) -> int:
        return sum(path.read_text().count(several) for path in tmp_path.glob("host-*.log"))

    with network(3, tmp_path) as hosts:
        hosts.slow_steps.write_text("1")
        lost, _, stays = hosts.hosts
        for host in hosts.hosts:
            host.torchrun("2:3", *words, "--out", str(out), options=options, meet_at=stays.address)
        hosts.wait_for(lambda: rounds("3 ranks") == 1 and saved(out) >= 3, PATIENCE)
        assert "3 ranks" in lost.said()
        lost.kill()
        hosts.wait_for(lambda: rounds("2 ranks") == 1, PATIENCE)
        without = saved(out)
        assert without >= 3
        hosts.wait_for(reaches(out, without + 2), PATIENCE)
        hosts.slow_steps.write_text("4")  # long enough for a host to start
        lost.torchrun("2:3", *words, "--out", str(out), options=options, meet_at=stays.address)
        hosts.wait_for(lambda: rounds("3 ranks") == 2, PATIENCE)
        assert without + 2 <= saved(out) < STEPS
        hosts.slow_steps.unlink()
        ended(hosts, 0, 0, 0)
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)


def test_a_host_sees_the_shared_folder_late(alone: Path, tmp_path: Path) -> None:
    out, late = tmp_path / "run", tmp_path / "late"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    (late / "checkpoints").mkdir(parents=True)
    with network(2, tmp_path) as hosts:
        hosts.hosts[1].mounts[out] = late
        plain(hosts, ["pretrain", "--resume", str(out)])
        hosts.wait_for(lambda: len(hosts.hosts[1].processes()) >= 3, PATIENCE)  # unshare, torchrun, the rank
        time.sleep(4)
        shutil.copy(out / "config.yaml", late)
        time.sleep(2)
        name = f"step-{STEPS - 1:08d}"
        shutil.copytree(out / "checkpoints" / name, late / name)
        (late / name).rename(late / "checkpoints" / name)
        ended(hosts, 0, 0)
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
