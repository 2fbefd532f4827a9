"""Fine-tuning as a task of the trainer: layer-wise learning rates, augmented batches, averaged weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchmae.config import OptimConfig
from torchmae.config.finetune import FinetuneConfig
from torchmae.data.loader import Batch, ImageLoader, Indices, Plan
from torchmae.errors import CheckpointError, ConfigError, DataError
from torchmae.nn.classifier import Classifier
from torchmae.nn.mae import no_weight_decay
from torchmae.nn.segmenter import Segmenter
from torchmae.training.checkpoint import Checkpoint, load_checkpoint
from torchmae.training.compilation import compile_model
from torchmae.training.parallel import wrap_ddp
from torchmae.training.progress import Display
from torchmae.training.run_folder import RunFolder
from torchmae.training.runtime import Runtime
from torchmae.training.state import State
from torchmae.training.task import Fixes, Inputs, LoopSettings, Task
from torchmae.training.tracking import JsonLines, Trackers
from torchmae.training.trainer import Evaluator, train


@dataclass(frozen=True)
class SubsetPlan(Plan):
    """The order of a training on some of a loader's images: on `rows`, (num_samples,)."""

    rows: Indices = field(kw_only=True, compare=False)

    def indices(self, step: int) -> tuple[int, Indices]:
        """The epoch of a step and the loader's images in its batch."""
        epoch, chosen = super().indices(step)
        return epoch, self.rows[chosen]


def parameter_groups(
    model: Classifier | Segmenter, *, lr: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise learning rates (Clark et al. 2020, ELECTRA), from the lowest layer to the head.

    `lr` is the head's; each layer below has `layer_decay`, in (0, 1], times the rate of the layer above. Each group
    has its "lr" also as "peak_lr". Biases, norms and the class token have no weight decay.
    """
    depth = len(model.blocks)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer, plain = model.layer_of(name), no_weight_decay(name, parameter)
        rate = lr * layer_decay ** (depth + 1 - layer)
        decay = 0.0 if plain else weight_decay
        group = {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay}
        groups.setdefault((layer, plain), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class Learner(nn.Module):
    """A classifier, and the moving average of its weights with decay `ema`; None: no average."""

    def __init__(self, classifier: Classifier | Segmenter, ema: float | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.average: AveragedModel | None = None
        if ema is not None:
            self.average = AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(ema))  # type: ignore[no-untyped-call]

    @property
    def result(self) -> Any:
        """The model to measure and save."""
        return self.classifier if self.average is None else self.average.module


class FinetuneTask(Task):
    """Trains a classifier, on the runtime's device, with augmented images and labels.

    `batch_size` is the number of images of a step on all ranks, which scales the learning rate.
    """

    fixes = Fixes(
        "give the same settings with --resume to go on",
        "go on from it with a smaller step: give the same settings with --resume and a smaller --finetune.base_lr",
        "give the same settings with --resume and --finetune.accumulate {accumulate} (the same steps in less memory), "
        "or start again with --finetune.batch_size {batch_size}",
        "start again with --finetune.batch_size {batch_size}",
    )

    def __init__(
        self,
        config: FinetuneConfig,
        classifier: Classifier | Segmenter,
        augment: Callable[[Tensor, Tensor], Inputs],
        runtime: Runtime,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model: Learner = Learner(classifier, config.ema)
        self.runtime = runtime
        self.names = ("cross_entropy",)
        schedule = OptimConfig(warmup=config.warmup, min_lr=config.min_lr)
        self.loop = LoopSettings(
            seed, config.accumulate, schedule, config.compile, config.checkpoint_minutes, per_epoch=True
        )
        self.config = config
        self._augment = augment
        groups = parameter_groups(
            classifier,
            lr=config.base_lr * batch_size / 256,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        self.optimizers = [AdamW(groups, betas=config.betas, fused=runtime.device.type in ("cpu", "cuda"))]
        if config.compile:
            compile_model(classifier, runtime.device)
        self.forward: nn.Module = wrap_ddp(classifier, runtime, config.accumulate)

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Augmented images, and labels (B,) or class probabilities (B, num_classes)."""
        del step, total
        return self._augment(batch.images, batch.labels) if len(batch.images) else (batch.images, batch.labels)

    def stand_in(self, inputs: Inputs) -> Inputs:
        """As `Task.stand_in`."""
        return tuple(item.new_zeros(1, *item.shape[1:]) for item in inputs)

    def weight(self, inputs: Inputs) -> int:
        """Number of images."""
        return len(inputs[0])

    def losses(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The cross-entropy, to minimise and to log."""
        images, targets = inputs
        with self.runtime.autocast():
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
        return loss, loss.detach()

    def after_step(self) -> None:
        """Updates the average of the weights."""
        if self.model.average is not None:
            self.model.average.update_parameters(self.model.classifier)


MAY_CHANGE = frozenset(
    {"settings", "labels", "reading", "rows", "checkpoint_minutes", "compile", "accumulate", "base_lr"}
)


def check_same(checkpoint: Checkpoint | None, job: dict[str, Any], out: Path) -> None:
    """Checks that a checkpoint is of this job, which has the form of finetune.json.

    Raises:
        CheckpointError: no checkpoint, or one of no fine-tuning.
        ConfigError: other settings.
        DataError: other images or labels.
    """
    if checkpoint is None or not checkpoint.state.get("job"):
        raise CheckpointError(f"{out} holds no fine-tuning to go on with", "start one in a new folder")
    before = checkpoint.state["job"]
    for name, what in (("data", "images"), ("labels", "labels")):
        if job[name] != before.get(name, job[name]):
            raise DataError(f"the training {what} have changed since the checkpoint", f"bring the same {what} back")
    for name, what in (("reading", "the images are read in another way"), ("rows", "other images are drawn")):
        if job.get(name) != before.get(name, job.get(name)):
            raise ConfigError(f"{what} than before the checkpoint", "give the same data options again")
    old, new = ({**item, **item["settings"]} for item in (before, job))
    for name, value in new.items():
        if old.get(name) != value and name not in MAY_CHANGE:
            raise ConfigError(
                f"{name} is {value} and was {old.get(name)} in {out}", "resume with the settings it began with"
            )


@contextmanager
def trained_in(
    out: Path,
    task: FinetuneTask,
    loader: ImageLoader,
    plan: Plan,
    job: dict[str, Any],
    display: Display,
    *,
    resume: bool,
    evaluators: Sequence[Evaluator] = (),
) -> Iterator[tuple[State, Trackers, RunFolder]]:
    """Trains in the folder `out`, which stays locked in the context; yields the last state, the tracker, the folder.

    `job` says what is trained, with "data"; only the same one can `resume`.
    """
    ranks, folder = task.runtime.ranks, RunFolder(out)
    job = json.loads(json.dumps(job))  # with lists for tuples, as files have it
    checkpoint = load_checkpoint(folder.checkpoints, display.warn, ranks) if resume else None
    if resume:
        check_same(checkpoint, job, out)
    ranks.on_main(lambda: begin(folder, job, checkpoint))
    steps = task.config.epochs * plan.steps_per_epoch
    with closing(folder), Trackers(JsonLines(folder.metrics)) if ranks.is_main else Trackers() as tracker:
        state = train(
            task,
            State(0, steps, precision=task.runtime.precision, data=job["data"], job=job),
            loader=loader,
            plan=plan,
            folder=folder,
            tracker=tracker,
            display=display,
            evaluators=evaluators,
            checkpoint=checkpoint,
        )
        yield state, tracker, folder


def begin(folder: RunFolder, job: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Makes the folder of a new training, or cuts off figures after the checkpoint of a resumed one; locks it."""
    if checkpoint is None:
        RunFolder.create(folder.path)
    folder.lock()
    if checkpoint is not None:
        folder.rewind_metrics(checkpoint.state["step"])
    if checkpoint is None or checkpoint.state["job"] != job:
        folder.write_json("finetune.json", job)
