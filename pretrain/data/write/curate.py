"""`fovea data curate`: keep images of a list by scores that the list holds, as Pixio selects images of the web.

Yang et al. 2025, "In Pursuit of Pixel Supervision for Visual Pre-training": an image is kept with the probability of
the loss that an earlier MAE has on it, and not at all if it is small or its histogram of colours is poor.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.files import write_text
from pretrain.core.text import shown
from pretrain.data.image_list import ImageList, read_list
from pretrain.data.sampling import keyed

LOSS, HISTOGRAM, HEIGHT, WIDTH = "mae_loss", "histogram_score", "height", "width"
_PURPOSE = keyed.noise_purpose("curate")


@dataclass(frozen=True)
class Scores:
    """Columns of a list, one number per image; empty where they are not read."""

    loss: Sequence[float] = ()
    histogram: Sequence[float] = ()
    height: Sequence[float] = ()
    width: Sequence[float] = ()


@dataclass(frozen=True)
class Rule:
    """by_loss: keep with probability min(1, loss). above: drop histogram scores up to this. min_side: in pixels."""

    by_loss: bool = False
    above: float | None = None
    min_side: float | None = None

    def columns(self) -> list[str]:
        """The names of the columns that it reads."""
        wanted = {LOSS: self.by_loss, HISTOGRAM: self.above is not None}
        sides = self.min_side is not None
        return [name for name, used in {**wanted, HEIGHT: sides, WIDTH: sides}.items() if used]


def kept(count: int, scores: Scores, rule: Rule, draw: Callable[[int], float]) -> list[bool]:
    """Whether each of `count` images is kept.

    Args:
        draw: a number uniform in [0, 1) for the image of an index; called only for images that pass the limits.
    """

    def passes(i: int) -> bool:
        if rule.above is not None and scores.histogram[i] <= rule.above:
            return False
        return rule.min_side is None or min(scores.height[i], scores.width[i]) >= rule.min_side

    return [passes(i) and (not rule.by_loss or draw(i) <= scores.loss[i]) for i in range(count)]


def curate(source: Path, out: Path, rule: Rule, *, seed: int) -> tuple[int, int]:
    """Write the rows of a list whose images are kept, with all columns; the numbers of rows before and after.

    The random number of an image follows from its name and the seed, so that a longer list keeps the same images.

    Raises:
        ValueError: the rule keeps everything, a column is missing or holds no number, or `out` is in another folder,
            where the names of files would mean others.
    """
    if not rule.columns():
        raise ValueError("nothing to select by; give --by-loss, --above or --min-side")
    if out.resolve().parent != source.resolve().parent:
        raise ValueError(f"{out}: files are named relative to {source.parent}; write the list there")
    listed = read_list(source, others=True)
    columns = {name: _numbers(listed, name) for name in rule.columns()}
    names = (LOSS, HISTOGRAM, HEIGHT, WIDTH)
    scores = Scores(*(columns.get(name, ()) for name in names))

    def draw(i: int) -> float:
        place = int.from_bytes(hashlib.sha256(listed.rows[i].file.encode()).digest()[:8], "big")
        return float(keyed.uniforms(seed, place, _PURPOSE, count=1)[0])

    chosen = kept(len(listed.rows), scores, rule, draw)
    rows = [row for row, keep in zip(listed.rows, chosen, strict=True) if keep]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", *(["label", "class_name"] if listed.labelled else []), *listed.others])
    for row in rows:
        writer.writerow([row.file, *([row.label, row.class_name] if listed.labelled else []), *row.others])
    write_text(out, text.getvalue())
    return len(listed.rows), len(rows)


def _numbers(listed: ImageList, name: str) -> list[float]:
    places = [place for place, other in enumerate(listed.others) if other.lower() == name]
    if not places:
        have = ", ".join(listed.others) or "none"
        raise ValueError(f"{listed.path}: no column named {name}; beside files and labels it has: {shown(have)}")
    numbers = []
    for row in listed.rows:
        try:
            number = float(row.others[places[0]])
            if math.isnan(number):
                raise ValueError
            numbers.append(number)
        except ValueError:
            given = shown(row.others[places[0]]) or "nothing"
            raise ValueError(f"{listed.path}, line {row.line}: {name} is {given}, not a number") from None
    return numbers


def add_command(commands: Any) -> None:
    """Add `curate` to the commands of `fovea data`."""
    add = commands.add_parser("curate", help="choose images of a CSV by scores in it, for `fovea data write`")
    add.add_argument(
        "source", type=Path, help=f".csv with a column filename and {LOSS}, {HISTOGRAM}, {HEIGHT}, {WIDTH}"
    )
    add.add_argument("out", type=Path, help=".csv of the images that are kept, in the same folder")
    add.add_argument("--by-loss", action="store_true", help=f"keep with the probability {LOSS}, above 1 always")
    add.add_argument("--above", type=float, metavar="X", help=f"drop where {HISTOGRAM} is X or less (Pixio: 4.5)")
    add.add_argument("--min-side", type=float, metavar="N", help="drop where height or width is below N (Pixio: 320)")
    add.add_argument("--seed", type=int, default=0, metavar="N", help="of --by-loss (default: 0)")
    add.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    rule = Rule(arguments.by_loss, arguments.above, arguments.min_side)
    before, after = curate(arguments.source, arguments.out, rule, seed=arguments.seed)
    print(f"{after} of {before} images: {arguments.out}")
    return 0
