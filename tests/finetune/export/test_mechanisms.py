"""Every attention mechanism through `fovea export`: the graphs of a classifier with the mechanisms of a slot, a block
for each, compute what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.export.graph import Graph
from finetune.export.quantize import quantize
from launch.pages.attention import ANY_SIZE, ONE_SIZE, entry, exports, network, placeable
from pretrain.models.export import graph as graphs
from pretrain.models.export.graph import session
from pretrain.models.mechanisms import MECHANISMS
from tests.finetune.small_tasks import small_task

pytestmark = pytest.mark.slow

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
CONVOLUTIONS = [f"layer{stage}.0.conv{number}" for stage in (1, 2) for number in (1, 2)] + [
    "layer3.0.conv2",
    "layer4.0.conv2",
]
SIZE = (64, 64)


@pytest.mark.parametrize("slot", ["gate", "stage", "mixer", "conv", "front"])
def test_graphs_of_mechanisms_compute_what_the_classifier_computes(slot: str, tmp_path: Path):
    kinds = of_slot(slot)
    graph = Graph(small_task("classification", backbone=network(each_at_its_own_place(kinds))))
    move_from_the_start(graph, 0.1 if slot == "front" else 0.3)  # resampled pixels amplify rounding
    compared = graphs.cases(graph, SIZE)
    assert {exports(kind) for kind in kinds} == {ANY_SIZE if graph.fixed is None else ONE_SIZE}
    assert len({batch for batch, _ in compared}) == 3
    assert len({size for _, size in compared}) == (4 if graph.fixed is None else 1)

    program = graphs.trace(graph, SIZE)
    module = program.module()
    graphs.compare(graph, lambda pixels: [module(pixels)], compared)
    graphs.write_onnx(graph, program, tmp_path / "model.onnx")
    graphs.compare(graph, session(tmp_path / "model.onnx"), compared)

    quantize(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")
    run = session(tmp_path / "model.int8.onnx")
    for batch, size in compared:
        images = torch.rand(batch, 3, *size)
        assert run(images)[0].shape == graph(images).shape


def test_the_slots_hold_every_mechanism():
    assert {kind for slot in ("gate", "stage", "mixer", "conv", "front") for kind in of_slot(slot)} == set(placeable())


def of_slot(slot: str) -> list[str]:
    """The mechanisms whose usual slot it is."""
    return [kind for kind in placeable() if MECHANISMS[kind].slots[0] == slot]


def each_at_its_own_place(kinds: list[str]) -> list[dict[str, Any]]:
    entries = [entry(kind) for kind in kinds]
    if entries[0]["slot"] == "conv":
        return [one | {"places": place} for one, place in zip(entries, CONVOLUTIONS, strict=True)]
    return [one | {"places": one["places"].replace("*", str(block))} for block, one in enumerate(entries)]


def move_from_the_start(graph: Graph, scale: float) -> None:
    """Strengths, gammas and last layers start at 0, where a mechanism is the identity and any graph of it equal."""
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.ndim < 2:
                parameter.add_(scale * torch.randn_like(parameter))
