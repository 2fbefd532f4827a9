"""Attentive probing: learned queries pool an image's frozen patch tokens by attention, a linear layer classifies.

Patch tokens of masked autoencoders hold more than their mean (Chen et al. 2022, "Context Autoencoder", arXiv
2202.03026, section 4.1, there with a full cross-attention layer). Several queries without a key matrix are enough
(Psomas et al. 2025, "Attention, please!", arXiv 2506.10178).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.config import OptimConfig
from torchmae.config.evaluate import AttentiveOptions, EvaluateOptions, SegmentationOptions
from torchmae.data.loader import Batch, Indices, mixed_subset
from torchmae.errors import ConfigError
from torchmae.evaluation.bench import Bench
from torchmae.evaluation.images import ImageSet
from torchmae.evaluation.scores import Result, rank, score
from torchmae.evaluation.subject import Subject
from torchmae.machine import GIB, bytes_to_keep
from torchmae.random import Purpose, permutation
from torchmae.training.optim import lr_factor
from torchmae.training.runtime import Runtime
from torchmae.training.task import seeded

_STATISTICS_IMAGES = 500
_SCHEDULE = OptimConfig(warmup=0.1)
_QUERIES = 8
_EPOCHS = 30
_STEPS = 2000


class AttentiveProbe(nn.Module):
    """Standardised tokens, attention of learned queries to them, a part of the value matrix each, layer norm, linear.

    `mean` and `std`, above 0, are of the tokens, (D,); `num_queries` divides D.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, num_queries: int, num_classes: int) -> None:
        super().__init__()
        dim = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.query = nn.Parameter(torch.empty(num_queries, dim).normal_(std=dim**-0.5))
        self.value = nn.Parameter(torch.empty(num_queries, dim // num_queries, dim).normal_(std=dim**-0.5))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, C) logits."""
        tokens = (tokens - self.mean) / self.std
        weights = F.linear(tokens, self.query).softmax(1)  # (B, L, queries)
        gathered = weights.transpose(1, 2) @ tokens  # (B, queries, D), averaged before the product with the values
        pooled = torch.einsum("bqd,qkd->bqk", gathered, self.value).flatten(1)
        return self.head(self.norm(pooled))


@dataclass(frozen=True)
class Tokens:
    """Patch tokens of `count` images; `batches(indices, size)` gives (B, L, D) tokens and (B,) labels of some."""

    count: int
    batches: Callable[[Indices, int], Iterator[tuple[Tensor, Tensor]]]


def held_tokens(tokens: Tensor, labels: Tensor, device: torch.device) -> Tokens:
    """Tokens in memory, (N, L, D) float16, with batches on the device."""

    def batches(indices: Indices, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.split(torch.from_numpy(indices), size):
            yield tokens[rows].to(device).float(), labels[rows].to(device)

    return Tokens(len(labels), batches)


def token_bytes(subject: Subject, count: int) -> int:
    """Size of the tokens of `count` images in half precision."""
    assert subject.model is not None
    encoder = subject.model.encoder
    return 2 * count * encoder.num_patches * encoder.embed_dim * len(subject.blocks or [0])


def open_tokens(subject: Subject, images: ImageSet, runtime: Runtime, memory_limit: float) -> Tokens:
    """The tokens of all images: kept in memory if they take at most `memory_limit` GiB, else encoded each time."""
    if token_bytes(subject, len(images)) > bytes_to_keep(memory_limit):
        return Tokens(len(images), lambda rows, size: _encoded(subject, images.batches(rows, size), runtime))
    share, batches = images.shared(runtime.ranks, f"encoding training images, {subject.name}")
    parts = [(tokens.half().cpu(), labels.cpu()) for tokens, labels in _encoded(subject, batches, runtime)]
    tokens, labels = share.of_all_images(*zip(*parts, strict=True))
    return held_tokens(tokens, labels, runtime.device)


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """The accuracy of the attentive probe. All ranks train it; each encodes a share of the images."""
    data, runtime, settings = bench.data, bench.runtime, options.attentive
    tokens = open_tokens(subject, data.train, runtime, settings.memory_limit)
    mean, std = statistics(tokens, data.train.model.batch_size)
    wanted = settings.queries or _QUERIES
    divisors = [count for count in range(1, len(mean) + 1) if len(mean) % count == 0]
    queries = min(divisors, key=lambda count: abs(count - wanted))
    if settings.queries not in (None, queries):
        raise ConfigError(f"attentive.queries is {wanted} and tokens have {len(mean)} values", f"use {queries}")
    with seeded(options.seed):
        probe = AttentiveProbe(mean.cpu(), std.cpu(), queries, len(data.classes))
    probe.to(runtime.device)
    epochs = settings.epochs or epochs_for(tokens.count, settings.batch_size, _EPOCHS, _STEPS)
    for epoch in train_head(probe, tokens, epochs, settings, options.seed):
        bench.display.preparing(f"attentive probe, {subject.name}, epochs", epoch, epochs)
    share, batches = data.test.shared(runtime.ranks, f"encoding test images, {subject.name}")
    with torch.no_grad():
        found = [(rank(probe(block)), labels) for block, labels in _encoded(subject, batches, runtime)]
    ranking, labels = share.of_all_images(*zip(*found, strict=True))
    return score("attentive", ranking, labels, data.classes)


def left_out(bench: Bench, subject: Subject, options: EvaluateOptions) -> str:
    """A sentence if the tokens of the training images take more than `memory_limit`, else ""."""
    need = token_bytes(subject, len(bench.data.train))
    if need <= bytes_to_keep(options.attentive.memory_limit):
        return ""
    return f"attentive is left out: its tokens take {need / GIB:.1f} GiB; run it alone with --method attentive"


def _encoded(subject: Subject, batches: Iterable[Batch], runtime: Runtime) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels; rounded to half precision like tokens in memory, so that both give the same figures."""
    for batch in batches:
        with runtime.autocast():
            tokens = subject.encode(batch.images, "tokens", batch.valid)
        yield tokens.half().float(), batch.labels


def statistics(tokens: Tokens, size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (D,), of the tokens of a sample of images."""
    sample = np.sort(mixed_subset(tokens.count, _STATISTICS_IMAGES))
    blocks = [block.flatten(0, 1) for block, _ in tokens.batches(sample, size)]
    total = sum(len(block) for block in blocks)
    mean = torch.stack([block.mean(0) * (len(block) / total) for block in blocks]).sum(0)
    variance = torch.stack([(block - mean).square().mean(0) * (len(block) / total) for block in blocks]).sum(0)
    return mean, torch.where(variance > 1e-12, variance, torch.ones_like(variance)).sqrt()


def epochs_for(count: int, batch_size: int, fewest: int, steps: int) -> int:
    """Passes over `count` samples: `fewest`, or as many more as `steps` steps take."""
    return max(fewest, -(-steps // -(-count // batch_size)))


def train_head(
    probe: nn.Module, tokens: Tokens, epochs: int, options: AttentiveOptions | SegmentationOptions, seed: int
) -> Iterator[int]:
    """Trains, and yields the number of epochs done after each."""
    decayed = [parameter for parameter in probe.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in probe.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    steps_per_epoch = -(-tokens.count // options.batch_size)
    steps = epochs * steps_per_epoch
    for epoch in range(epochs):
        order = permutation(seed, epoch, tokens.count, Purpose.ORDER)
        for step, (block, labels) in enumerate(tokens.batches(order, options.batch_size)):
            if not len(labels):  # none of a last batch can be read
                continue
            for group in optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(epoch * steps_per_epoch + step, steps, _SCHEDULE)
            loss = F.cross_entropy(probe(block), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield epoch + 1
