"""Contact sheets: small pictures in rows, each over two lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pretrain.core.text import shown

_CELL, _TEXT = 160, 30


@dataclass(frozen=True)
class Cell:
    """pixels: values of 0 to 255, [H, W, C], of which the first one or three channels are drawn; or why there are none.
    title, note: lines of text below."""

    pixels: np.ndarray | str
    title: str
    note: str = ""


def draw_sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """The cells from left to right, `columns` in a row."""
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * _CELL, rows * (_CELL + _TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for i, cell in enumerate(cells):
        left, top = i % columns * _CELL, i // columns * (_CELL + _TEXT)
        if isinstance(cell.pixels, str):
            draw.rectangle((left + 4, top + 2, left + _CELL - 5, top + _CELL - 3), fill="lightgray")
            draw.text((left + 8, top + _CELL // 2), _fit(cell.pixels), fill="darkred", font=font)
        else:
            pixels = cell.pixels.round().astype(np.uint8)
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] < 3 else np.ascontiguousarray(pixels[..., :3]))
            image.thumbnail((_CELL - 8, _CELL - 4))
            sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        draw.text((left + 4, top + _CELL), _fit(cell.title), fill="black", font=font)
        draw.text((left + 4, top + _CELL + 13), _fit(cell.note), fill="gray", font=font)
    return sheet


def _fit(text: str) -> str:
    text = shown(text).encode("ascii", "replace").decode()
    return text if len(text) <= 26 else f"...{text[-23:]}"
