from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchmae.evaluation import knn
from torchmae.evaluation.knn import knn_accuracy, nearest
from torchmae.evaluation.scores import Labelled


class Largest(TorchDispatchMode):
    """Records the number of values in the largest tensor that is made, of those that are not the features' size."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.copies = 0
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(item) for item in tree_leaves((args, kwargs or {}))}
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor) and id(item) not in inputs and not func.is_view:
                if item.numel() == self.features:
                    self.copies += 1
                else:
                    self.values = max(self.values, item.numel())
        return result


def test_memory_is_bounded_at_the_size_of_imagenet() -> None:
    count, dim, num_classes, queries = 1_300_000, 768, 1000, 300
    with torch.device("meta"):  # shapes without content: nothing of this size is held or computed
        train = Labelled(torch.empty(count, dim), torch.empty(count, dtype=torch.int64))
        test = Labelled(torch.empty(queries, dim), torch.empty(queries, dtype=torch.int64))
        with Largest(count * dim) as largest:
            ranking = knn.classify(train, test, num_classes)["knn20"]
    assert ranking.shape == (queries, 5)
    assert largest.values <= knn.MAX_VALUES
    assert largest.copies == 1  # the centred features


def test_blocks_do_not_change_the_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Labelled(torch.randn(60, 8), torch.arange(60) % 7)
    test = Labelled(torch.randn(25, 8), torch.arange(25) % 7)
    whole = knn.classify(train, test, 7)
    blocks = []
    monkeypatch.setattr(knn, "MAX_VALUES", 60 * 4)
    vote = knn._vote
    monkeypatch.setattr(knn, "_vote", lambda cosine, *rest: (blocks.append(len(cosine)), vote(cosine, *rest))[1])
    for name, ranking in knn.classify(train, test, 7).items():
        assert torch.equal(ranking, whole[name])
    assert blocks == [4] * (6 * 3) + [1] * 3  # three numbers of neighbours


@pytest.mark.parametrize("k", [10, 20, 100])
def test_the_guesses_are_scikit_learns(k: int) -> None:
    data = load_digits()
    features, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    train, test = Labelled(features[:1000], labels[:1000]), Labelled(features[1000:], labels[1000:])

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp(-distances / knn.TEMPERATURE)  # cosine distance is 1 - cosine

    mean = data.data[:1000].mean(0)
    peer = KNeighborsClassifier(k, weights=weights, metric="cosine").fit(data.data[:1000] - mean, data.target[:1000])
    expected = peer.predict(data.data[1000:] - mean)
    ranking = knn.classify(train, test, 10, ks=(k,))[f"knn{k}"]
    assert (ranking[:, 0].numpy() == expected).mean() > 0.997
    accuracy = knn.knn_accuracy(*train, *test, k=k)
    assert accuracy == 100 * (ranking[:, 0] == test.labels).sum().item() / len(test.labels)
    assert accuracy == pytest.approx(100 * (expected == data.target[1000:]).mean(), abs=0.3)


def test_other_temperatures_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (700,), generator=generator)
    features = torch.randn(5, 16, generator=generator)[labels] + 1.6 * torch.randn(700, 16, generator=generator) + 10
    mean = features[:400].mean(0)
    for k, temperature in ((1, 0.07), (5, 1.0)):
        peer = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=temperature: np.exp(-d / t), algorithm="brute"
        )
        peer.fit((features[:400] - mean).numpy(), labels[:400].numpy())
        expected = 100 * peer.score((features[400:] - mean).numpy(), labels[400:].numpy())
        found = knn_accuracy(features[:400], labels[:400], features[400:], labels[400:], k=k, temperature=temperature)
        assert found == pytest.approx(expected)
        assert 30 < found < 95  # neither chance (20) nor trivial
    # A low temperature does not overflow, and each is its own nearest.
    assert knn_accuracy(features, labels, features, labels, temperature=0.001) == 100


def test_fewer_features_than_neighbours() -> None:
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    labels = torch.tensor([2, 0, 0])
    assert knn_accuracy(features, labels, features, labels, k=20) == 100.0


def test_a_class_that_no_neighbour_has() -> None:
    features, labels = torch.eye(2), torch.tensor([0, 1])
    assert knn_accuracy(features, labels, features, torch.tensor([0, 7])) == 50.0


def test_neighbours_are_the_nearest_by_centred_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(40, 5) + 3
    queries = torch.cat([features[[7, 31]], torch.randn(9, 5)])
    monkeypatch.setattr(knn, "MAX_VALUES", 40 * 3)  # blocks of 3
    index, cosine = nearest(features, queries, 4)
    assert index.shape == cosine.shape == (11, 4)
    assert index[:2, 0].tolist() == [7, 31]
    torch.testing.assert_close(cosine[:2, 0], torch.ones(2))
    mean = features.mean(0)
    for row in (0, 10):
        truth = F.cosine_similarity(queries[row] - mean, features - mean)
        assert index[row].tolist() == truth.argsort(descending=True)[:4].tolist()
    assert nearest(torch.randn(3, 5), torch.randn(2, 5), 9)[0].shape == (2, 3)
