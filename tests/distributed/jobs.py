"""What the ranks of the tests do: top-level functions, for they run in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group import TRAINING

sys.path.insert(0, str(TRAINING))
from small import Memory, images, mlp, vit

from torchmae.config import MaskConfig, OptimConfig, PretrainConfig
from torchmae.errors import Interrupted, TrainingError
from torchmae.evaluation.sharing import share
from torchmae.settings import read_words
from torchmae.training import checkpoint, ranks
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.parallel import whole_state
from torchmae.training.pretrain import pretrain
from torchmae.training.progress import Display
from torchmae.training.ranks import open_ranks
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.trainer import Evaluator

# 27 images in batches of 8: an epoch is 8, 8, 8, 3; four ranks leave one without an image in its last step.
COUNT = 27
CONFIG = PretrainConfig(epochs=4, batch_size=8, log_every=1, optim=OptimConfig(lr=3e-3), device="cpu")


def settings(changes: dict[str, Any]) -> PretrainConfig:
    """CONFIG with changes; a name for the optimiser or the mask stands for its group."""
    groups = {"optim": lambda value: replace(CONFIG.optim, **value), "mask": lambda value: MaskConfig(**value)}
    return replace(CONFIG, **{name: groups.get(name, lambda value: value)(value) for name, value in changes.items()})


def train(
    out: str, changes: dict[str, Any], model: str = "vit", stop: tuple[int, int, str] | None = None
) -> dict[str, Any]:
    """A run, from its newest checkpoint on; rank stop[0] gets the signal stop[2] in step stop[1].

    Returns:
        losses by step, gradient norms, the sum of each weight's absolute values, and the step at the end.
    """
    config = settings(changes)
    network = mlp() if model == "mlp" else vit(depth=2)
    tracker, folder = Memory(), RunFolder(Path(out))
    folder.path.mkdir(exist_ok=True)
    with open_ranks("cpu") as ranks:

        @torch.no_grad()
        def disturb(step: int) -> dict[str, float]:
            network.encode(torch.zeros(1, 1, 8, 8))  # as evaluations do: a forward pass that no backward pass follows
            if stop is not None and (ranks.rank, step) == stop[:2]:
                signal.raise_signal(signal.Signals[stop[2]])
            return {}

        try:
            state = pretrain(
                config,
                model=network,
                loader=images(COUNT),  # type: ignore[arg-type]
                fingerprint="abc",
                runtime=Runtime(torch.device("cpu"), "fp32", 1, ranks),
                folder=folder,
                tracker=tracker,
                display=Display("none"),
                evaluators=[Evaluator(16, disturb)],
                checkpoint=load_checkpoint(folder.checkpoints),
            )
            reached = state.step
        except Interrupted as error:
            reached = int(str(error).split(" after step ")[1].split()[0])
        weights = whole_state(network)
        return {
            "losses": [line["loss"] for line in tracker.of("train")],
            "norms": [line["grad_norm"] for line in tracker.of("train")],
            "update": [line["update_to_weight"] for line in tracker.of("train")],
            "weights": {name: value.double().abs().sum().item() for name, value in weights.items()},
            "step": reached,
        }


def command(*words: str) -> int:
    """The command line."""
    from torchmae.cli import main

    return main(list(words))


def embed_in_blocks(*words: str) -> int:
    """The command line, with blocks of 100 images, so that there are enough for all."""
    from torchmae.evaluation import embedding

    embedding.embed.__kwdefaults__["block_images"] = 100
    return command(*words)


def restarted(*words: str) -> int:
    """The command line in a group that torchrun has started again."""
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}
    return command(*words)


def identify() -> list[Any]:
    """What ranks tell each other."""
    with open_ranks("cpu") as ranks:
        largest = ranks.largest(float(ranks.rank), -float(ranks.rank))
        total = ranks.sum(torch.tensor([1.0, ranks.rank])).tolist()
        said = ranks.on_main(lambda: os.environ["RANK"])
        rows = torch.full((ranks.rank, 2), float(ranks.rank), dtype=torch.float16)
        both = [ranks.gather(ranks.rank), ranks.gather_rows(rows).tolist(), list(ranks.share(7))]
        return [ranks.rank, ranks.is_main, largest, total, said, *both]


def look(counts: list[int], size: int) -> list[Any]:
    """Of each number of images: which batches this rank looks at, and what all have found."""
    found = []
    with open_ranks("cpu") as ranks:
        for count in counts:
            mine = share(np.arange(count) + 100, size, ranks)
            batches = [mine.rows[i : i + size].tolist() for i in range(0, len(mine.rows), size)]
            (rows,) = mine.of_all_images([torch.tensor(batch) for batch in batches])
            found.append([batches, rows.tolist(), mine.of_all_batches([len(batch) for batch in batches])])
    return found


def choose_recipe(*words: str) -> list[Any]:
    """The recipe that was chosen, and how often this rank has looked at the data for it."""
    from torchmae import api

    looked, original = [], api.typical_size
    api.typical_size = lambda *args: looked.append(1) or original(*args)  # type: ignore[func-returns-value]
    return [api.configure(read_words(words, PretrainConfig)).recipe, len(looked)]


def command_of_each(*words: list[str]) -> int:
    """`command` with words of each rank's own."""
    return command(*words[int(os.environ["RANK"])])


def late_listing(*words: str) -> int:
    """`command`, on a machine that is not rank 0's and does not see the newest checkpoint in the listing yet."""
    if os.environ["RANK"] != "0":
        listed = checkpoint._steps
        checkpoint._steps = lambda folder: listed(folder)[:-1]
    return command(*words)


def wait_for_others(seconds: float) -> str:
    """Opens ranks of which one is never started; what is said then."""
    ranks.MEETING = timedelta(seconds=seconds)
    try:
        with ranks.open_ranks("cpu"):
            return ""
    except TrainingError as error:
        return str(error)
