from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from torchmae.evaluation import knn as module
from torchmae.evaluation.knn import knn_accuracy, knn_predict


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of five classes that overlap, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 1.6 * torch.randn(count, 16, generator=generator) + 10, labels


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (5, 1.0)])
def test_against_scikit_learn(k: int, temperature: float) -> None:
    features, labels = clusters(400, 1)
    queries, query_labels = clusters(300, 2)
    mean = features.mean(0)
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / temperature), algorithm="brute")
    peer.fit((features - mean).numpy(), labels.numpy())
    votes = knn_predict(features, labels, queries, num_classes=5, k=k, temperature=temperature)
    probabilities = votes / votes.sum(1, keepdim=True)
    np.testing.assert_allclose(probabilities.numpy(), peer.predict_proba((queries - mean).numpy()), atol=1e-4)
    accuracy = 100 * peer.score((queries - mean).numpy(), query_labels.numpy())
    assert knn_accuracy(features, labels, queries, query_labels, k=k, temperature=temperature) == pytest.approx(
        accuracy
    )
    assert 30 < accuracy < 95  # neither chance (20) nor trivial


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(100, 1)
    queries, _ = clusters(50, 2)
    whole = knn_predict(features, labels, queries, num_classes=5)
    monkeypatch.setattr(module, "MAX_VALUES", 700)  # blocks of 7
    torch.testing.assert_close(knn_predict(features, labels, queries, num_classes=5), whole)


def test_fewer_features_than_neighbours() -> None:
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    labels = torch.tensor([2, 0, 0])
    assert knn_accuracy(features, labels, features, labels, k=20) == 100.0


def test_a_class_that_no_neighbour_has() -> None:
    features, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn_accuracy(features, labels, features, torch.tensor([0, 7])) == 50.0


def test_a_low_temperature_does_not_overflow() -> None:
    features, labels = clusters(100, 1)
    votes = knn_predict(features, labels, features, num_classes=5, temperature=0.001)
    assert votes.isfinite().all()
    assert torch.equal(votes.argmax(1), labels)  # each is its own nearest
