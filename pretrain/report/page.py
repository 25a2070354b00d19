"""The page of a pretraining run: RUN/report/index.html, one file without script, from what its folder contains."""

from __future__ import annotations

import time
from pathlib import Path

from pretrain.core.files import write_text
from pretrain.core.page import elements
from pretrain.report import panels
from pretrain.report.recorded import Recorded, read_run

_FACTS = {
    "objective": "objective.name", "model": "model.name", "image size": "model.img_size", "data": "data.shards",
    "images per step": "optim.global_batch_size", "optimizer": "optim.name", "learning rate": "optim.lr",
    "weight decay": "optim.weight_decay", "schedule": "optim.schedule", "precision": "engine.precision", "seed": "seed",
}  # fmt: skip


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `folder` to `out`, or into the folder; its path.

    Raises:
        ConfigError: `folder` is no folder of a pretraining run. OSError: the page cannot be written.
    """
    page = render(read_run(folder))
    path = folder / "report" / "index.html" if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page, errors="replace")
    return path


def render(run: Recorded) -> str:
    """The page as one HTML text."""
    pictures, problems = panels.strips(run)
    name = run.folder.resolve().name
    model = " ".join(str(run.config[key]) for key in ("objective.name", "model.name") if run.config.get(key))
    subtitle = f"{model or 'a pretraining run'} · {_state(run)} · page of {time.strftime('%Y-%m-%d %H:%M %Z')}"
    parts = [
        elements.header(name, subtitle, [*run.problems, *problems]),
        panels.cards(run),
        panels.time_line(run),
        panels.learning(run),
        pictures,
        panels.curves(run, "Signs of health", panels.SIGNS),
        panels.curves(run, "Speed", panels.MACHINE),
        panels.curves(run, "All other values", panels.others(run), folded=True),
        panels.setup(
            run, {name: str(run.config[key]) for name, key in _FACTS.items() if run.config.get(key) is not None}
        ),
    ]
    return elements.document(f"{name}: pretraining", "\n".join(part for part in parts if part))


def _state(run: Recorded) -> str:
    if run.done:
        return "finished"
    return "stopped; the same command resumes" if (run.folder / "PREEMPTED").exists() else "not finished"
