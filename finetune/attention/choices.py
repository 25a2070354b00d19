"""Which images use which branches of general blocks: by class and by task, beside the same with shuffled labels.

A pattern of classes alone proves nothing: groups of images that are drawn by lot have patterns too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.models.mechanisms.routing import Routing

SHUFFLINGS = 2000
LEVEL = 0.05  # over all blocks of a comparison


@dataclass(frozen=True)
class Use:
    """Of the branches, by the images of one data set.

    Attributes:
        task: its name. blocks: the names of the branches by block. values: p |g|, [n, B] by block.
        labels: int [n]; None: it has none. classes: names by label, where they are known.
    """

    task: str
    blocks: Mapping[str, Sequence[str]]
    values: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    classes: Mapping[int, str]

    @property
    def images(self) -> int:
        return len(next(iter(self.values.values())))


@dataclass(frozen=True)
class Choice:
    """Of one block, between groups of images.

    Attributes:
        means: of p |g|, [G, B] by group. shuffled: the same of groups that are as large and drawn by lot.
        between: share of the variance of p |g| that is between the groups, 0 to 1; 0 where nothing varies.
        by_chance: the mean of that over shufflings of the labels.
        p: share of the shufflings, with the labels as they are among them, that have at least `between`.
    """

    means: np.ndarray
    shuffled: np.ndarray
    between: float
    by_chance: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Of the classes of a data set, or of data sets.

    Attributes:
        by: what the groups are. groups: their names. sizes: images of each.
        blocks: the names of the branches by block. overall: mean p |g| over all images, [B] by block.
    """

    by: str
    groups: list[str]
    sizes: list[int]
    blocks: Mapping[str, Sequence[str]]
    overall: Mapping[str, np.ndarray]
    choices: Mapping[str, Choice]

    def verdict(self, block: str) -> str:
        """By Bonferroni over the blocks."""
        seen = self.choices[block].p * len(self.choices) <= LEVEL
        return "depends on it" if seen else "no dependence seen"


def use_of(
    routing: Mapping[str, Routing], images: int, task: str, labels: np.ndarray | None, classes: Mapping[int, str]
) -> Use:
    """What forward passes over `images` images left in `routing`; a block without a router gives all the same."""
    used = {name: of.used.double().cpu().numpy() for name, of in routing.items()}
    values = {name: np.broadcast_to(found, (images, found.shape[1])) for name, found in used.items()}
    blocks = {name: of.branches[: len(of.strengths)] for name, of in routing.items()}
    return Use(task, blocks, values, labels, classes)


def comparisons(uses: Sequence[Use], seed: int) -> list[Comparison]:
    """The classes of each data set that has several, then the data sets, if there are several.

    Args:
        seed: of the shufflings.
    """
    found = []
    for use in uses:
        if use.labels is not None and len(np.unique(use.labels)) > 1:
            names = {label: f"{label} {use.classes.get(label, '')}".strip() for label in np.unique(use.labels).tolist()}
            found.append(_compared(f"class of {use.task}", use.blocks, use.values, use.labels, names, seed))
    if len(uses) > 1:
        values = {name: np.concatenate([use.values[name] for use in uses]) for name in uses[0].blocks}
        labels = np.repeat(np.arange(len(uses)), [use.images for use in uses])
        names = dict(enumerate(use.task for use in uses))
        found.append(_compared("task", uses[0].blocks, values, labels, names, seed))
    return found


def _compared(
    by: str,
    blocks: Mapping[str, Sequence[str]],
    values: Mapping[str, np.ndarray],
    labels: np.ndarray,
    names: Mapping[int, str],
    seed: int,
) -> Comparison:
    order = np.argsort(labels, kind="stable")
    present, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rows = np.concatenate(list(values.values()), axis=1)[order]
    centred = rows - rows[:1]  # exactly 0 where nothing varies
    centred = centred - centred.mean(0)
    ends = np.cumsum([len(blocks[name]) for name in blocks])
    total = _by_block(np.square(centred).sum(0), ends)

    def means(of: np.ndarray) -> np.ndarray:
        return np.add.reduceat(of, starts) / sizes[:, None]

    def between(of: np.ndarray) -> np.ndarray:
        found = _by_block((np.square(means(of)) * sizes[:, None]).sum(0), ends)
        return np.divide(found, total, out=np.zeros_like(found), where=total > 0)

    generator = np.random.default_rng(seed)
    shuffles = [generator.permutation(len(rows)) for _ in range(SHUFFLINGS)]
    draws = np.stack([between(centred[shuffle]) for shuffle in shuffles])
    true = between(centred)
    p = (1 + (draws >= true * (1 - 1e-9)).sum(0)) / (1 + SHUFFLINGS)  # the rounding of another order of summation
    as_labelled, by_lot = means(rows), means(rows[shuffles[0]])
    choices = {
        name: Choice(
            as_labelled[:, end - len(blocks[name]) : end],
            by_lot[:, end - len(blocks[name]) : end],
            float(true[i]),
            float(draws[:, i].mean()),
            float(p[i]),
        )
        for i, (name, end) in enumerate(zip(blocks, ends.tolist(), strict=True))
    }
    overall = {name: values[name].mean(0) for name in blocks}
    return Comparison(by, [names[int(label)] for label in present], sizes.tolist(), blocks, overall, choices)


def _by_block(sums: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.add.reduceat(sums, np.concatenate([[0], ends[:-1]]))
