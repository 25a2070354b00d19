"""A study as files: one page, the tables as JSON, CSV and Markdown, every picture."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.explain.baselines import BASELINES
from finetune.explain.measures import Mean
from finetune.explain.pictures import attention_picture, maps_picture
from finetune.explain.sanity import SURVIVES
from finetune.explain.study import Row, Study
from pretrain.core.files import replacing_folder, write_json
from pretrain.core.page import elements
from pretrain.core.record import versions
from pretrain.core.text import html, markdown

PAGE, TABLE = "index.html", "explain.json"
_ROWS = 24  # of slices and of classes on the page; explain.json has all
COLUMNS = ("map", "deletion", "insertion", "gap", "lead", "pointing", "mass", "sanity")
HOW = (
    "Deletion: area under the score while patches are blurred, the most important first: low is good. Insertion: while "
    "they are restored to the blurred image: high is good. Gap: insertion minus deletion. Lead: of the gap over that "
    "of the best baseline. Pointing: the most important patch lies on the object. Mass: share of the importance on it. "
    "In brackets: 95 % interval over bootstrap resamples of the images."
)


def write_study(folder: Path, study: Study, facts: Mapping[str, str]) -> Path:
    """Replace `folder` by the study; the path of its page.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / TABLE).is_file())):
        raise ValueError(f"{folder}: holds other files than an earlier `fovea explain`; choose another --out")
    with replacing_folder(folder) as new:
        write_json(new / TABLE, record(study, facts))
        rows = table(study.rows)
        (new / "explain.csv").write_text(_csv(rows), encoding="utf-8")
        (new / "explain.md").write_text(_markdown(rows), encoding="utf-8")
        (new / "pictures").mkdir()
        maps, attention = [], []
        for one in study.explained:
            stem = f"{one.number:05d}-{_file_name(one.name)}"
            maps.append((one.name, maps_picture(one)))
            Image.fromarray(maps[-1][1]).save(new / "pictures" / f"{stem}.png")
            if one.attention:
                attention.append((one.name, attention_picture(one)))
                (new / "attention").mkdir(exist_ok=True)
                Image.fromarray(attention[-1][1]).save(new / "attention" / f"{stem}.png")
        (new / PAGE).write_text(render(study, facts, maps, attention), encoding="utf-8", errors="replace")
    return folder / PAGE


def lines(study: Study) -> list[str]:
    """The result in a few lines: of each map whether it is better than knowing nothing, and whether it is sane."""
    found = []
    for row in study.rows:
        if row.lead is not None:
            better = "better than every baseline" if row.better else "not better than every baseline"
            sane = "" if row.sanity is None else f"; sanity {row.sanity.line}"
            found.append(f"{row.name}: {better} (lead {_interval(row.lead)}){sane}")
    found += [f"{name}: left out: {why}" for name, why in study.skipped.items()]
    if study.shortcuts is not None:
        found += [place.line for place in study.shortcuts.found if place.is_shortcut] or ["no shortcut found"]
    if study.slices:
        worst = study.slices[0]
        text = f"{worst.trait}, {worst.value}: {worst.mean:.3f}, the rest {worst.rest:.3f}"
        found.append(f"worst slice: {text}" if worst.is_worse else "no slice is clearly worse than the rest")
    return found


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The numbers of every map and baseline as text."""
    return [
        {
            "map": row.name,
            "deletion": _interval(row.deletion),
            "insertion": _interval(row.insertion),
            "gap": _interval(row.gap),
            "lead": "" if row.lead is None else _interval(row.lead),
            "pointing": _interval(row.pointing),
            "mass": _interval(row.mass),
            "sanity": "" if row.sanity is None else "passes" if row.sanity.passes else "does not pass",
        }
        for row in rows
    ]


def record(study: Study, facts: Mapping[str, str]) -> dict[str, Any]:
    """Everything measured, of JSON's types."""
    return _plain(
        {
            "of": study.subject.title,
            "kind": study.subject.kind,
            "protocol": study.subject.protocol,
            "seed": study.seed,
            "images": [{"number": e.number, "name": e.name, "aim": e.aim.text} for e in study.explained],
            "maps": [asdict(row) for row in study.rows],
            "baselines": list(BASELINES),
            "area": None if study.area is None else asdict(study.area),
            "measure": study.measure,
            "slices": [{**asdict(one), "worse": one.is_worse} for one in study.slices],
            "shortcuts": _found(study),
            "skipped": study.skipped,
            "without_answer": study.silent,
            "undecodable": [{"name": name, "reason": reason} for name, reason in study.failed],
            "facts": dict(facts),
            "versions": versions(),
        }
    )


def _found(study: Study) -> list[dict[str, Any]]:
    places = study.shortcuts.found if study.shortcuts else []
    return [{**asdict(place), "shortcut": place.is_shortcut} for place in places]


def render(
    study: Study,
    facts: Mapping[str, str],
    maps: Sequence[tuple[str, np.ndarray]],
    attention: Sequence[tuple[str, np.ndarray]],
) -> str:
    """The page as one HTML text."""
    subject = study.subject
    warnings = [f"{name}: left out: {why}" for name, why in study.skipped.items()]
    if study.silent:
        warnings.append(f"{study.silent} images without an answer to explain")
    warnings += [f"{name}: {reason}; left out" for name, reason in study.failed[:20]]
    parts = [
        elements.header(f"Explanations: {subject.title}", subject.protocol, warnings),
        _numbers(study),
        _sanity(study),
        _shortcuts(study),
        _slices(study),
        _photos("Maps", "green: the annotated object; yellow: the detected box", maps),
        _photos("Attention of every block and head", "of the tokens that the answer reads; own scale each", attention),
        elements.facts("The study", facts),
    ]
    return elements.document(f"explain {subject.title}", "\n".join(part for part in parts if part))


def _numbers(study: Study) -> str:
    shown = [name for name in COLUMNS if name not in ("pointing", "mass") or study.images.has_regions]
    rows = [[row[name] for name in shown] for row in table(study.rows)]
    verdicts = "".join(f"<li>{html(line)}</li>" for line in lines(study))
    area = ""
    if study.area is not None and study.area.count:
        area = f" The objects cover {study.area.value:.3f} of the image: the mass of a map that knows nothing."
    return (
        f"<section><h2>Are the maps true of the network?</h2><ul>{verdicts}</ul>{elements.table(shown, rows)}"
        f'<p class="pale">{html(HOW + area)}</p></section>'
    )


def _sanity(study: Study) -> str:
    checked = [row for row in study.rows if row.sanity is not None]
    if not checked:
        return ""
    stages = [name for name, _ in checked[0].sanity.stages] if checked[0].sanity else []
    rows = [[row.name, *(value for _, value in row.sanity.stages), row.sanity.line] for row in checked if row.sanity]
    how = (
        "Rank correlation of the map with that of the given weights, when weights are random from the head down to the "
        f"part named. A map that survives ({SURVIVES:g} or more) is a picture of the image."
    )
    return (
        f"<section><h2>Do the maps depend on what was learned?</h2>{elements.table(['map', *stages, 'sanity'], rows)}"
        f'<p class="pale">{html(how)}</p></section>'
    )


def _shortcuts(study: Study) -> str:
    places = study.shortcuts
    if places is None or not places.found:
        return ""
    columns = ("class", "images", "rows", "columns", "area", "relevance", "elsewhere", "fall", "becomes", "")
    rows = [
        [
            place.name, place.images, "{}-{}".format(*place.rows), "{}-{}".format(*place.columns), place.area,
            place.relevance, place.elsewhere, place.fall, place.becomes, "shortcut" if place.is_shortcut else "",
        ]
        for place in places.found[:_ROWS]
    ]  # fmt: skip
    how = (
        f"The window of each class that holds most {places.method} beyond that of other classes; sought in half of the "
        f"class's images, measured on the others, of {places.images} images. Relevance: share in the window; "
        "elsewhere: in images of other classes; fall: of the score when it is that of another class's image; becomes: "
        "share of other images that become this class when the window is pasted into them."
    )
    kind = "bad" if any(place.is_shortcut for place in places.found) else "good"
    return (
        f'<section class="{kind}"><h2>Does one place decide for a class?</h2>{elements.table(columns, rows)}'
        f'<p class="pale">{html(how)}</p></section>'
    )


def _slices(study: Study) -> str:
    if not study.slices:
        return ""
    rows = [
        [
            f"{one.trait}: {one.value}", one.of, one.difference.count, one.mean, one.rest, _interval(one.difference),
            "worse" if one.is_worse else "",
        ]
        for one in study.slices[:_ROWS]
    ]  # fmt: skip
    columns = ("slice", "of", "number", "mean", "rest", "difference", "")
    how = (
        f"Measured: {study.measure}. The worst first: slices whose interval of the difference lies below 0, then by "
        f"the difference. Of {len(study.slices)} slices {len(study.slices) / 40:.1f} are expected there by chance."
    )
    return f'<section><h2>When it fails</h2>{elements.table(columns, rows)}<p class="pale">{html(how)}</p></section>'


def _photos(title: str, how: str, pictures: Sequence[tuple[str, np.ndarray]]) -> str:
    if not pictures:
        return ""
    drawn = "".join(elements.photo(name, picture, html(name)) for name, picture in pictures)
    head = f'<h2>{html(title)}</h2><div class="pale">{html(how)}</div>'
    return f'<section>{head}<div class="pictures">{drawn}</div></section>'


def _interval(mean: Mean) -> str:
    """0.412 [0.390, 0.431]."""
    if not mean.count:
        return "–"  # noqa: RUF001
    if mean.count == 1:
        return elements.number(mean.value)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _csv(rows: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(rows[0])
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*head, *(f"| {' | '.join(markdown(row[name]) for name in names)} |" for row in rows)]) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file_name(name: str) -> str:
    """A file name of at most 60 bytes."""
    kept = re.sub(r"[^\w.-]+", "_", name).strip("_.")
    return kept.encode("utf-8", "replace")[-60:].decode("utf-8", errors="ignore").strip("_.") or "image"
