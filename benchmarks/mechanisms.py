"""Latency and size of a block with each attention mechanism on this machine: ONNX Runtime, one thread, one image.

    OMP_NUM_THREADS=1 python -m benchmarks.mechanisms

A vision transformer of one block, 384 channels, 6 heads, a grid of 14 x 14, with the mechanism in its usual slot
(start: identity: the attention is there too); convolutions in place of the second of `layer3.0` in timm/resnet18 at 112
pixels.
Weights are random (seed 0): accuracy is not of this table. The network without the mechanism is measured again beside
each: the ratio is the median of three pairs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.export.budget import Latency, latency, machine, random_image
from launch.pages.attention import DIM, HEADS, entry, placeable
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.export import graph as graphs
from pretrain.models.release.graphs import FeatureGraph

PLACE = "layer3.0.conv2"
PLAIN = ("none", "none in a ResNet")


def main() -> int:
    print(f"{machine()}; seed 0\n")
    print("| mechanism | network | ms per image (quartiles) | times the network without it | MB of ONNX |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        plain = {graph.title: graph for graph in (_graph(kind, Path(temporary)) for kind in PLAIN)}
        for kind in (*PLAIN, *placeable()):
            graph = _graph(kind, Path(temporary))
            ratio = statistics.median(graph.measure().median / plain[graph.title].measure().median for _ in range(3))
            print(f"| {kind} | {graph.title} | {graph.measure()} | {ratio:.2f} | {graph.megabytes:.2f} |", flush=True)
    return 0


@dataclass(frozen=True)
class _Graph:
    title: str
    run: graphs.Run
    size: graphs.Size
    in_chans: int
    megabytes: float

    def measure(self) -> Latency:
        return latency(self.run, random_image(self.size, self.in_chans))


def _graph(kind: str, folder: Path) -> _Graph:
    backbone, path = _network(kind), folder / f"{kind}.onnx"
    graph = FeatureGraph(backbone, (0.5,) * 3, (0.25,) * 3)
    graphs.write_onnx(graph, graphs.trace(graph, backbone.img_size), path)
    run = graphs.session(path, threads=1)
    return _Graph(backbone.title, run, backbone.img_size, backbone.in_chans, path.stat().st_size / 1e6)


def _network(kind: str) -> Backbone:
    torch.manual_seed(0)
    placed: list[dict[str, Any]] = [] if kind.startswith("none") else [entry(kind)]
    if kind == "none in a ResNet" or (placed and placed[0]["slot"] == "conv"):
        return TimmBackbone("resnet18", (112, 112), attention=[one | {"places": PLACE} for one in placed])
    return ViT((224, 224), 16, embed_dim=DIM, depth=1, num_heads=HEADS, attention=placed).eval()


if __name__ == "__main__":
    sys.exit(main())
