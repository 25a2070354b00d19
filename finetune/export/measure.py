"""The ONNX files of an export measured: what int8 costs in accuracy, milliseconds and megabytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.data.examples import Examples
from finetune.export.budget import latency, machine
from finetune.export.graph import Graph
from finetune.export.on_images import measured, numbers
from finetune.export.quantize import with_graph
from finetune.tasks.base import Task
from pretrain.models.export.graph import Size, session

FLOAT, INT8 = "model.onnx", "model.int8.onnx"
_WARM_UP, _RUNS = 2, 20
Say = Callable[[str], None]


def int8_cost(
    task: Task, graph: Graph, out: Path, val: Examples, fixed: Size | None, batch_size: int, say: Say
) -> dict[str, Any]:
    """The validation numbers of model.onnx and model.int8.onnx."""
    found: dict[str, Any] = {}
    for name in (FLOAT, INT8):
        model = with_graph(task, session(out / name), patch=graph.patch, fixed=fixed)
        scores = measured(model, val, batch_size)
        found[name] = numbers(scores)
        found["protocol"] = scores.protocol
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.values.items()))
    primary = next(iter(found[FLOAT]))
    drop = found[FLOAT][primary] - found[INT8][primary]
    smaller = _bytes(out, FLOAT) / _bytes(out, INT8)
    say(f"int8: {primary} changes by {-drop + 0.0:+.4f}, the file is {smaller:.1f} times smaller; {found['protocol']}")
    return {**found, "primary": primary, "drop": drop, "times_smaller": smaller}


def speeds(out: Path, inputs: tuple[Tensor, ...], say: Say) -> dict[str, Any]:
    """Milliseconds of one image, `inputs`, through each ONNX file, on one thread, and its megabytes."""
    found: dict[str, Any] = {"machine": machine(_WARM_UP, _RUNS)}
    say(f"{'ms per image (quartiles)':>27}  {'MB':>8}  {found['machine']}")
    for name in (FLOAT, INT8):
        if (out / name).is_file():
            time = latency(session(out / name, threads=1), *inputs, warm_up=_WARM_UP, runs=_RUNS)
            megabytes = _bytes(out, name) / 1e6
            found[name] = {"median": time.median, "quartiles": [time.low, time.high], "megabytes": megabytes}
            say(f"{time!s:>27}  {megabytes:8.1f}  {name}")
    return found


def _bytes(out: Path, name: str) -> int:
    """Of an ONNX file with its weights."""
    return sum(file.stat().st_size for file in (out / name, out / f"{name}.data") if file.is_file())
