"""Colours of classes, objects and lines: the same number has the same colour in every picture and chart."""

from __future__ import annotations

import colorsys

RGB = tuple[int, int, int]

# Ten colours of about the same strength; further ones step around the colour circle by the golden angle.
_FIRST: tuple[RGB, ...] = (
    (31, 119, 220), (44, 175, 60), (150, 95, 210), (0, 190, 205), (240, 190, 30),
    (240, 100, 190), (150, 90, 65), (190, 215, 60), (225, 45, 60), (120, 140, 160),
)  # fmt: skip


def colour(index: int) -> RGB:
    """The colour of class (or object, or line) `index`."""
    if 0 <= index < len(_FIRST):
        return _FIRST[index]
    hue = (index * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (index % 3) / 2, 0.95 - 0.25 * (index % 4) / 3)
    return round(red * 255), round(green * 255), round(blue * 255)


def hexadecimal(tint: RGB) -> str:
    """As HTML and matplotlib write it: "#1f77dc"."""
    return "#{:02x}{:02x}{:02x}".format(*tint)
