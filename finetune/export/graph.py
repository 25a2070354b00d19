"""A task as a graph that runs without Fovea: torch.export and ONNX, each compared with the task itself.

The graph takes pixels, not normalized values: "images" float32 [batch, C, height, width] in 0 to 1, RGB. What comes
out: classification, "logits" [batch, K]; segmentation, "scores" [batch, K, height, width]; depth, "metres" [batch, 1,
height, width]; detection by queries, "boxes" [batch, Q, 4] (center x, center y, width, height in parts of the image)
or "masks" [batch, Q, h, w] (logits), and "logits" [batch, Q, classes].
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.heads.pixels.dense_parts import resize
from finetune.heads.queries.eomt import EoMT
from finetune.tasks.base import Task
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers import pos_embed

MAX_BATCH = 1024
TOLERANCE = 1e-4  # of the largest output, or of 1
_MAX_SIDE = 16384
_EMBEDDED = 1_800_000_000  # bytes of weights in one ONNX file; protobuf ends at 2 GiB
Size = tuple[int, int]


class NotExportableError(ValueError):
    """A task that cannot be a graph: which, why, and what can."""


class Graph(nn.Module):
    """Pixels [b, C, H, W] in 0 to 1 -> what the task computes before it chooses; a copy, the task is left alone.

    Attributes:
        outputs: names of what comes out. patch: height and width must be multiples of it.
        fixed: why the graph is for one image size only; None: any.

    Raises:
        NotExportableError: a detector whose number of proposals depends on the image, or a grid of classifiers.
    """

    def __init__(self, task: Task):
        super().__init__()
        compute, self.outputs = _computation(task)
        self.task = copy.deepcopy(task).eval().requires_grad_(False)
        _stop_masking(self.task)
        self._compute = compute
        self.patch, self.fixed = _sizes(self.task)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._compute(self.task, (images - self.task.mean) / self.task.std)


@dataclass(frozen=True)
class GraphCheck:
    """The largest difference from the task itself, on random pixels of a batch size and an image size."""

    batch: int
    size: Size
    difference: float
    allowed: float

    def __str__(self) -> str:
        return f"batch {self.batch} at {self.size[0]} x {self.size[1]}: largest difference {self.difference:.1e}"


def trace(graph: Graph, size: Size) -> torch.export.ExportedProgram:
    """The graph by torch.export: any batch, and any image size in whole patches unless it is fixed to `size`.

    Raises:
        NotExportableError: torch cannot trace the network.
    """
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    example = size
    if graph.fixed is None:
        sides = torch.export.Dim("rows", min=2, max=_MAX_SIDE), torch.export.Dim("columns", min=2, max=_MAX_SIDE)
        shapes |= {2: graph.patch * sides[0], 3: graph.patch * sides[1]}
        # Sides that differ from each other and from all that is constant, lest they be taken for it.
        example = (size[0] + graph.patch, size[1] + 3 * graph.patch)
    images = torch.rand(2, _channels(graph), *example)
    with _refusing(graph, "torch.export"), torch.no_grad(), _resampling(graph.task, graph.fixed is None), _quiet():
        return torch.export.export(
            graph,
            (images,),
            dynamic_shapes={"images": shapes},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=graph.fixed is None,
        )


def write_onnx(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> None:
    """The program of the graph as ONNX; weights of 1.8 GB and more are a file of their own beside it.

    Raises:
        NotExportableError: torch has no ONNX for a part of the network.
    """
    large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _EMBEDDED
    with _refusing(graph, "ONNX"), _quiet():
        made = torch.onnx.export(program, dynamo=True, output_names=list(graph.outputs), verbose=False)
        assert made is not None
        made.save(path, external_data=large)


def compare(
    graph: Graph, run: Callable[[Tensor], Sequence[Tensor]], cases: Sequence[tuple[int, Size]]
) -> list[GraphCheck]:
    """`run` beside the task itself, on random pixels of each (batch, size).

    Raises:
        ValueError: they differ by more than TOLERANCE, or a shape does.
    """
    checked = []
    generator = torch.Generator().manual_seed(0)
    for batch, size in cases:
        images = torch.rand(batch, _channels(graph), *size, generator=generator)
        with torch.no_grad():
            expected = graph(images)
        difference = allowed = 0.0
        pairs = zip(expected if isinstance(expected, tuple) else (expected,), run(images), strict=True)
        for name, (ours, theirs) in zip(graph.outputs, pairs, strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(f"{name}: shape {list(theirs.shape)}, the task gives {list(ours.shape)}")
            difference = max(difference, (ours - theirs).abs().max().item())
            allowed = max(allowed, TOLERANCE * max(1.0, ours.abs().max().item()))
        checked.append(GraphCheck(batch, size, difference, allowed))
        if not difference <= allowed:  # also of NaN
            raise ValueError(f"{checked[-1]} from the task itself; {allowed:.1e} is allowed")
    return checked


def cases(graph: Graph, size: Size) -> list[tuple[int, Size]]:
    """What is compared: three batch sizes, and where sizes are free three of them, one not square."""
    found = [(1, size), (2, size), (5, size)]
    if graph.fixed is None:
        p = graph.patch
        found += [(2, (size[0] + p, size[1] + p)), (1, (size[0] + 2 * p, max(size[1] - p, 2 * p)))]
    return found


def _computation(task: Task) -> tuple[Callable[[Any, Tensor], Any], tuple[str, ...]]:
    name: str = task.config.name
    head: Any = getattr(task.config, "head", None)
    if name == "classification" and task.config.train != "grid":
        return _logits, ("logits",)
    if name == "segmentation":
        return _scores, ("scores",)
    if name == "depth":
        return _depth, ("metres",)
    if name == "detection" and head.name == "detr":
        return _boxes, ("boxes", "logits")
    if name == "detection" and head.name == "eomt":
        return _masks, ("masks", "logits")
    can = "what can: classification, segmentation, depth, and detection with head detr or eomt"
    if name == "classification":
        raise NotExportableError(f"task classification with train=grid is many classifiers at once; {can}")
    raise NotExportableError(
        f"task detection with head {head.name}: how many objects it proposes and keeps depends on the image, and no "
        f"graph holds that; {can}. `fovea predict` runs every task"
    )


def _logits(task: Any, images: Tensor) -> Tensor:
    return task.logits(images)


def _scores(task: Any, images: Tensor) -> Tensor:
    return resize(task.scores(images), (images.shape[2], images.shape[3]))


def _depth(task: Any, images: Tensor) -> Tensor:
    return resize(task.depth(images), (images.shape[2], images.shape[3]))


def _boxes(task: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    boxes, logits = task.head.detr.decoder(task.dense(images)[-1])[-1]
    return boxes, logits


def _masks(task: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    masks, logits = task.head.eomt.predict(task.dense, images)
    return masks, logits


def _stop_masking(task: Task) -> None:
    """Attention of a finished EoMT is not masked any more, and so need not be asked in the graph."""
    for module in task.modules():
        if isinstance(module, EoMT):
            if (module.mask_probability > 0).any():
                share = module.mask_probability.max().item()
                raise NotExportableError(
                    f"head eomt still masks its attention ({share:.0%} in the last block): a mask that depends on the "
                    "image is no graph. Export it at the end of its run, when masking is annealed away"
                )
            module.masked_attention = False


def _sizes(task: Any) -> tuple[int, str | None]:
    """(pixels of a patch, why only one image size can be)."""
    backbone = task.bare_backbone
    patch = getattr(backbone, "patch_size", None) or 1
    if not isinstance(backbone, ViT):
        return patch, f"{type(backbone).__name__} is made for one size"
    if task.config.name == "segmentation" and task.config.head.name == "upernet":
        return patch, "UPerNet's pooling pyramid is laid out for one grid"
    if backbone.rel_pos_kind != "none":
        return patch, "its relative-position tables are indexed for one grid"
    if backbone.pos_embed is not None and backbone.pos_resize.startswith("dino"):
        return patch, "its positions are resampled by a scale factor, as DINO's are"
    if getattr(task.config, "window", None) is not None and task.config.name == "detection":
        return patch, "attention is in windows"
    return patch, None


def _channels(graph: Graph) -> int:
    return len(graph.task.mean)


@contextlib.contextmanager
def _resampling(task: Task, free: bool) -> Iterator[None]:
    """While a free size is traced, positions are resampled for every grid, the trained one too: no case is left out."""
    vit = task.bare_backbone
    if not free or not isinstance(vit, ViT) or vit.pos_embed is None:
        yield
        return

    def position_table(grid_size: Size) -> Tensor:
        assert vit.pos_embed is not None
        return pos_embed.resample(vit.pos_embed, vit.grid_size, grid_size, how=vit.pos_resize)

    vit.position_table = partial(position_table)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del vit.position_table


@contextlib.contextmanager
def _refusing(graph: Graph, what: str) -> Iterator[None]:
    """An exporter's own error as one about the task: its network and the reason, at the end of the chain of causes."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        backbone = graph.task.bare_backbone
        name = f"timm/{backbone.name}" if isinstance(backbone, TimmBackbone) else type(backbone).__name__
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise NotExportableError(
            f"{what} cannot hold {graph.task.config.name} on {name} with this version of torch: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print their progress and their doubts about other versions; what counts is compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
