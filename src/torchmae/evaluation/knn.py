"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.config.evaluate import EvaluateOptions
from torchmae.evaluation.bench import Bench, chosen_pools
from torchmae.evaluation.scores import Labelled, Result, rank
from torchmae.evaluation.sharing import WHOLE, Parts
from torchmae.evaluation.subject import Subject
from torchmae.training.ranks import ALONE, Ranks

KS = (10, 20, 100)
TEMPERATURE = 0.07
MAX_VALUES = 2**26
"""Limit of numbers in an intermediate result, 256 MB."""


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """Accuracies for each number of neighbours in `KS`."""
    (pool,) = chosen_pools(subject, options, ("mean",))
    return bench.probe(subject, pool, classify, options, by_parts=True)


def classify(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    parts: Parts = WHOLE,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[str, Tensor]:
    """Rankings of `scores.rank` of the test images, as "knn<k>" for each number of neighbours in `ks`.

    The k nearest training images, as of `nearest`, vote with weight exp(cosine / temperature). Each rank looks for
    them among its part of the training images. Test images are taken in blocks, so that beside the centred features no
    more than `MAX_VALUES` numbers are held.
    """
    guesses: dict[str, list[Tensor]] = {f"knn{k}": [] for k in ks}
    width = max(num_classes, *parts.ranks.gather(len(train.labels)))  # the same blocks on all ranks
    directions = _centred(train.features, test.features, parts.ranks)
    for index, cosine in nearest_directions(*directions, max(ks), width):
        cosine, labels = _of_all_ranks(cosine, train.labels[index], max(ks), parts.ranks)
        for k in ks:
            guesses[f"knn{k}"].append(rank(_vote(cosine[:, :k], labels[:, :k], num_classes, temperature)))
    return {name: torch.cat(parts) for name, parts in guesses.items()}


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> float:
    """Percent of (M, D) queries that the vote of their k nearest of (N, D) features classifies correctly."""
    num_classes = int(max(labels.max(), query_labels.max())) + 1
    train, test = Labelled(features, labels), Labelled(queries, query_labels)
    (ranking,) = classify(train, test, num_classes, ks=(k,), temperature=temperature).values()
    return 100.0 * (ranking[:, 0] == query_labels).sum().item() / len(query_labels)


def nearest(features: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(M, count) indices of the nearest of (N, D) features to (M, D) queries, nearest first, and their cosines.

    Both are centred on the mean of `features`; a `count` above N means N.
    """
    index, cosine = zip(*nearest_directions(*_centred(features, queries), count), strict=True)
    return torch.cat(index), torch.cat(cosine)


def nearest_directions(bank: Tensor, queries: Tensor, k: int, width: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and cosines, (B, k), of the nearest rows of a bank, (N, D) of length 1, for blocks of (M, D) queries.

    A block has at most `MAX_VALUES` / max(N, `width`) queries.
    """
    for block in torch.split(queries, max(1, MAX_VALUES // max(len(bank), width))):
        cosine, index = (F.normalize(block, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        yield index, cosine


def _of_all_ranks(cosine: Tensor, labels: Tensor, k: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Cosines and labels of the k nearest, (B, k), of those that each rank has found, (B, at most k)."""
    if ranks.world_size == 1:
        return cosine, labels
    free = k - cosine.shape[1]
    padded = F.pad(cosine, (0, free), value=-torch.inf), F.pad(labels, (0, free))  # a cosine that has no vote
    found, names = (ranks.gather_rows(part.T).T for part in padded)
    cosine, order = found.topk(k, dim=1)
    return cosine, names.gather(1, order)


def _centred(features: Tensor, queries: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    mean = ranks.sum(features.sum(0)) / sum(ranks.gather(len(features)))
    bank = features - mean
    bank /= bank.norm(dim=1, keepdim=True).clamp_(min=1e-12)  # in place: of a million features one copy is enough
    return bank, queries - mean


def _vote(cosine: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """(B, num_classes) votes of (B, k) neighbours."""
    weight = ((cosine - 1) / temperature).exp()  # cosines are at most 1: no overflow
    votes = torch.zeros(len(cosine), num_classes, device=cosine.device)
    return votes.scatter_add_(1, labels, weight)
