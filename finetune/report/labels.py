"""A classified image: its class, the prediction, and its probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from finetune.report import canvas
from finetune.report.canvas import FALSE, INK, PALE, RGB, RIGHT

_WIDTH, _ROW, _TOP = 330, 34, 5


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
        parts.append((verdict, _bars(truth if known else None, probabilities, likely, classes, parts[0][1].shape[0])))
    return canvas.panels(parts, caption=caption)


def _bars(
    truth: int | None, probabilities: np.ndarray, likely: list[int], classes: Sequence[str], height: int
) -> np.ndarray:
    rows: list[tuple[int, str]] = [(index, classes[index]) for index in likely]
    if truth is not None and truth not in likely:
        place = 1 + int((probabilities > probabilities[truth]).sum())
        rows.append((truth, f"{place}. {classes[truth]}"))
    sheet = Image.new("RGB", (_WIDTH, max(height, _ROW * len(rows))), canvas.PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, (index, name) in enumerate(rows):
        top, share = line * _ROW, float(probabilities[index])
        tint: RGB = RIGHT if index == truth else FALSE if line == 0 and truth is not None else (150, 165, 180)
        draw.rectangle((0, top + 19, _WIDTH - 1, top + 27), fill=(236, 239, 241))
        draw.rectangle((0, top + 19, max(1, round((_WIDTH - 1) * share)), top + 27), fill=tint)
        bold = index == truth
        draw.text(
            (0, top + 2), canvas.shortened(name, _WIDTH - 60, bold=bold), fill=INK, font=canvas.font(13, bold=bold)
        )
        text = f"{share:.1%}"
        draw.text((_WIDTH - canvas.font(13).getlength(text), top + 2), text, fill=PALE, font=canvas.font(13))
    return np.array(sheet)
