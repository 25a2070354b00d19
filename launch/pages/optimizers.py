"""The table of docs/optimizers.md: the options of each optimizer, its memory, and the engines that can run it.

Its cells are the facts by which configurations are refused; each "yes" is trained on two processes in
tests/engine/test_engines.py. No torch here.
"""

from __future__ import annotations

import re
from typing import Any

from pretrain.engine.optim.table import KINDS, Kind

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
ENGINES = ("accelerate", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def runs(kind: Kind) -> dict[str, bool]:
    """Engine -> whether it can run the optimizer."""
    return {engine: engine == "accelerate" or int(engine[-1]) <= kind.max_zero_stage for engine in ENGINES}


def table() -> str:
    rows = [
        f"| `optim.name` | {' | '.join(ENGINES)} | options, with their defaults |",
        "|---" * (len(ENGINES) + 2) + "|",
    ]
    for name, kind in KINDS.items():
        cells = " | ".join("yes" if possible else "no" for possible in runs(kind).values())
        options = ", ".join(f"`{key}` {_value(default)}" for key, default in kind.options.items())
        rows.append(f"| `{name}` | {cells} | {options} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """`text` with the table of today."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
