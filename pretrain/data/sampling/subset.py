"""A part of labelled data, balanced by class: a fraction, or a number of images, of each class.

The 1 % and 10 % protocols of semi-supervised learning (Zhai et al. 2019, "S4L") and k-shot learning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.sampling import keyed

_PURPOSE = keyed.noise_purpose("subset")


def of_each_class(
    labels: np.ndarray,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Ascending indices int64 into `labels` [n]: a fraction of each class and at least one, or `per_class` of each.

    With one seed, a smaller part is contained in a larger one. Labels below 0 are no class: `per_class` omits them.

    Args:
        names: class names, for messages.

    Raises:
        ValueError: a class has fewer than `per_class`.
    """
    chosen = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        shuffled = members[keyed.permutation(seed, label + 1, _PURPOSE, length=len(members))]
        if per_class is None:
            chosen.append(shuffled[: max(1, round((1.0 if fraction is None else fraction) * len(members)))])
        elif label >= 0:
            if per_class > len(members):
                name = label if names is None else names[label]
                raise ValueError(f"per_class {per_class}: class {name} has only {len(members)} images")
            chosen.append(shuffled[:per_class])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
