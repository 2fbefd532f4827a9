"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmae.evaluation.scores import Labelled, num_classes_of, rank, score

KS = (10, 20, 100)
TEMPERATURE = 0.07
MAX_VALUES = 2**26
"""Numbers in the largest intermediate result: 256 MB, whatever the number of features, queries and classes."""


def run(
    train: Labelled, test: Labelled, *, ks: Sequence[int] = KS, temperature: float = TEMPERATURE
) -> dict[str, float]:
    """Accuracies for several numbers of neighbours, in percent: knn20, knn20_top5, knn20_low, knn20_high, and so on.

    Args:
        train: what votes.
        test: what is classified.
        ks: numbers of neighbours.
        temperature: above 0.
    """
    num_classes = num_classes_of(train, test)
    rankings = classify(train, test, num_classes, ks=ks, temperature=temperature)
    figures: dict[str, float] = {}
    for name, ranking in rankings.items():
        figures |= score(ranking, test.labels, num_classes).figures(name)
    return figures


def classify(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[str, Tensor]:
    """Guesses for several numbers of neighbours; neighbours are looked up once.

    Returns:
        "knn<k>" to (M, at most 5) classes, the likeliest first.
    """
    guesses: dict[str, list[Tensor]] = {f"knn{k}": [] for k in ks}
    for cosine, labels in _neighbours(*train, test.features, max(ks), num_classes):
        for k in ks:
            guesses[f"knn{k}"].append(rank(_vote(cosine[:, :k], labels[:, :k], num_classes, temperature)))
    return {name: torch.cat(parts) for name, parts in guesses.items()}


def knn_predict(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Classes of queries by a vote of their neighbours.

    Features are centred on the mean of `features` and scaled to length 1; the k nearest by cosine vote with weight
    exp(cosine / temperature). Queries are taken in blocks, so that beside the features, centred, and the votes no
    more than `MAX_VALUES` numbers are held.

    Args:
        features: (N, D) with known classes.
        labels: (N,) int64, 0 to num_classes - 1.
        queries: (M, D).
        num_classes: how many classes there are.
        k: neighbours; all N when there are fewer.
        temperature: above 0.

    Returns:
        (M, num_classes) votes; the predicted class is the largest.
    """
    blocks = _neighbours(features, labels, queries, k, num_classes)
    return torch.cat([_vote(cosine, voters, num_classes, temperature) for cosine, voters in blocks])


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> float:
    """Share of queries classified correctly, in percent. Arguments as for `knn_predict`."""
    num_classes = int(max(labels.max(), query_labels.max())) + 1
    votes = knn_predict(features, labels, queries, num_classes=num_classes, k=k, temperature=temperature)
    return 100.0 * (votes.argmax(1) == query_labels).sum().item() / len(query_labels)


def _neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, k: int, num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each block of queries, (B, k) cosines and labels of the neighbours, the nearest first."""
    mean = features.mean(0)
    bank = features - mean
    bank /= bank.norm(dim=1, keepdim=True).clamp_(min=1e-12)  # in place: of a million features one copy is enough
    for block in torch.split(queries, max(1, MAX_VALUES // max(len(bank), num_classes))):
        similarity = F.normalize(block - mean, dim=1) @ bank.T
        cosine, index = similarity.topk(min(k, len(bank)), dim=1)
        yield cosine, labels[index]


def _vote(cosine: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """(B, num_classes) votes of (B, k) neighbours."""
    weight = ((cosine - 1) / temperature).exp()  # cosines are at most 1: no overflow
    votes = torch.zeros(len(cosine), num_classes, device=cosine.device)
    return votes.scatter_add_(1, labels, weight)
