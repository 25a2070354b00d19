"""Pictures for the report: panels side by side under their titles, a legend and a caption, in legible text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pretrain.core.page.colours import RGB

# Okabe and Ito 2008 ("Color Universal Design"): distinguishable with colour blindness too.
RIGHT: RGB = (0, 190, 140)
FALSE: RGB = (230, 80, 20)
MISSED: RGB = (255, 225, 50)
CONFUSED: RGB = (215, 100, 190)
INK: RGB = (33, 37, 41)
PALE: RGB = (110, 117, 125)
PAPER: RGB = (255, 255, 255)

MIN_SIDE, MAX_SIDE = 320, 640  # of a panel's longer side, in pixels
_GAP, _TITLE, _LINE = 8, 24, 22


def ink_on(background: RGB) -> RGB:
    """Black or white, whichever is more legible on `background` (ITU-R BT.601 luma)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which is part of matplotlib and covers most scripts."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def view_scale(height: int, width: int) -> float:
    """The factor that brings the longer side of an image within MIN_SIDE to MAX_SIDE pixels."""
    longer = max(height, width)
    return min(max(1.0, MIN_SIDE / longer), MAX_SIDE / longer) if longer else 1.0


def brightened(image: np.ndarray) -> tuple[np.ndarray, str]:
    """uint8 [H, W, 3] with visible content, and what was changed, for its title; only dark images change."""
    bright = float(np.percentile(image.max(axis=2), 99.5)) if image.size else 255.0
    if bright >= 100:
        return image, ""
    factor = 200 / max(bright, 4.0)
    return (image * factor).clip(0, 255).astype(np.uint8), f", brightened {factor:.1f}x"


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """uint8 [H, W, 3] photo enlarged or reduced by `scale`, smoothly."""
    size = view_size(image.shape[0], image.shape[1], scale)
    if size == image.shape[:2]:
        return image.copy()
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def resized_map(values: np.ndarray, scale: float) -> np.ndarray:
    """[H, W] of any type enlarged or reduced by `scale`, to the nearest value, so that no new value appears."""
    rows, columns = view_size(values.shape[0], values.shape[1], scale)
    down = np.minimum(((np.arange(rows) + 0.5) * values.shape[0] / rows).astype(int), values.shape[0] - 1)
    across = np.minimum(((np.arange(columns) + 0.5) * values.shape[1] / columns).astype(int), values.shape[1] - 1)
    return values[down[:, None], across]


def view_size(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, round(height * scale)), max(1, round(width * scale))


def blend(image: np.ndarray, where: np.ndarray, tint: RGB, *, alpha: float) -> None:
    """Mix `tint` into the pixels `where` (bool [H, W]) of uint8 [H, W, 3], in place."""
    image[where] = (image[where] * (1 - alpha) + np.array(tint) * alpha).round().astype(np.uint8)


def outline(mask: np.ndarray, *, width: int = 1) -> np.ndarray:
    """The border pixels of a bool [H, W], `width` pixels thick and within it."""
    from scipy.ndimage import binary_erosion

    return mask & ~np.asarray(binary_erosion(mask, iterations=width, border_value=0), bool)


def write_on(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, background: RGB, *, size: int = 12):
    """A label on its own background, kept within the picture; `place` is its lower left corner."""
    text = drawable(text)
    left, top, right, bottom = font(size).getbbox(text)
    width, height = right - left + 6, bottom - top + 4
    canvas: Any = draw.im
    x = min(max(place[0], 0), max(canvas.size[0] - width, 0))
    y = min(max(place[1] - height, 0), max(canvas.size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=background)
    draw.text((x + 3 - left, y + 2 - top), text, fill=ink_on(background), font=font(size))


def drawable(text: str) -> str:
    """`text` with a replacement character for control characters and for bytes of a file name that are not UTF-8."""
    return "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)


def shortened(text: str, width: float, *, size: int = 13, bold: bool = False) -> str:
    """`text`, cut with an ellipsis to `width` pixels; see `drawable`."""
    text = drawable(text)
    if font(size, bold=bold).getlength(text) <= width:
        return text
    while text and font(size, bold=bold).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def panels(
    parts: Sequence[tuple[str, np.ndarray]],
    *,
    legend: Sequence[tuple[RGB, str]] = (),
    caption: str = "",
) -> np.ndarray:
    """One picture, uint8 [h, w, 3]: uint8 panels [H, W, 3] in a row, each under its title; below them legend, caption.

    Args:
        legend: colours and their meaning, broken into lines.
        caption: one line, cut if it is too long.
    """
    height = max(panel.shape[0] for _, panel in parts)
    width = sum(panel.shape[1] for _, panel in parts) + _GAP * (len(parts) + 1)
    lines = _lines(legend, width)
    total = _GAP + _TITLE + height + _GAP + _LINE * (len(lines) + bool(caption))
    sheet = Image.new("RGB", (width, total), PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _GAP
    for title, panel in parts:
        draw.text(
            (left, _GAP), shortened(title, panel.shape[1], size=14, bold=True), fill=INK, font=font(14, bold=True)
        )
        sheet.paste(Image.fromarray(panel), (left, _GAP + _TITLE))
        left += panel.shape[1] + _GAP
    top = _GAP + _TITLE + height + _GAP
    for line in lines:
        left = _GAP
        for swatch, text in line:
            draw.rectangle((left, top + 3, left + 14, top + 15), fill=swatch, outline=PALE)
            draw.text((left + 19, top + 1), text, fill=INK, font=font(13))
            left += 19 + font(13).getlength(text) + 16
        top += _LINE
    if caption:
        draw.text((_GAP, top), shortened(caption, width - 2 * _GAP), fill=PALE, font=font(13))
    return np.array(sheet)


def _lines(legend: Sequence[tuple[RGB, str]], width: int) -> list[list[tuple[RGB, str]]]:
    lines: list[list[tuple[RGB, str]]] = []
    used = float(width)
    for swatch, text in legend:
        text = shortened(text, width - 2 * _GAP - 35)
        needed = 35 + font(13).getlength(text)
        if used + needed > width - _GAP:
            lines.append([])
            used = float(_GAP)
        lines[-1].append((swatch, text))
        used += needed
    return lines
