"""Scores as tables: the worst classes first, the most frequent mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.metrics.metric import Scores

_SHOWN_MISTAKES = 12
_CARDS = 8


def grouped(values: Mapping[str, float]) -> tuple[list[str], dict[str, dict[str, float]]] | None:
    """Numbers such as box_ap, box_ap50, mask_ap, ... as a table: (columns, rows by the part before the first
    "_"). None: they have no common columns, or are few.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, _, column = name.partition("_")
        rows.setdefault(group, {})[column] = value
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    fits = len(values) > _CARDS and len(rows) * len(columns) == len(values) and "" not in columns
    return (columns, rows) if fits else None


def sort_column(scores: Scores) -> str | None:
    """The column of `per_class` for the primary number: the one of its name, or else the first of fractions."""
    columns = columns_of(scores.per_class)
    primary = scores.primary[0]
    fractional = [name for name in columns if any(isinstance(row.get(name), float) for row in scores.per_class)]
    named = [name for name in fractional if name in (primary, primary.rsplit("/", 1)[-1])]
    return (named or fractional or [None])[0]


def worst_first(scores: Scores) -> list[dict[str, Any]]:
    """The rows of the classes, the worst first; those without a number last."""
    column = sort_column(scores)
    if column is None:
        return list(scores.per_class)

    def place(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = row.get(column)
        known = isinstance(value, int | float) and math.isfinite(value)
        return not known, float(value) if known else 0.0  # pyright: ignore[reportArgumentType]

    return sorted(scores.per_class, key=place)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys of the rows, "name" first."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    return sorted(names, key=lambda name: name != "name")


def mistakes(confusion: np.ndarray, classes: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """(true class, predicted class, count, number of images of the true class), the most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    totals = confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN_MISTAKES]
    cells = [divmod(int(place), len(classes)) for place in order if wrong.flat[place]]
    return [(classes[i], classes[j], int(wrong[i, j]), int(totals[i])) for i, j in cells]
