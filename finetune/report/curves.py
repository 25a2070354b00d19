"""Figures of a run: confusion matrix, precision over recall. PNG bytes, no display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from finetune.report import canvas
from pretrain.core.page.colours import colour, hexadecimal

_NUMBERED = 25  # number of classes whose counts fit into the cells of a confusion matrix
_LONG = 10_000  # counts from this on do not fit: shares are written instead
_NAMED = 60  # number of classes whose names fit next to it
_CURVES = 10  # number of classes in the legend of a precision-recall figure
_GRAY, _INK = "#6e757d", "#212529"


def confusion_figure(confusion: np.ndarray, classes: Sequence[str]) -> bytes:
    """Counts [K, K], rows the truth: coloured by the share of their row, so that rare classes are visible too."""
    count = len(classes)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    side = float(np.clip(1.8 + 0.36 * count, 4.0, 13.0))
    figure, axes = _figure(side + 1.2, side)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= _NUMBERED:
        pixels_counted = confusion.max() >= _LONG
        for row, column in zip(*np.nonzero(confusion), strict=True):
            ink = "white" if shares[row, column] > 0.55 else _INK
            text = f"{shares[row, column]:.0%}" if pixels_counted else str(confusion[row, column])
            if text != "0%":
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8 if len(text) < 4 else 6)
    if count <= _NAMED:
        small = 8 if count <= 30 else 6
        names = [legible(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=90, fontsize=small)
        axes.set_yticks(range(count), names, fontsize=small)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02, label="share of the true class")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return as_png(figure)


def precision_recall_figure(curves: Mapping[str, Any], *, title: str = "") -> bytes:
    """`curves` {name: {"recall": [n], "precision": [n]}}; more than ten are drawn pale, with a strong mean."""
    figure, axes = _figure(5.6, 4.4)
    many = len(curves) > _CURVES
    for place, (name, curve) in enumerate(curves.items()):
        tint = "#b8c4d0" if many else hexadecimal(colour(place))
        width = 0.8 if many else 1.8
        label = None if many else legible(name)
        axes.plot(curve["recall"], curve["precision"], color=tint, linewidth=width, label=label)
    if many:
        recall = np.linspace(0, 1, 101)
        parts = [np.interp(recall, c["recall"], c["precision"], right=0.0) for c in curves.values()]
        axes.plot(recall, np.mean(parts, axis=0), color=hexadecimal(colour(0)), linewidth=2.4,
                  label=f"mean of {len(curves)} classes")  # fmt: skip
    axes.set(xlim=(0, 1.005), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=title)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return as_png(figure)


def pixels(png: bytes) -> np.ndarray:
    """A PNG as uint8 [h, w, 3]."""
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def as_png(figure: Figure) -> bytes:
    """The bytes of a PNG."""
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def legible(name: str) -> str:
    """A name for a figure: "$" is escaped, and a space precedes a leading "_", which would hide it."""
    name = canvas.drawable(name if len(name) <= 26 else name[:25] + "…").replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRAY)
    axes.title.set_fontsize(10)
    return figure, axes
