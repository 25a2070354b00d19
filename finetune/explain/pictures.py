"""Pictures of maps: each method's over the image, and the attention of every block and head."""

from __future__ import annotations

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from finetune.explain.study import Explained
from finetune.report import canvas
from finetune.report.canvas import INK, MISSED, PAPER, RIGHT

SIDE = 200  # pixels of a map's longer side
HEAD_SIDE = 88
_GAP, _LABEL = 4, 18
_COLOURS = "inferno"


def maps_picture(one: Explained) -> np.ndarray:
    """The image with its true region and the detected box, then every map over it: uint8 [h, w, 3]."""
    scale = SIDE / max(one.view.shape[:2])
    image = canvas.resized(one.view, scale)
    marked = image.copy()
    if one.region is not None:
        canvas.blend(marked, canvas.outline(canvas.resized_map(one.region, scale), width=2), RIGHT, alpha=1.0)
    if one.aim.box is not None:
        sheet = Image.fromarray(marked)
        ImageDraw.Draw(sheet).rectangle([float(value) * scale for value in one.aim.box.tolist()], outline=MISSED)
        marked = np.array(sheet)
    parts = [(one.aim.text, marked)]
    parts += [(name.replace("_", " "), overlay(image, values)) for name, values in one.maps.items()]
    return canvas.panels(parts)


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] darkened and coloured by a map [rows, columns]: its positive part, the largest is brightest."""
    positive = np.clip(values, 0, None)
    share = positive / max(float(positive.max()), 1e-12)
    size = (image.shape[1], image.shape[0])
    smooth = np.array(Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    colours = matplotlib.colormaps[_COLOURS](smooth)[..., :3] * 255
    strength = 0.35 + 0.45 * smooth[..., None]
    gray = image.mean(axis=2, keepdims=True)
    return (gray * (1 - strength) + colours * strength).round().clip(0, 255).astype(np.uint8)


def attention_picture(one: Explained) -> np.ndarray:
    """A row for each layer, a column for each head: what the readers of the answer attend to, uint8 [h, w, 3]."""
    heads = max(len(maps) for maps in one.attention.values())
    rows, columns = next(iter(one.attention.values())).shape[1:]
    scale = HEAD_SIDE / max(rows, columns)
    height, width = canvas.view_size(rows, columns, scale)
    label = int(max(canvas.font(12).getlength(canvas.drawable(name)) for name in one.attention)) + 2 * _GAP
    total = (label + heads * (width + _GAP), _LABEL + len(one.attention) * (height + _GAP))
    sheet = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(sheet)
    for head in range(heads):
        draw.text((label + head * (width + _GAP), 1), f"head {head}", fill=INK, font=canvas.font(12))
    for row, (name, maps) in enumerate(one.attention.items()):
        top = _LABEL + row * (height + _GAP)
        draw.text((_GAP, top + height // 2 - 7), canvas.drawable(name), fill=INK, font=canvas.font(12))
        for head, values in enumerate(maps):
            share = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
            colours = (matplotlib.colormaps[_COLOURS](share)[..., :3] * 255).round().astype(np.uint8)
            sheet.paste(Image.fromarray(canvas.resized_map(colours, scale)), (label + head * (width + _GAP), top))
    return np.array(sheet)
