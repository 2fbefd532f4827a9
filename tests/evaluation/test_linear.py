from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from torchmae.evaluation import linear
from torchmae.evaluation.scores import Labelled
from torchmae.evaluation.sharing import Parts
from torchmae.training.ranks import Ranks


@pytest.fixture(scope="module")
def digits() -> tuple[Labelled, Labelled]:
    data = load_digits()
    features, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    return Labelled(features[:1000], labels[:1000]), Labelled(features[1000:], labels[1000:])


def probabilities(train: Labelled, test: Labelled, num_classes: int, c: float) -> np.ndarray:
    scaled, others = linear.standardise(train.features, test.features)
    return next(linear.fit(scaled, train.labels, num_classes, (c,))).logits(others).softmax(1).numpy()


def sklearn_probabilities(train: Labelled, test: Labelled, c: float) -> np.ndarray:
    scaler = StandardScaler().fit(train.features)
    model = LogisticRegression(C=c, max_iter=5000, tol=1e-7).fit(scaler.transform(train.features), train.labels)
    return model.predict_proba(scaler.transform(test.features))


@pytest.mark.parametrize("c", [1e-2, 1.0])
def test_the_fit_is_scikit_learns(digits: tuple[Labelled, Labelled], c: float) -> None:
    ours, theirs = probabilities(*digits, 10, c), sklearn_probabilities(*digits, c)
    np.testing.assert_allclose(ours, theirs, atol=3e-3)
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.998


def test_the_fit_of_two_classes_is_scikit_learns(digits: tuple[Labelled, Labelled]) -> None:
    train, test = (Labelled(item.features, (item.labels > 4).long()) for item in digits)
    np.testing.assert_allclose(probabilities(train, test, 2, 0.1), sklearn_probabilities(train, test, 0.1), atol=3e-3)


def test_a_class_without_images_is_never_guessed(digits: tuple[Labelled, Labelled]) -> None:
    train, test = digits
    known = train.labels != 3
    few = Labelled(train.features[known], train.labels[known])
    ranking = linear.classify(few, test, 10, c=0.1)
    assert not (ranking[:, 0] == 3).any()
    without = sklearn_probabilities(few, test, 0.1)
    np.testing.assert_allclose(np.delete(probabilities(few, test, 10, 0.1), 3, axis=1), without, atol=3e-3)


def test_blocks_do_not_change_the_fit(digits: tuple[Labelled, Labelled], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probabilities(*digits, 10, 0.01)
    monkeypatch.setattr(linear, "MAX_VALUES", 10 * 64)
    np.testing.assert_allclose(probabilities(*digits, 10, 0.01), whole, atol=1e-3)


def test_standardise_leaves_a_constant_column_at_zero() -> None:
    features = torch.cat([torch.full((50, 1), 7.3), torch.randn(50, 2) * 5 + 3], dim=1)
    scaled, other = linear.standardise(features, features[:4] + 1)
    assert scaled[:, 0].abs().max() < 1e-4
    torch.testing.assert_close(scaled[:, 1:].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled[:, 1:].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(other[:, 1], scaled[:4, 1] + 1 / features[:, 1].std(correction=0))


def test_the_sweep_finds_a_strong_penalty_for_noise_and_a_weak_one_for_a_clear_case() -> None:
    labels = torch.arange(200) % 2
    noise = torch.randn(200, 100)
    noise[:, 0] += labels * 1.5
    assert linear.choose_c(Labelled(noise, labels), 2) <= 0.01
    # The only column that tells the classes apart is tiny against the others: a strong penalty cannot use it.
    clear = torch.randn(200, 20)
    clear[:, 0] = clear[:, 1] + 0.05 * (2 * labels - 1)
    assert linear.choose_c(Labelled(clear, labels), 2) >= 1.0


def test_no_penalty_is_chosen_on_a_part_with_a_single_class() -> None:
    groups = torch.arange(40) // 5
    train = Labelled(torch.randn(40, 3), (groups == 3).long())  # one patient is ill, in one of the two parts
    assert linear.choose_c(train, 2, Parts(groups)) == linear.FIXED_C


def test_the_sweep_ends_when_it_only_gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(40) % 2
    right_of = {1e-4: 5, 1e-3: 7, 1e-2: 6, 1e-1: 7, 1.0: 6, 10.0: 6, 100.0: 8}
    fitted: list[float] = []

    def fit(
        features: torch.Tensor, labels: torch.Tensor, num_classes: int, cs: Sequence[float], ranks: Ranks
    ) -> Iterator[linear.Linear]:
        for c in cs:
            fitted.append(c)
            right = labels_of_val[: right_of[c]]
            guesses = torch.cat([right, 1 - labels_of_val[len(right) :]])
            yield linear.Linear(guesses, torch.zeros(2))

    labels_of_val = labels[torch.from_numpy(linear._every_fifth(labels, 0))]
    monkeypatch.setattr(linear, "fit", fit)
    monkeypatch.setattr(linear.Linear, "logits", lambda self, _: torch.eye(2)[self.weight])
    assert linear.choose_c(Labelled(torch.randn(40, 1), labels), 2) == 1e-3
    assert fitted == [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]  # only the last two in a row are both worse than the best


def test_the_held_out_part_is_a_fifth_of_each_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    held_out = torch.from_numpy(linear._every_fifth(labels, seed=0))
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [10, 2, 1, 0]
    assert not torch.equal(held_out, torch.from_numpy(linear._every_fifth(labels, seed=1)))


def test_no_group_lies_in_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, groups = torch.arange(60) % 2, torch.arange(60) // 6  # six images of each patient
    held_out = linear._every_fifth(labels, 0, groups.numpy())
    assert held_out.sum() == 12
    assert not set(groups[held_out].tolist()) & set(groups[~held_out].tolist())
    # The features tell patients apart and nothing else: on other patients' images, no C does better than chance.
    patient_labels = torch.arange(10) % 2
    labels, features = patient_labels[groups], torch.eye(10)[groups] + 0.01 * torch.randn(60, 10)
    seen: list[torch.Tensor] = []
    fit = linear.fit
    monkeypatch.setattr(linear, "fit", lambda features, *rest: (seen.append(features), fit(features, *rest))[1])
    linear.choose_c(Labelled(features, labels), 2, Parts(groups))
    assert [len(item) for item in seen] == [48]
    assert linear.choose_c(Labelled(features, labels), 2, Parts(torch.zeros(60).long())) == linear.FIXED_C


def test_a_rare_class_is_not_given_up_for_a_stronger_penalty() -> None:
    """In the held-out group most images look like the rare class, which costs accuracy and not the mean of classes."""
    torch.manual_seed(0)
    groups = torch.arange(5).repeat(200)
    labels = (torch.rand(1000) < 0.1).long()
    features = torch.randn(1000, 1) + 6 * labels[:, None]
    held_out = torch.from_numpy(linear._every_fifth(labels, 0, groups.numpy()))
    assert len(groups[held_out].unique()) == 1
    shifted = held_out & (labels == 0) & (torch.rand(1000) < 0.4)
    features[shifted] += 6
    c = linear.choose_c(Labelled(features, labels), 2, Parts(groups))
    scaled, val = linear.standardise(features[~held_out], features[held_out])
    strong, chosen = (next(linear.fit(scaled, labels[~held_out], 2, (value,))) for value in (linear.SWEEP[0], c))
    right = [classifier.logits(val).argmax(1) == labels[held_out] for classifier in (strong, chosen)]
    assert right[0].float().mean() > right[1].float().mean()  # by plain accuracy the strong penalty wins
    rare = labels[held_out] == 1
    assert right[1][rare].float().mean() > 0.9 > right[0][rare].float().mean()


def test_one_image_a_class_leaves_nothing_to_sweep() -> None:
    assert linear.choose_c(Labelled(torch.randn(3, 4), torch.arange(3)), 3) == linear.FIXED_C


@pytest.mark.parametrize(("classify", "least"), [(linear.classify, 90), (linear.classify_paper, 88)])
def test_both_protocols_learn_digits_and_repeat(digits: tuple[Labelled, Labelled], classify: Any, least: float) -> None:
    ranking = classify(*digits, 10)
    assert ranking.shape == (797, 5)
    assert 100 * (ranking[:, 0] == digits[1].labels).float().mean() > least
    assert torch.equal(classify(*digits, 10), ranking)


def test_a_lars_step_by_hand() -> None:
    classifier = linear.Linear(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]))
    momenta = [torch.zeros(1, 2), torch.zeros(1)]
    gradients = (torch.tensor([[0.0, 2.0]]), torch.tensor([0.5]))
    linear._lars_step(classifier, gradients, momenta, lr=10.0)
    # The weight moves by lr x 0.001 x its norm along the gradient, the bias by lr x its gradient.
    torch.testing.assert_close(classifier.weight, torch.tensor([[3.0, 4.0 - 0.05]]))
    torch.testing.assert_close(classifier.bias, torch.tensor([-4.0]))
    torch.testing.assert_close(momenta[0], torch.tensor([[0.0, 0.005]]))
