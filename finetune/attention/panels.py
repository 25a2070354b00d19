"""The use of the branches of general blocks as lines of a table, as JSON, and as pictures: blocks x branches, a panel
per class or task, above the same panels of groups drawn by lot."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from finetune.attention.choices import Choice, Comparison, Use
from finetune.report.curves import as_png, legible
from pretrain.core.page import elements
from pretrain.core.text import html

COLUMNS = ("images", "general block", "mean p |g|", "groups", "between", "by chance", "p", "")
SHOWN = 7  # panels of groups side by side
MEANING = """
p |g| of a branch: the share that the router gives it, times the mean size of its strength over the channels. Between:
the share of its variance over the images that is between the groups. By chance: the same where the labels are shuffled.
p: how often shuffled labels reach at least as much (permutation test, one value per block); "depends on it" where p
times the number of blocks is at most 0.05. It says that the groups differ, not why: classes and tasks differ in
brightness and background too. Lower panels: groups as large as the upper ones, drawn by lot; what is no stronger above
than below is no pattern.
"""


def rows(uses: Sequence[Use], compared: Sequence[Comparison]) -> list[list[str]]:
    """Of each data set the mean use by block, then of each comparison its test by block; see `COLUMNS`."""
    found = [
        [use.task, block, _in_words(branches, use.values[block].mean(0)), "", "", "", "", ""]
        for use in uses
        for block, branches in use.blocks.items()
    ]
    for of in compared:
        for block, choice in of.choices.items():
            numbers = [f"{choice.between:.3f}", f"{choice.by_chance:.3f}", f"{choice.p:.4f}"]
            words = _in_words(of.blocks[block], of.overall[block])
            found.append([f"by {of.by}", block, words, str(len(of.groups)), *numbers, of.verdict(block)])
    return found


def as_json(uses: Sequence[Use], compared: Sequence[Comparison]) -> dict[str, Any]:
    """Under "branches": p |g| over all images and by group; nothing without a general block."""
    if not uses:
        return {}
    use = [
        {
            "task": use.task,
            "images": use.images,
            "blocks": {block: _named(names, use.values[block].mean(0)) for block, names in use.blocks.items()},
        }
        for use in uses
    ]
    groups = [
        {
            "by": of.by,
            "images": dict(zip(of.groups, of.sizes, strict=True)),
            "blocks": {
                block: {
                    "between": choice.between,
                    "by chance": choice.by_chance,
                    "p": choice.p,
                    "verdict": of.verdict(block),
                    "use": _by_group(of, block, choice.means),
                    "use with shuffled labels": _by_group(of, block, choice.shuffled),
                }
                for block, choice in of.choices.items()
            },
        }
        for of in compared
    ]
    return {"branches": {"use": use, "compared": groups}}


def section(uses: Sequence[Use], compared: Sequence[Comparison]) -> str:
    """Of the page; empty without a general block."""
    if not uses:
        return ""
    pictures = [("Mean p |g| over all images", as_png(_level_figure(uses)))]
    for of in compared:
        more = f", the {SHOWN} largest of {len(of.groups)} groups" if len(of.groups) > SHOWN else ""
        title = f"By {of.by}{more}: mean p |g| minus that of all images"
        pictures.append((title, as_png(_groups_figure(of))))
    drawn = "".join(f"<h3>{html(title)}</h3>{elements.figure(title, png)}" for title, png in pictures)
    return (
        f"<section><h2>Which images use which branches</h2>{drawn}"
        + elements.table(COLUMNS, rows(uses, compared))
        + f'<p class="pale">{html(" ".join(MEANING.split()))}</p></section>'
    )


def _level_figure(uses: Sequence[Use]) -> Figure:
    names = _branches(uses[0].blocks)
    levels = [_matrix(use.blocks, names, {b: use.values[b].mean(0) for b in use.blocks}) for use in uses]
    titles = [_title(use.task, use.images) for use in uses]
    return _panels([levels], [titles], uses[0].blocks, names, cmap="viridis", low=0.0, high=_largest([levels]))


def _groups_figure(of: Comparison) -> Figure:
    largest = sorted(np.argsort([-size for size in of.sizes], kind="stable")[:SHOWN].tolist())
    names = _branches(of.blocks)

    def deviations(means: Callable[[Choice], np.ndarray]) -> list[np.ndarray]:
        return [
            _matrix(of.blocks, names, {b: means(c)[g] - of.overall[b] for b, c in of.choices.items()}) for g in largest
        ]

    lines = [deviations(lambda choice: choice.means), deviations(lambda choice: choice.shuffled)]
    titles = [
        [_title(of.groups[g], of.sizes[g]) for g in largest],
        [_title("shuffled", of.sizes[g]) for g in largest],
    ]
    high = _largest(lines)
    return _panels(lines, titles, of.blocks, names, cmap="RdBu_r", low=-high, high=high)


def _panels(
    lines: Sequence[Sequence[np.ndarray]],
    titles: Sequence[Sequence[str]],
    blocks: Mapping[str, Sequence[str]],
    branches: Sequence[str],
    *,
    cmap: str,
    low: float,
    high: float,
) -> Figure:
    count = len(lines[0])
    size = (2.6 + count * max(0.9, 0.3 * len(branches)), len(lines) * (1.5 + 0.22 * len(blocks)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    all_axes = figure.subplots(len(lines), count, squeeze=False)
    for line, panels in enumerate(lines):
        for place, values in enumerate(panels):
            axes = all_axes[line, place]
            axes.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto")
            axes.set_facecolor("#dee2e6")  # a block has no such branch
            axes.set_title(titles[line][place], fontsize=7)
            axes.set_xticks(range(len(branches)), branches, rotation=90, fontsize=7)
            shown = list(blocks) if place == 0 else [""] * len(blocks)
            axes.set_yticks(range(len(blocks)), shown, fontsize=7)
            axes.tick_params(length=0)
    figure.colorbar(all_axes[0, 0].images[0], ax=all_axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _title(group: str, images: int) -> str:
    return textwrap.fill(legible(group), 15) + f"\n{images} images"


def _matrix(
    blocks: Mapping[str, Sequence[str]], branches: Sequence[str], values: Mapping[str, np.ndarray]
) -> np.ndarray:
    """[blocks, branches]; NaN: a block has no such branch."""
    found = np.full((len(blocks), len(branches)), np.nan)
    for row, (block, names) in enumerate(blocks.items()):
        found[row, [branches.index(name) for name in names]] = values[block]
    return found


def _branches(blocks: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in blocks.values() for name in names))


def _largest(lines: Sequence[Sequence[np.ndarray]]) -> float:
    return max(float(np.nanmax(np.abs(lines))), 1e-9)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _by_group(of: Comparison, block: str, means: np.ndarray) -> dict[str, dict[str, float]]:
    return {group: _named(of.blocks[block], row) for group, row in zip(of.groups, means, strict=True)}


def _in_words(names: Sequence[str], values: np.ndarray) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in _named(names, values).items())
