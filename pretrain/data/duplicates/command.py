"""`fovea data dups SHARDS [--against SHARDS]`: images that are in a data set twice, or in two data sets (leakage).

Finds equal bytes, equal pixels, and near duplicates: re-encoded, resized, cropped to half the area or more, mirrored,
or with other brightness, contrast or colour. Writes a list for `data.exclude`, the pairs as csv, and a contact sheet.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pretrain.core.files import write_text
from pretrain.core.text import shown
from pretrain.data.duplicates.search import Pair, duplicates, look, needless
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.sheet import Cell, draw_sheet
from pretrain.data.show import decode

LIST, PAIRS, SHEET = "exclude.txt", "pairs.csv", "pairs.png"
_SHOWN = 32  # pairs of the contact sheet


def main(arguments: list[str]) -> int:
    """Exit status 0: no duplicates. 1: some. 2: a wrong data set or argument."""
    chosen = _parser().parse_args(arguments)
    if not 0 < chosen.likeness <= 1:
        _parser().error(f"--likeness {chosen.likeness}: above 0, at most 1")
    try:
        dataset = Dataset.open(chosen.shards)
        against = Dataset.open(chosen.against) if chosen.against else None
    except ValueError as error:
        print(f"fovea data dups: {error}", file=sys.stderr)
        return 2
    looks = look(dataset)
    others = look(against) if against is not None else None
    pairs = duplicates(looks, others, 2.0 if chosen.exact else chosen.likeness)
    leave_out = needless(pairs, looks, within=against is None)
    for name, reason in [*looks.unreadable, *(others.unreadable if others else [])][:5]:
        print(f"unreadable {shown(name)}: {shown(reason)}")
    counts = Counter(pair.kind for pair in pairs)
    found = ", ".join(f"{counts[kind]} {kind}" for kind in ("bytes", "pixels", "near"))
    beside = f" and {len(others.names)} of the other data set" if others else ""
    print(f"{len(looks.names)} images{beside}: {len(pairs)} pairs ({found}); {len(leave_out)} images are needless")
    if chosen.out is not None and pairs:
        _write(chosen.out, pairs, leave_out, dataset, against or dataset)
        print(f"{chosen.out / LIST} (data.exclude={chosen.out / LIST}), {PAIRS}, {SHEET}")
    return 1 if pairs else 0


def _write(out: Path, pairs: Sequence[Pair], leave_out: Sequence[str], dataset: Dataset, other: Dataset) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / LIST, "".join(f"{name}\n" for name in leave_out))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["first", "second", "kind", "likeness"])
    table.writerows([pair.first, pair.second, pair.kind, f"{pair.likeness:.4f}"] for pair in pairs)
    write_text(out / PAIRS, text.getvalue())
    # The least alike are those to look at.
    cells = []
    with closing(Reader(dataset)) as ours, closing(Reader(other)) as theirs:
        for pair in pairs[::-1][:_SHOWN]:
            for reader, name in ((ours, pair.first), (theirs, pair.second)):
                cells.append(Cell(decode(reader.named(name))[1], name, f"{pair.kind} {pair.likeness:.3f}"))
    draw_sheet(cells, min(8, len(cells))).save(out / SHEET, "PNG")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea data dups", description=__doc__)
    parser.add_argument("shards", nargs="+", help="indexed shards: a folder, a glob or a list")
    parser.add_argument("--against", nargs="+", metavar="SHARDS", help="other shards: images of both are listed")
    parser.add_argument("--likeness", type=float, default=0.9, help="least likeness of near duplicates (default 0.9)")
    parser.add_argument("--exact", action="store_true", help="equal bytes and pixels only")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of {LIST}, {PAIRS} and {SHEET}")
    return parser
