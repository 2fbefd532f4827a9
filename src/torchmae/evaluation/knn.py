"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024


def knn_predict(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classes of queries by a vote of their neighbours.

    Features are centred on the mean of `features` and scaled to length 1; the k nearest by cosine vote with weight
    exp(cosine / temperature). Queries are taken in blocks, so memory is bounded by BLOCK * len(features).

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
    mean = features.mean(0)
    bank = F.normalize(features - mean, dim=1)
    votes = []
    for block in torch.split(queries, BLOCK):
        similarity = F.normalize(block - mean, dim=1) @ bank.T
        nearest, index = similarity.topk(min(k, len(bank)), dim=1)
        weight = ((nearest - 1) / temperature).exp()  # cosines are at most 1: no overflow
        votes.append(torch.zeros(len(block), num_classes, device=block.device).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


def knn_accuracy(
    features: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of queries classified correctly, in percent. Arguments as for `knn_predict`."""
    num_classes = int(max(labels.max(), query_labels.max())) + 1
    votes = knn_predict(features, labels, queries, num_classes=num_classes, k=k, temperature=temperature)
    return 100.0 * (votes.argmax(1) == query_labels).double().mean().item()
