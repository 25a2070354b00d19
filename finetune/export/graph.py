"""A task as a graph that runs without Fovea: torch.export and ONNX, each compared with the task itself.

The graph takes pixels, not normalized values: "images" float32 [batch, C, height, width] in 0 to 1, RGB. Its
outputs are those of `Task.export_outputs`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.heads.pixels.dense_parts import resize
from finetune.tasks.base import Task
from finetune.tasks.exports import NotExportableError

MAX_BATCH = 1024
_MAX_SIDE = 16384
_EMBEDDED = 1_800_000_000  # bytes of weights in one ONNX file; the limit of protobuf is 2 GiB
Size = tuple[int, int]


class Graph(nn.Module):
    """Pixels [b, C, H, W] in 0 to 1 -> the outputs of a copy of the task, from which it makes predictions.

    Attributes:
        outputs: of the task. patch: height and width must be multiples of it.
        fixed: why the graph accepts one image size only; None: it accepts any.

    Raises:
        NotExportableError: the task cannot become a graph.
    """

    def __init__(self, task: Task):
        super().__init__()
        self.outputs = task.export_outputs()
        self.task = copy.deepcopy(task).eval().requires_grad_(False)
        try:
            self.task.prepare_export()
        except ValueError as error:
            raise NotExportableError(str(error)) from error
        self.patch, self.fixed = task.bare_backbone.patch_size, task.fixed_size_reason()

    @property
    def names(self) -> list[str]:
        """Of the outputs."""
        return [output.name for output in self.outputs]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.task.outputs((images - self.task.mean) / self.task.std)
        size = (images.shape[2], images.shape[3])
        sized = tuple(
            resize(value, size) if output.per_pixel else value
            for output, value in zip(self.outputs, found, strict=True)
        )
        return sized[0] if len(sized) == 1 else sized


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
        # Sides that differ from each other and from all constants, so that they are not taken for them.
        example = (size[0] + graph.patch, size[1] + 3 * graph.patch)
    images = torch.rand(2, _channels(graph), *example)
    resampling = _resampling(graph.task) if graph.fixed is None else contextlib.nullcontext()
    with _refusing(graph, "torch.export"), torch.no_grad(), resampling, _quiet():
        return torch.export.export(
            graph,
            (images,),
            dynamic_shapes={"images": shapes},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=graph.fixed is None,
        )


def write_onnx(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> None:
    """The program of the graph as ONNX; weights of 1.8 GB and more are written to a separate file next to it.

    Raises:
        NotExportableError: torch has no ONNX for a part of the network.
    """
    large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _EMBEDDED
    with _refusing(graph, "ONNX"), _quiet():
        made = torch.onnx.export(program, dynamo=True, output_names=graph.names, verbose=False)
        assert made is not None
        made.save(path, external_data=large)


def compare(
    graph: Graph, run: Callable[[Tensor], Sequence[Tensor]], cases: Sequence[tuple[int, Size]]
) -> list[GraphCheck]:
    """Compare `run` with the task itself, on random pixels of each (batch, size).

    Raises:
        ValueError: a difference is larger than an output's tolerance, or shapes differ.
    """
    checked = []
    generator = torch.Generator().manual_seed(0)
    for batch, size in cases:
        images = torch.rand(batch, _channels(graph), *size, generator=generator)
        with torch.no_grad():
            expected = graph(images)
        difference = allowed = 0.0
        pairs = zip(expected if isinstance(expected, tuple) else (expected,), run(images), strict=True)
        for output, (ours, theirs) in zip(graph.outputs, pairs, strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(f"{output.name}: shape {list(theirs.shape)}, the task gives {list(ours.shape)}")
            difference = max(difference, (ours - theirs).abs().max().item())
            allowed = max(allowed, output.tolerance * max(1.0, ours.abs().max().item()))
        checked.append(GraphCheck(batch, size, difference, allowed))
        if not difference <= allowed:  # also of NaN
            raise ValueError(f"{checked[-1]} from the task itself; {allowed:.1e} is allowed")
    return checked


def cases(graph: Graph, size: Size) -> list[tuple[int, Size]]:
    """The compared (batch, size): three batch sizes and, unless the size is fixed, three sizes, one not square."""
    found = [(1, size), (2, size), (5, size)]
    if graph.fixed is None:
        p = graph.patch
        found += [(2, (size[0] + p, size[1] + p)), (1, (size[0] + 2 * p, max(size[1] - p, 2 * p)))]
    return found


def _channels(graph: Graph) -> int:
    return len(graph.task.mean)


@contextlib.contextmanager
def _resampling(task: Task) -> Iterator[None]:
    """Positions are resampled for every grid, the trained one too, so that the traced graph is right for any grid."""
    backbone = task.bare_backbone
    backbone.resample_always = True
    try:
        yield
    finally:
        backbone.resample_always = False


@contextlib.contextmanager
def _refusing(graph: Graph, what: str) -> Iterator[None]:
    """Turn an exporter's error into one about the task, with its network and the reason from the end of the causes."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        name = graph.task.bare_backbone.title
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise NotExportableError(
            f"{what} cannot express {graph.task.config.name} on {name} with this version of torch: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' progress and version warnings; the result is compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
