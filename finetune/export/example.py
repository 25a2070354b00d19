"""The example beside an ONNX graph: a program of about 30 lines that runs it with onnxruntime, numpy and Pillow alone.

It is joined from the files of `examples/` without their imports of each other; all numbers that it needs are in
export.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.tasks.base import Task

EXAMPLE = "example.py"
_PARTS = Path(__file__).parent / "examples"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels


def write_example(task: Task, out: Path, facts: dict[str, Any]) -> str | None:
    """Write the example into the folder of a graph; why there is none, or None.

    Args:
        facts: of export.json. The example reads photos of 8 bits.
    """
    mode, parts = facts["input"]["preparation"]["mode"], task.example_parts
    if mode is None or facts["input"]["range"] is not None:
        return f"no {EXAMPLE}: it reads photos of 8 bits, and these images are others; `fovea predict` reads them"
    if parts is None:
        return f"no {EXAMPLE} for task {task.config.name} with these settings; `fovea predict` predicts them"
    texts = [(_PARTS / f"{part}.py").read_text(encoding="utf-8") for part in ("start", *parts)]
    lines = [line for text in texts for line in _own(text).splitlines(keepends=True)]
    (out / EXAMPLE).write_text("".join(lines), encoding="utf-8")
    return None


def mode_of(channels: int) -> str | None:
    """Of the photos in Pillow; None: it has none with this number of channels."""
    return _MODES.get(channels)


def _own(text: str) -> str:
    """Without the imports of the other parts, which come before it, and marks for linters."""
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith("from finetune.")]
    return "".join(kept).replace("  # noqa: F401", "")
