"""What the ranks of the tests do: top-level functions, for they run in processes of their own."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group import TRAINING

sys.path.insert(0, str(TRAINING))
from small import Images, Memory, images, mlp, vit

from torchmae.building import pretrain_settings
from torchmae.config import MaskConfig, OptimConfig, PretrainConfig
from torchmae.data.loader import Batch, Plan
from torchmae.errors import Interrupted, TrainingError
from torchmae.evaluation import knn, linear
from torchmae.evaluation.bench import draws_of
from torchmae.evaluation.scores import Labelled
from torchmae.evaluation.sharing import Parts, share
from torchmae.settings import read_words
from torchmae.training import checkpoint, ranks
from torchmae.training.checkpoint import load_checkpoint
from torchmae.training.parallel import local, place, whole, whole_state
from torchmae.training.pretrain import pretrain
from torchmae.training.progress import Display
from torchmae.training.ranks import Ranks, open_ranks
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.trainer import Evaluator

MODELS = {
    "vit": lambda: vit(depth=2),
    "mlp": mlp,
    "cross": lambda: vit(depth=2, decoder="cross", predict_ratio=0.5, feature_weights=True, hog_weight=0.5),
    "dropped": lambda: vit(depth=2, drop_path=0.5),
    "gaps": lambda: vit(depth=2, norm_pix=True, hog_weight=0.5),
}
# 27 images in batches of 8: an epoch is 8, 8, 8, 3; four ranks leave one without an image in its last step.
COUNT = 27
CONFIG = PretrainConfig(epochs=4, batch_size=8, log_every=1, optim=OptimConfig(lr=3e-3), device="cpu")


def settings(changes: dict[str, Any]) -> PretrainConfig:
    """CONFIG with changes; a name for the optimiser or the mask stands for its group."""
    groups = {"optim": lambda value: replace(CONFIG.optim, **value), "mask": lambda value: MaskConfig(**value)}
    return replace(CONFIG, **{name: groups.get(name, lambda value: value)(value) for name, value in changes.items()})


def train(
    out: str,
    changes: dict[str, Any],
    model: str = "vit",
    stop: tuple[int, int, str] | None = None,
    spoilt: bool = False,
) -> dict[str, Any]:
    """A run, from its newest checkpoint on; rank stop[0] gets the signal stop[2] in step stop[1].

    With `spoilt`, images are not numbers in three steps in a row, so that it is rolled back.

    Returns:
        losses by step, gradient norms, the sum of each weight's absolute values, and the step at the end.
    """
    config = settings(changes)
    network = MODELS[model]()
    tracker, folder = Memory(), RunFolder(Path(out))
    folder.path.mkdir(exist_ok=True)
    with open_ranks("cpu") as ranks:
        runtime = Runtime(torch.device("cpu"), "fp32" if config.precision == "auto" else config.precision, 1, ranks)
        place(network, config.parallel, runtime)

        @torch.no_grad()
        def disturb(step: int) -> dict[str, float]:
            network.encode(torch.zeros(1, 1, 8, 8))  # as evaluations do: a forward pass that no backward pass follows
            if stop is not None and (ranks.rank, step) == stop[:2]:
                signal.raise_signal(signal.Signals[stop[2]])
            return {}

        try:
            state = pretrain(
                pretrain_settings(config, network),
                model=network,
                batch_size=config.batch_size,
                epochs=config.epochs,
                loader=Spoilt() if spoilt else Gaps() if model == "gaps" else images(COUNT),  # type: ignore[arg-type]
                fingerprint="abc",
                runtime=runtime,
                folder=folder,
                tracker=tracker,
                display=Display("none"),
                evaluators=[Evaluator(16, disturb)],
                checkpoint=load_checkpoint(folder.checkpoints),
            )
            reached = state.step
        except Interrupted as error:
            reached = int(str(error).split(" after step ")[1].split()[0])
        return {
            "losses": [line["loss"] for line in tracker.of("train")],
            "norms": [line["grad_norm"] for line in tracker.of("train")],
            "update": [line["update_to_weight"] for line in tracker.of("train")],
            "weights": {name: whole(value).double().abs().sum().item() for name, value in network.state_dict().items()},
            "step": reached,
        }


class Spoilt(Images):
    """Steps 6 to 8 have images that are no numbers, the first time they come."""

    def __init__(self) -> None:
        super().__init__(images(COUNT).images)
        self.left = 3

    def train_batches(self, plan: Plan, start: int, stop: int, **ranks: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().train_batches(plan, start, stop, **ranks), start):
            spoilt = step >= 5 and self.left > 0
            self.left -= spoilt
            yield replace(batch, images=batch.images * (math.nan if spoilt else 1))


class Gaps(Images):
    """Images without data in one column of patches, and in some more pixels of each second one."""

    def __init__(self) -> None:
        super().__init__(images(COUNT).images)
        self.valid = torch.ones_like(self.images, dtype=torch.bool)
        for i, valid in enumerate(self.valid):
            valid[..., 2 * (i % 3) : 2 * (i % 3) + 2] = False
            valid[:, 1 :: 2 + i % 5] &= i % 2 == 0
        self.images[~self.valid] = 0

    def train_batches(self, plan: Plan, start: int, stop: int, **ranks: int) -> Iterator[Batch]:
        for batch in super().train_batches(plan, start, stop, **ranks):
            yield replace(batch, valid=self.valid[batch.indices])


def cut() -> list[Any]:
    """Of a model in shards: this rank's share of its values, whether they are the model's, what `whole_state` has."""
    model = vit(depth=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with open_ranks("cpu") as ranks:
        place(model, "fsdp", Runtime(torch.device("cpu"), "bf16", 1, ranks))
        share = sum(local(value).numel() for value in model.parameters()) / sum(map(torch.numel, model.parameters()))
        kept = all(torch.equal(whole(value), before[name]) for name, value in model.state_dict().items())
        model.load_state_dict({name: value + 1 for name, value in before.items()})  # whole weights, as others have them
        found = whole_state(model)
        return [share, kept, len(found), all(torch.equal(found[name], before[name] + 1) for name in found)]


def command(*words: str) -> int:
    """The command line."""
    from torchmae import runs
    from torchmae.cli import main

    runs.write_pictures = lambda *_: []  # as in the tests' own process
    return main(list(words))


def command_by_own_clock(*words: str) -> list[Any]:
    """The command line on machines whose clocks run at different speeds; the weights that it ended with."""
    import types

    from torchmae import runs
    from torchmae.training import window

    speed = 1 + int(os.environ["RANK"]) / 5
    window.time = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() * speed)  # type: ignore[assignment]
    trained: list[Any] = []
    runs.whole_state, original = lambda model: trained.append(original(model)) or trained[0], runs.whole_state  # type: ignore[func-returns-value]
    status = command(*words)
    return [status, {name: value.double().sum().item() for name, value in trained[0].items()}]


def embed_in_blocks(*words: str) -> int:
    """The command line, with blocks of 100 images, so that there are enough for all."""
    from torchmae.evaluation import embedding

    embedding.embed.__kwdefaults__["block_images"] = 100
    return command(*words)


def of_one_job(*words: str) -> int:
    """The command line in a job of torchrun, each time for the first time: machines that join count no failure."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "a-job", "TORCHELASTIC_MAX_RESTARTS": "1"}
    return command(*words)


def identify() -> list[Any]:
    """What ranks tell each other."""
    with open_ranks("cpu") as ranks:
        largest = ranks.all_reduce_max(float(ranks.rank), -float(ranks.rank))
        total = ranks.sum(torch.tensor([1.0, ranks.rank])).tolist()
        said = ranks.on_main(lambda: os.environ["RANK"])
        rows = torch.full((ranks.rank, 2), float(ranks.rank), dtype=torch.float16)
        both = [ranks.gather(ranks.rank), ranks.gather_rows(rows).tolist(), list(ranks.share(7))]
        return [[ranks.rank, ranks.is_main, largest, total, said, *both], probe(ranks)]


def probe(ranks: Ranks) -> dict[str, Any]:
    """What kNN, linear probes and draws say where each rank has a part of the training images."""
    generator = torch.Generator().manual_seed(0)
    labels, groups = torch.arange(203) % 4, torch.arange(203) // 5
    features = torch.randn(203, 12, generator=generator) + 0.8 * torch.eye(12)[labels]
    queries = torch.randn(50, 12, generator=generator) + 0.8 * torch.eye(12)[torch.arange(50) % 4]
    test = Labelled(queries, torch.arange(50) % 4)
    said = {}
    for count in (203, 2):  # more and fewer images than ranks
        mine = slice(ranks.share(count).start, ranks.share(count).stop)
        train, parts = Labelled(features[mine], labels[mine]), Parts(groups[mine], ranks)
        found = knn.classify(train, test, 4, parts)
        found["linear"] = linear.classify(train, test, 4, parts, c=1.0)
        said |= {f"{name} of {count}": ranking.tolist() for name, ranking in found.items()}
        if count == 203:
            said["c"] = linear.choose_c(train, 4, parts)
            drawn = draws_of(train, 3, 2, 0, parts)
            said["drawn"] = [(few.features[:, 0].tolist(), some.all_groups().tolist()) for few, some in drawn]
    return said


def take_long() -> list[int]:
    """Of work that takes one rank longer than ranks wait for one that gives no sign of life: what came of it."""
    ranks.BEAT = 0.1
    with open_ranks("cpu", 2 / 60) as group:

        def work(slow: int) -> int:
            time.sleep(2.5 if group.rank == slow else 0)
            return group.rank

        return [group.on_main(lambda: work(0)), group.together(lambda: work(1))]


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

    looked, original = [], api.recommend
    api.recommend = lambda *args: looked.append(1) or original(*args)  # type: ignore[func-returns-value]
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
    try:
        with open_ranks("cpu", seconds / 60):
            return ""
    except TrainingError as error:
        return str(error)
