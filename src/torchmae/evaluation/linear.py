"""Linear probing: a linear classifier on frozen features.

`classify` fits a multinomial logistic regression to its optimum and chooses the penalty on a part of the training
images: nothing to tune, the same figure each time. `classify_paper` follows the paper (He et al. 2021, table 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmae.config import OptimConfig
from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.groups import hold_out_groups
from torchmae.data.loader import Indices
from torchmae.evaluation.bench import Bench, chosen_pools
from torchmae.evaluation.scores import Labelled, Result, join, rank
from torchmae.evaluation.sharing import WHOLE, Parts
from torchmae.evaluation.subject import Subject
from torchmae.random import Purpose, permutation
from torchmae.training.optim import lr_factor
from torchmae.training.ranks import ALONE, Ranks

SWEEP = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FIXED_C = 0.1
VALIDATION_SHARE = 0.2
MAX_VALUES = 2**26
"""Limit of logits in memory, 256 MB."""

_PATIENCE = 2
_MAX_ITERATIONS = 1000
_GRADIENT_TOLERANCE = 1e-6

# The paper's table 10.
_EPOCHS = 90
_SCHEDULE = OptimConfig(warmup=10 / _EPOCHS)
_BATCH = 16384
_LR = 0.1 * _BATCH / 256
_STEPS_PER_EPOCH = 78  # of that batch, on ImageNet
_MIN_BATCH = 32
_MOMENTUM = 0.9
_TRUST = 1e-3  # You et al. 2017, arXiv 1708.03888


class Linear(NamedTuple):
    """A linear classifier: weight (C, D), bias (C,), minus infinity for a class without training images."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C)."""
        return F.linear(features, self.weight, self.bias)


def measure(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """Accuracies for each kind of features (`chosen_pools`); of the patch mean also with C = `FIXED_C`."""
    results = []
    for pool in chosen_pools(subject, options, subject.pools):

        def guesses(
            train: Labelled, test: Labelled, num_classes: int, parts: Parts, pool: str = pool
        ) -> dict[str, Tensor]:
            if options.protocol == "paper":
                whole = parts.whole(train)  # each batch mixes the images of all ranks
                return {f"linear_paper_{pool}": classify_paper(whole, test, num_classes, seed=options.seed)}
            found = {f"linear_{pool}": classify(train, test, num_classes, parts, seed=options.seed)}
            if pool == "mean":
                found[f"linear_c{FIXED_C}"] = classify(train, test, num_classes, parts, c=FIXED_C)
            return found

        results.append(bench.probe(subject, pool, guesses, options, by_parts=True))
    return join(results)


def classify(
    train: Labelled, test: Labelled, num_classes: int, parts: Parts = WHOLE, *, c: float | None = None, seed: int = 0
) -> Tensor:
    """Ranking, as of `scores.rank`, by a logistic regression on standardised features.

    `c` is scikit-learn's C; None: `choose_c` with `seed`, on training images alone. Each rank computes on its part of
    the training images.
    """
    c = choose_c(train, num_classes, parts, seed=seed) if c is None else c
    scaled, others = standardise(train.features, test.features, ranks=parts.ranks)
    return rank(next(fit(scaled, train.labels, num_classes, (c,), parts.ranks)).logits(others))


def choose_c(
    train: Labelled, num_classes: int, parts: Parts = WHOLE, *, seed: int = 0, sweep: Sequence[float] = SWEEP
) -> float:
    """The C whose classifier, fitted on four fifths of the images, classifies the other fifth best.

    Best is the mean of the classes' accuracies: by plain accuracy, a penalty that leaves nothing but the commonest
    class may win where one class is rare. No group lies in both parts. On a tie the smallest C; `FIXED_C` where no
    class has two images, all are of one group, or one of the parts has a single class. The search goes from the
    strongest penalty to the weakest and stops after two fits in a row below the best, because the last fits take by far
    the longest.
    """
    ranks, device = parts.ranks, train.labels.device
    held_out = _every_fifth(ranks.gather_rows(train.labels), seed, parts.all_groups())
    if not held_out.any():
        return FIXED_C
    is_val = torch.zeros(len(train.labels), dtype=torch.bool, device=device)
    is_val[parts.of_this_rank(np.flatnonzero(held_out), len(is_val)).to(device)] = True
    labels, val_labels = train.labels[~is_val], train.labels[is_val]
    features, val_features = standardise(train.features[~is_val], train.features[is_val], ranks=ranks)
    images, learned = (ranks.sum(torch.bincount(each, minlength=num_classes)) for each in (val_labels, labels))
    if min(int((counts > 0).sum()) for counts in (images, learned)) < 2:
        return FIXED_C
    scores: list[float] = []
    for classifier in fit(features, labels, num_classes, sweep, ranks):
        right = val_labels[classifier.logits(val_features).argmax(1) == val_labels]
        shares = ranks.sum(torch.bincount(right, minlength=num_classes)).double() / images
        scores.append(float(shares[images > 0].mean()))
        if len(scores) > _PATIENCE and max(scores[-_PATIENCE:]) < max(scores):
            break
    return sweep[scores.index(max(scores))]


def standardise(features: Tensor, *others: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, ...]:
    """All tensors standardised by mean and deviation of all ranks' first; a constant column is only centred."""
    count = sum(ranks.gather(len(features)))
    mean = ranks.sum(features.sum(0)) / count
    std = (ranks.sum((features - mean).square().sum(0)) / count).sqrt()
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.ones_like(std))
    return tuple((item - mean) / std for item in (features, *others))


def fit(
    features: Tensor, labels: Tensor, num_classes: int, cs: Sequence[float], ranks: Ranks = ALONE
) -> Iterator[Linear]:
    """Multinomial logistic regressions on standardised (N, D) features, each fitted to its optimum by L-BFGS.

    The objective is scikit-learn's: C times the summed cross-entropy plus half the squared weights, without a penalty
    on biases (with two classes it has one weight vector for both, which halves the penalty). The values of C rise,
    and each fit starts from the one before it. Classes without an image are never predicted.
    """
    present = torch.unique(ranks.gather_rows(labels))
    targets = torch.searchsorted(present, labels)
    count = sum(ranks.gather(len(labels)))
    weight = features.new_zeros(len(present), features.shape[1])
    bias = features.new_zeros(len(present))
    for c in cs:
        penalty = (2 if len(present) == 2 else 1) / (c * count)
        weight, bias = _minimise(features, targets, weight, bias, penalty, count, ranks)
        full = Linear(features.new_zeros(num_classes, features.shape[1]), features.new_full((num_classes,), -torch.inf))
        full.weight[present], full.bias[present] = weight, bias
        yield full


def _minimise(
    features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, penalty: float, count: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Weights and biases that minimise mean cross-entropy + penalty / 2 * squared weights.

    The mean is over the `count` images of all ranks, which add up their gradients and go the same way.
    """
    weight, bias = weight.clone(), bias.clone()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, MAX_VALUES // len(bias))  # a million images times a thousand classes would not fit

    def closure() -> Tensor:
        loss = weight.new_zeros(())
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        for block, wanted in zip(torch.split(features, rows), torch.split(targets, rows), strict=True):
            log_probability = F.log_softmax(F.linear(block, weight, bias), dim=1)
            loss -= log_probability.gather(1, wanted[:, None]).sum() / count
            error = log_probability.exp() / count  # becomes the gradient with respect to the logits
            error[torch.arange(len(block), device=block.device), wanted] -= 1 / count
            weight.grad += error.T @ block
            bias.grad += error.sum(0)
        for total in (loss, weight.grad, bias.grad):
            ranks.sum(total)
        weight.grad += penalty * weight
        return loss + 0.5 * penalty * weight.square().sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight, bias


def _every_fifth(labels: Tensor, seed: int, groups: Indices | None = None) -> npt.NDArray[np.bool_]:
    """(N,) whether an image is held out: a fifth of each class, at least one if the class has two.

    With `groups`, whole groups: at most a fifth of all images, or else the smallest group.
    """
    if groups is not None:
        return hold_out_groups(groups, round(VALIDATION_SHARE * len(labels)), seed)
    classes = labels.cpu().numpy()
    order = permutation(seed, 0, len(classes), Purpose.HOLD_OUT)
    held_out = np.zeros(len(classes), dtype=np.bool_)
    for label in np.unique(classes):
        members = order[classes[order] == label]
        held_out[members[: max(round(VALIDATION_SHARE * len(members)), int(len(members) > 1))]] = True
    return held_out


def classify_paper(train: Labelled, test: Labelled, num_classes: int, *, seed: int = 0) -> Tensor:
    """Ranking, as of `scores.rank`, by the paper's protocol, here on features without augmentation.

    Batch norm without affine and a linear layer; 90 epochs of LARS with momentum 0.9 and no weight decay; learning rate
    0.1 x 16,384 / 256, with 10 epochs of warm-up and a cosine. The paper's batch of 16,384 means 78 steps an epoch on
    ImageNet; smaller data takes a smaller batch, at least 32, for the same number of steps. The learning rate stays,
    because the length of a LARS step does not depend on the gradient's. `seed` decides weights and order.
    """
    count, device = len(train.labels), train.features.device
    batch = min(count, max(_MIN_BATCH, min(_BATCH, count // _STEPS_PER_EPOCH)))
    steps_per_epoch = -(-count // batch)
    norm = nn.BatchNorm1d(train.features.shape[1], affine=False, eps=1e-6).to(device)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(num_classes, train.features.shape[1]).normal_(std=0.01, generator=generator).to(device)
    classifier = Linear(weight, torch.zeros(num_classes, device=device))
    momenta = [torch.zeros_like(item) for item in classifier]
    for epoch in range(_EPOCHS):
        order = torch.from_numpy(permutation(seed, epoch, count, Purpose.ORDER)).to(device)
        for step, rows in enumerate(torch.split(order, batch)):
            if len(rows) < 2:  # batch statistics need two
                continue
            x = norm(train.features[rows])
            error = classifier.logits(x).softmax(1) - F.one_hot(train.labels[rows], num_classes)
            lr = _LR * lr_factor(epoch * steps_per_epoch + step, _EPOCHS * steps_per_epoch, _SCHEDULE)
            _lars_step(classifier, (error.T @ x / len(rows), error.mean(0)), momenta, lr)
    norm.eval()
    return rank(torch.cat([classifier.logits(norm(block)) for block in torch.split(test.features, _BATCH)]))


def _lars_step(classifier: Linear, gradients: tuple[Tensor, Tensor], momenta: list[Tensor], lr: float) -> None:
    """Momentum on gradients scaled to the norm of their weights (You et al. 2017); biases without the scaling."""
    for parameter, gradient, momentum in zip(classifier, gradients, momenta, strict=True):
        if parameter.ndim > 1:
            gradient = gradient * (_TRUST * parameter.norm() / gradient.norm().clamp(min=1e-12))
        momentum.mul_(_MOMENTUM).add_(gradient)
        parameter.sub_(lr * momentum)
