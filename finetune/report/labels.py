"""A classified image: its class or labels, the prediction, and its probabilities."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageDraw

from finetune.report import canvas
from finetune.report.canvas import FALSE, INK, PALE, RIGHT
from pretrain.core.page.colours import RGB

_WIDTH, _ROW, _TOP, _MOST = 330, 34, 5, 15


def classification_picture(
    image: np.ndarray,
    truth: int | None,
    probabilities: np.ndarray | None,
    classes: Sequence[str],
    *,
    caption: str = "",
) -> np.ndarray:
    """The image and its five most likely classes as bars, the true one in green: uint8 [h, w, 3].

    Args:
        image: uint8 [H, W, 3]. truth: its class, None or -1 if unknown. probabilities: [K].
    """
    known = truth is not None and truth >= 0
    title = f"truth: {classes[truth]}" if known and truth is not None else "image"
    image, brighter = canvas.brightened(image)
    parts = [(title + brighter, canvas.resized(image, canvas.view_scale(*image.shape[:2])))]
    if probabilities is not None:
        likely = [int(i) for i in np.argsort(-probabilities, kind="stable")[:_TOP]]
        verdict = "prediction"
        if known:
            verdict = "right" if likely[0] == truth else f"wrong: {classes[likely[0]]}"
        rows = [*likely, truth] if known and truth is not None and truth not in likely else likely
        true, false = ({truth}, {likely[0]} - {truth}) if known and truth is not None else (set[int](), set[int]())
        parts.append((verdict, _bars(rows, true, false, probabilities, classes, parts[0][1].shape[0])))
    return canvas.panels(parts, caption=caption)


def multi_label_picture(
    image: np.ndarray,
    truth: np.ndarray | None,
    probabilities: np.ndarray | None,
    classes: Sequence[str],
    *,
    threshold: float,
) -> np.ndarray:
    """The image and its most likely labels as bars, the true ones in green, false ones in red: uint8 [h, w, 3].

    Args:
        image: uint8 [H, W, 3]. truth: [K], above 0 for its labels; None if unknown. probabilities: [K].
    """
    true = set() if truth is None else set(np.flatnonzero(truth > 0).tolist())
    title = "image" if truth is None else f"truth: {', '.join(classes[i] for i in sorted(true)) or 'no label'}"
    image, brighter = canvas.brightened(image)
    parts = [(title + brighter, canvas.resized(image, canvas.view_scale(*image.shape[:2])))]
    if probabilities is not None:
        order = np.argsort(-probabilities, kind="stable").tolist()
        found = {i for i in order if probabilities[i] >= threshold}
        rows = [i for place, i in enumerate(order) if place < _TOP or i in found | true]
        verdict = (
            "prediction"
            if truth is None
            else f"{len(found & true)} right, {len(found - true)} false, {len(true - found)} missed"
        )
        false = set() if truth is None else found - true
        parts.append((verdict, _bars(rows[:_MOST], true, false, probabilities, classes, parts[0][1].shape[0])))
    return canvas.panels(parts)


def _bars(
    rows: Sequence[int],
    true: Collection[int],
    false: Collection[int],
    probabilities: np.ndarray,
    classes: Sequence[str],
    height: int,
) -> np.ndarray:
    """A bar for each of the classes `rows`; one that is not among the first is named with its rank."""
    sheet = Image.new("RGB", (_WIDTH, max(height, _ROW * len(rows))), canvas.PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, index in enumerate(rows):
        rank = 1 + int((probabilities > probabilities[index]).sum())
        name = classes[index] if line < _TOP else f"{rank}. {classes[index]}"
        top, share = line * _ROW, float(probabilities[index])
        tint: RGB = RIGHT if index in true else FALSE if index in false else (150, 165, 180)
        draw.rectangle((0, top + 19, _WIDTH - 1, top + 27), fill=(236, 239, 241))
        draw.rectangle((0, top + 19, max(1, round((_WIDTH - 1) * share)), top + 27), fill=tint)
        bold = index in true
        draw.text(
            (0, top + 2), canvas.shortened(name, _WIDTH - 60, bold=bold), fill=INK, font=canvas.font(13, bold=bold)
        )
        text = f"{share:.1%}"
        draw.text((_WIDTH - canvas.font(13).getlength(text), top + 2), text, fill=PALE, font=canvas.font(13))
    return np.array(sheet)
