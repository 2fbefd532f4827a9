"""Starts functions on several ranks of this machine, as torchrun does, over gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TRAINING = Path(__file__).resolve().parents[1] / "training"  # whose small parts serve here too


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def enter(
    function: Callable[..., Any], rank: int, world_size: int, port: int, log: Path, args: tuple[Any, ...]
) -> None:
    """What each process does: the environment that torchrun gives, then the function, with its answer as JSON."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    try:
        log.with_suffix(".json").write_text(json.dumps(function(*args)))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(world_size: int, function: Callable[..., Any], *args: Any, logs: Path) -> list[BaseProcess]:
    """Starts `function(*args)` on every rank; what each prints goes to `logs`/RANK.log."""
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = [
        context.Process(target=enter, args=(function, rank, world_size, port, logs / f"{rank}.log", args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run(world_size: int, function: Callable[..., Any], *args: Any, logs: Path) -> list[Any]:
    """`start`, and every rank's answer; what went wrong is in the error."""
    processes = start(world_size, function, *args, logs=logs)
    for process in processes:
        process.join()
    said = "\n".join(path.read_text() for path in sorted(logs.glob("*.log")))
    assert [process.exitcode for process in processes] == [0] * world_size, said
    return [json.loads((logs / f"{rank}.json").read_text()) for rank in range(world_size)]
