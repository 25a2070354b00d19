"""The table of docs/weights.md: what the files of official models do not show, from the table that reads them."""

from __future__ import annotations

import re

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
TITLES = ("project", "models: heads", "eps of norms", "positions", "vector of an image")


def table() -> str:
    from pretrain.models.importers.facts import PROJECTS  # imports torch

    rows = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for one in PROJECTS:
        models = ", ".join(f"`{model.name}` {model.num_heads}" for model in one.models)
        cells = (one.title, models, f"{one.norm_eps:.0e}".replace("e-0", "e-"), one.positions, one.pooled)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """`text` with the table of today."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)
