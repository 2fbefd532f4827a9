"""Segmentation end to end: the encoder with a light decoder, trained on windows by the one training loop.

The folder that it leaves holds finetune.json, metrics.jsonl, checkpoints/ and model.safetensors.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.arrays import ArraySource, hold
from torchmae.data.items import Context
from torchmae.data.loader import Batch, ImageLoader, Plan, View
from torchmae.data.reading import probe
from torchmae.data.transforms import Normalisation
from torchmae.evaluation.bench import Bench, output_folder
from torchmae.evaluation.finetune import check_start
from torchmae.evaluation.finetune_training import FinetuneTask, trained_in
from torchmae.evaluation.images import run_data
from torchmae.evaluation.segmentation_data import IGNORED, SegmentationData
from torchmae.evaluation.segmentation_windows import Segment, targets, training_windows, window_batches
from torchmae.evaluation.subject import Subject
from torchmae.nn.segmenter import Segmenter
from torchmae.training.saved_model import write_weights
from torchmae.training.task import Inputs, seeded, step_seed


class SegmentationTask(FinetuneTask):
    """A segmenter that learns from windows whose last channel are the classes."""

    def inputs(self, batch: Batch, step: int, total: int) -> Inputs:
        """Images (B, C, h, w), and their classes (B, h, w)."""
        del step, total
        return batch.images[:, :-1], targets(batch.images[:, -1].round())


def finetuned(
    bench: Bench, data: SegmentationData, subject: Subject, options: EvaluateOptions
) -> tuple[Segment, str, dict[str, float], tuple[str, ...]]:
    """The subject's encoder with a decoder, trained in a folder of its own; the name of its figures; these; notes."""
    assert subject.model is not None
    name, config, images, runtime = "segmentation_finetune", options.finetune, data.train, bench.runtime
    suffix, ranks = "" if subject.name in ("model", bench.run) else f"-{subject.name}", runtime.ranks
    out = output_folder(bench.run, options) / f"segmentation-finetune{suffix}"
    begun = ranks.on_main((out / "finetune.json").exists)
    resume = bool(options.resume) and (begun or not suffix)
    ranks.on_main(lambda: check_start(out, resume, config, runtime))
    size, channels = images.model.input_size, len(images.normalisation.mean)
    windows, notes = training_windows(images, 4 * (channels + 1) * math.prod(size), options.segmentation.memory_limit)
    batches = window_batches(images, data.maps, windows)
    stored = torch.cat([torch.cat([inputs, labels[:, None].float()], 1) for inputs, _, labels in batches])
    stored = stored[(stored[:, -1] != IGNORED).flatten(1).any(1)]  # the last channel are the classes
    source = ArraySource(stored.movedim(1, -1).numpy(), title="windows", context=Context(axes="HWC"))
    *_, flip = run_data(bench.run).augmentation(2, probe(images.source).example.form)
    loader = ImageLoader(
        source,
        hold(source, math.inf, images.bad),
        view=View(size, (1, 1), (1, 1), flip=flip),
        normalisation=Normalisation((0.0,) * (channels + 1), (1.0,) * (channels + 1)),
        device=runtime.device,
        num_workers=0,
        bad=images.bad,
    )
    with seeded(step_seed(options.seed, 0)):
        segmenter = Segmenter(copy.deepcopy(subject.model.encoder), len(data.classes)).to(runtime.device)
    plan = Plan(len(source), min(config.batch_size or options.segmentation.batch_size, len(source)), options.seed)
    task = SegmentationTask(config, segmenter, lambda *given: given, runtime, plan.batch_size, options.seed)
    asked = {"settings": asdict(config), "segmentation": asdict(options.segmentation), "seed": options.seed}
    about: dict[str, Any] = {"data": images.source.fingerprint(), "labels": images.source.label_fingerprint()}
    about["reading"] = images.reading
    with trained_in(out, task, loader, plan, asked | about, bench.display, resume=resume) as (state, _, folder):
        ranks.on_main(lambda: write_weights(folder.weights, task.model.result.state_dict()))
    task.model.eval()
    notes += (f"{out.name} has the trained weights and is in {out.parent}",)
    took = {"loss": state.loss, "images": float(len(source)), "seconds": state.seconds}

    def segment(inputs: Tensor, valid: Tensor | None) -> Tensor:
        del valid  # a decoder of whole windows; pixels without data are 0, as in training
        with runtime.autocast():
            logits: Tensor = task.model.result(inputs)
        return logits

    return segment, name, {f"{name}_{key}": value for key, value in took.items()}, notes
