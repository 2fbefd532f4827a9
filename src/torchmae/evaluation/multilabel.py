"""Images of several classes each: nearest neighbours and a logistic regression for each class, by ranking figures."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from torchmae.config.evaluate import EvaluateOptions
from torchmae.errors import DataError
from torchmae.evaluation import knn, linear
from torchmae.evaluation.bench import Bench, chosen_pools
from torchmae.evaluation.scores import Labelled, Result, join
from torchmae.evaluation.sharing import Parts
from torchmae.evaluation.subject import Subject

Votes = Callable[[Labelled, Labelled, Parts], dict[str, Tensor]]
"""Maps training features with (N, C) tags, test features and the training images' groups to (M, C) scores by name."""


def measure_knn(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """`ranked` of the share of the weighted neighbours that are of a class, for each number in `knn.KS`."""
    (pool,) = chosen_pools(subject, options, ("mean",))
    return measured(bench, subject, pool, knn_votes)


def measure_linear(bench: Bench, subject: Subject, options: EvaluateOptions) -> Result:
    """`ranked` of a logistic regression for each class, as of `linear.classify`, for each kind of features."""

    def votes(pool: str) -> Votes:
        return lambda train, test, groups: {f"linear_{pool}": linear_votes(train, test, groups, options.seed)}

    return join(measured(bench, subject, pool, votes(pool)) for pool in chosen_pools(subject, options, subject.pools))


def measured(bench: Bench, subject: Subject, pool: str, votes: Votes) -> Result:
    """`ranked` of the scores that the test images get."""
    (part, rows), (test, _) = (bench.features(subject, split, pool) for split in ("train", "test"))
    ranks, groups, classes = bench.runtime.ranks, bench.data.train.groups, bench.data.classes
    train = Parts(ranks=ranks).whole(part)
    together = Parts(None if groups is None else groups.to(rows.device)[ranks.gather_rows(rows)])
    return join(ranked(name, scores, test.labels, classes) for name, scores in votes(train, test, together).items())


def knn_votes(train: Labelled, test: Labelled, _: Parts) -> dict[str, Tensor]:
    """ "knn<k>" for each number in `knn.KS`: (M, C) in [0, 1]; neighbours weigh as in `knn.classify`."""
    index, cosine = knn.nearest(train.features, test.features, max(knn.KS))
    weights, found = ((cosine - 1) / knn.TEMPERATURE).exp(), {}
    for k in knn.KS:
        rows = zip(index[:, :k], weights[:, :k], strict=True)  # one image at a time: C may be large
        found[f"knn{k}"] = torch.stack([weight @ train.labels[row].float() / weight.sum() for row, weight in rows])
    return found


def linear_votes(train: Labelled, test: Labelled, groups: Parts, seed: int) -> Tensor:
    """(M, C) log-odds; 0 for a class that all training images are of, or none. C is chosen by whole groups."""
    scores = test.features.new_zeros(len(test.features), train.labels.shape[1])
    scaled, others = linear.standardise(train.features, test.features)
    for number, labels in enumerate(train.labels.long().T.contiguous()):
        if 0 < int(labels.sum()) < len(labels):
            c = linear.choose_c(Labelled(train.features, labels), 2, groups, seed=seed)
            logits = next(linear.fit(scaled, labels, 2, (c,))).logits(others)
            scores[:, number] = logits[:, 1] - logits[:, 0]
    return scores


def ranked(name: str, scores: Tensor, tags: Tensor, classes: tuple[str, ...]) -> Result:
    """How well scores, (M, C), rank the images of each class above the others; tags are (M, C) of 0 and 1.

    Returns:
        figures, in [0, 1]: NAME_map, the mean over classes of the average precision, and NAME_auroc, of the area under
        the ROC curve (0.5: chance); classes that all test images are of, or none, are left out. details, under NAME:
        of each class its images and both figures.

    Raises:
        DataError: no class is left.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    rows: list[dict[str, Any]] = []
    for word, guesses, truth in zip(classes, scores.cpu().T.numpy(), tags.cpu().T.numpy(), strict=True):
        is_mixed = 0 < truth.sum() < len(truth)
        ap = float(average_precision_score(truth, guesses)) if is_mixed else None
        area = float(roc_auc_score(truth, guesses)) if is_mixed else None
        rows.append({"class": word, "images": int(truth.sum()), "ap": ap, "auroc": area})
    known = [row for row in rows if row["ap"] is not None]
    notes: tuple[str, ...] = ()
    if lost := len(rows) - len(known):
        notes = (f"{lost} of {len(rows)} classes are left out: test images have all of them or none",)
    if not known:
        raise DataError("no class is of some test images but not of all", "give other test images")
    figures = {f"{name}_{end}": mean(row[key] for row in known) for end, key in (("map", "ap"), ("auroc", "auroc"))}
    return Result(figures, {name: {"per_class": rows}}, notes)
