from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchmae.evaluation import knn
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
    figures = knn.run(train, test, ks=(k,))
    assert figures[f"knn{k}"] == pytest.approx(100 * (expected == data.target[1000:]).mean(), abs=0.3)
    accuracy = knn.knn_accuracy(*train, *test, k=k)
    assert accuracy == pytest.approx(figures[f"knn{k}"], abs=0.13)  # a tie may fall either way
