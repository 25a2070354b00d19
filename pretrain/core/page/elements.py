"""Parts of a page: the document, tables, facts and embedded pictures. All text of users is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pretrain.core.page.style import STYLE
from pretrain.core.text import html

# Nothing may be loaded or run, so that a page that needs a file or a script fails visibly.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """One HTML page of a body, without script, that loads nothing."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def header(title: str, subtitle: str, warnings: Sequence[str] = ()) -> str:
    """The title of the page, a pale line, and warnings in sections of their own."""
    lines = "".join(f'<section class="warn">{html(line)}</section>' for line in warnings)
    return f'<h1>{html(title)}</h1><div class="pale path">{html(subtitle)}</div>{lines}'


def number(value: Any) -> str:
    """0.7312 as "0.731", 12 as "12", nothing as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def cell(value: object, *, bar: bool = False) -> str:
    """A cell of a table; bar: a number in [0, 1] is drawn too."""
    if isinstance(value, str):
        return f'<td class="text">{html(value)}</td>'
    drawn = ""
    if bar and isinstance(value, float) and 0 <= value <= 1:
        drawn = f'<span class="bar"><i style="width:{value:.1%}"></i></span>'
    return f"<td>{drawn}{number(value)}</td>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, bar: str | None = None) -> str:
    """A table with a line for each of `rows`; the numbers of column `bar` are drawn too."""
    words = [bool(rows) and all(isinstance(row[place], str) for row in rows) for place in range(len(columns))]
    head = "".join(
        f'<th class="text">{html(name)}</th>' if is_text else f"<th>{html(name)}</th>"
        for name, is_text in zip(columns, words, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(cell(value, bar=name == bar) for name, value in zip(columns, row, strict=True))}</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def facts(title: str, values: Mapping[str, str]) -> str:
    """A section of names and values; a value of several lines is collapsed."""
    short = {name: value for name, value in values.items() if "\n" not in value}
    rows = "".join(
        f'<tr><td>{html(name)}</td><td class="text path">{html(value)}</td></tr>' for name, value in short.items()
    )
    long = "".join(
        f"<details><summary>{html(name)}</summary><pre>{html(value, lines=True)}</pre></details>"
        for name, value in values.items()
        if name not in short
    )
    return f"<section><h2>{html(title)}</h2><table>{rows}</table>{long}</section>"


def photo(name: str, picture: np.ndarray, caption: str) -> str:
    """uint8 [h, w, 3] as an embedded JPEG with a caption, which is HTML already."""
    return f'<figure><img alt="{html(name)}" src="{_jpeg(picture)}"><figcaption>{caption}</figcaption></figure>'


def figure(name: str, png: bytes) -> str:
    """An embedded PNG of a figure drawn at 130 dots per inch."""
    size = Image.open(io.BytesIO(png)).size[0] * 3 // 4
    return f'<img alt="{html(name)}" width="{size}" style="max-width:100%" src="{_data(png, "png")}">'


def _jpeg(picture: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=90, subsampling=0)
    return _data(data.getvalue(), "jpeg")


def _data(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
