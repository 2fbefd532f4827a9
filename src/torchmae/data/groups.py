"""Groups: samples of one patient, scene, record or clip, of which a split never takes only a part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmae.data.sources import Source
from torchmae.errors import ConfigError, DataError
from torchmae.random import Purpose, permutation

Groups = npt.NDArray[np.str_]

# A file's name up to its last three, two or one numbers (of a tile: date, row, column), or its path up to the last one.
_COORDINATES = tuple(rf"([^/]*?)(?:[ _-][A-Za-z]*[ _-]?\d++){{{count}}}[^\d/]*$" for count in (3, 2))
_PARTS = (*_COORDINATES, r"([^/]*?)[ _-]?\d+[^\d/]*$", r"(.*?)[ _-]?\d+[^\d/]*$")
_FEWEST_GROUPS = dict.fromkeys(_COORDINATES, 3)  # fewer may be kinds of images
_FEWEST = 3  # images of a group, on average, from which on names look like those of frames or tiles


def name_groups(splits: Mapping[str, Source], group: str | None) -> None:
    """Gives the sources of all splits their `groups`: those of a column, which they have, or of a pattern on names.

    ConfigError: a column that the data does not have. DataError: a name that the pattern does not match.
    """
    if group is None or all(source.groups is not None for source in splits.values()):
        return
    if "(" not in group:
        fix = r"name a column of a list or an array, or give a pattern with the group in parentheses: '(case_\d+)'"
        raise ConfigError(f"data.group is {group!r}, and the data has no such column", fix)
    pattern = re.compile(group)
    for source in splits.values():
        matches = [pattern.search(source.name(i)) for i in range(len(source))]
        # Of alternatives, such as '(case_\d+)|(p\d+)', the one that was found.
        found = [match and next((part for part in match.groups() if part is not None), None) for match in matches]
        if None in found:
            name = source.name(found.index(None))
            raise DataError(f"data.group {group!r} finds no group in {name}", "give a pattern that matches every name")
        source.groups = np.array(found, dtype=np.str_)


def hold_out_groups(groups: npt.NDArray[Any], count: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """(N,) which samples are held out: whole groups, at most `count` samples, or else the smallest group.

    None of them where all samples are of one group.
    """
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(names), dtype=bool)
    taken = 0
    count = min(count, len(groups) - 1)
    for group in permutation(seed, 0, len(names), Purpose.HOLD_OUT):
        if taken + sizes[group] <= count:
            chosen[group] = True
            taken += int(sizes[group])
    if not chosen.any() and len(names) > 1:
        chosen[sizes.argmin()] = True
    return chosen[numbers]


def shared_groups(train: Source, test: Source) -> tuple[str, ...]:
    """A note where some groups of the test images are groups of the training images too."""
    if train.groups is None or test.groups is None:
        return ()
    tested = np.unique(test.groups)
    shared = np.intersect1d(tested, train.groups)
    if not len(shared):
        return ()
    return (
        f"{len(shared)} of {len(tested)} groups of the held-out images ({shared[0]}, ...) are groups of the training "
        "images too: held-out figures are too optimistic",
    )


def proposed_group(names: Sequence[str], labels: npt.ArrayLike | None = None) -> str | None:
    """A pattern for `data.group` where names look like frames, tiles or slices of fewer things; else None."""
    for pattern in _PARTS:
        found = [re.search(pattern, name) for name in names]
        if None in found:
            continue
        groups, numbers = np.unique([match[1] if match else "" for match in found], return_inverse=True)
        fewest = _FEWEST_GROUPS.get(pattern, 2)
        if not fewest <= len(groups) <= len(names) / _FEWEST or any(group.endswith("/") for group in groups):
            continue
        if labels is not None:  # the groups may only repeat the classes: cat_1.jpg, dog_1.jpg
            pairs = np.unique(np.stack([numbers, np.asarray(labels)]), axis=1)
            if pairs.shape[1] == len(np.unique(pairs[1])):
                continue
        return pattern
    return None
