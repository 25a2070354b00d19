"""A run's report on disk and in TensorBoard: the page, and every picture as a separate file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from finetune.report import curves
from finetune.report.page import Drawn, Page, render
from pretrain.core.files import replacing_folder

if TYPE_CHECKING:
    from finetune.data.examples import Examples
    from finetune.tasks.base import Task

PAGE = "index.html"


def draw(
    task: Task, examples: Examples, chosen: Sequence[tuple[float, int, Any]], channels: Sequence[int] | None = None
) -> list[Drawn]:
    """Pictures of (quality, number of the example, prediction), in that order; see `Example.as_picture`."""
    drawn = []
    for quality, index, prediction in chosen:
        example = examples[index].as_picture(channels)
        drawn.append(Drawn(example.name, quality, task.picture(example, prediction)))
    return drawn


def write_report(folder: Path, page: Page) -> Path:
    """Replace `folder` by the page and its pictures (worst-01-NAME.png, best-01-NAME.png); the page's path."""
    with replacing_folder(folder) as new:
        for kind, drawn in (("worst", page.worst), ("best", page.best)):
            for place, one in enumerate(drawn, start=1):
                Image.fromarray(one.picture).save(new / f"{kind}-{place:02d}-{_file_name(one.name)}.png")
        (new / PAGE).write_text(render(page), encoding="utf-8", errors="replace")
    return folder / PAGE


def board_pictures(page: Page) -> Mapping[str, Tensor]:
    """The pictures of the page for TensorBoard: uint8 [3, h, w] by name."""
    pictures = {
        f"{kind}/{place:02d}": one.picture
        for kind, drawn in (("worst", page.worst), ("best", page.best))
        for place, one in enumerate(drawn, start=1)
    }
    if page.scores.confusion is not None and len(page.scores.confusion) == len(page.classes):
        pictures["confusion"] = curves.pixels(curves.confusion_figure(page.scores.confusion, page.classes))
    for name, series in (page.scores.curves or {}).items():
        if series:
            pictures[name] = curves.pixels(curves.precision_recall_figure(series, title=name))
    return {name: torch.from_numpy(picture).permute(2, 0, 1) for name, picture in pictures.items()}


def _file_name(name: str) -> str:
    """A file name of at most 80 bytes."""
    kept = re.sub(r"[^\w.-]+", "_", name).strip("_.")
    return kept.encode("utf-8")[-80:].decode("utf-8", errors="ignore").strip("_.") or "image"
