"""A network as a graph that runs without Fovea: torch.export and ONNX, each compared with the network itself.

A graph takes pixels, not normalized values: "images" float32 [batch, C, height, width] in 0 to 1.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.export.outputs import ExportOutput, NotExportableError

MAX_BATCH = 1024
MIN_PATCHES = 2  # of a side: torch.export takes a dimension of 1 for a constant
MOST_TOKENS = 4096  # that a comparison tries: the scores of attention grow with their square
_MAX_SIDE = 16384
_EMBEDDED = 1_800_000_000  # bytes of weights in one ONNX file; the limit of protobuf is 2 GiB
Size = tuple[int, int]
Run = Callable[..., Sequence[Tensor]]  # of the inputs of a graph, in order


class Graph(nn.Module):
    """Pixels [b, C, H, W] in 0 to 1 -> the outputs, one tensor or several. A subclass computes them.

    Attributes:
        outputs: what it gives. title: the network's name in messages. backbone: the copy in it.
        patch: height and width must be multiples of it.
        fixed: why the graph accepts one image size only; None: it accepts any.
        min_patches: of a side, where the size is not fixed.
        detects: it chooses boxes, which random pixels do not show: it is compared on photos. It has a second input,
            "content" int64 [b, 2]: (height, width) of the part of each image, at its top left, that is no padding.
    """

    outputs: tuple[ExportOutput, ...]
    title: str
    patch: int
    fixed: str | None
    min_patches: int = MIN_PATCHES
    detects: bool = False

    @property
    def backbone(self) -> ImageEncoder:
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """Of the outputs."""
        return [output.name for output in self.outputs]

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Those of images [b, C, H, W] without padding."""
        if not self.detects:
            return (images,)
        return images, torch.tensor([images.shape[2:]]).repeat(images.shape[0], 1)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        raise NotImplementedError


@dataclass(frozen=True)
class GraphCheck:
    """The largest difference from the network itself, on random pixels of a batch size and an image size."""

    batch: int
    size: Size
    difference: float
    allowed: float

    def __str__(self) -> str:
        return f"batch {self.batch} at {self.size[0]} x {self.size[1]}: largest difference {self.difference:.1e}"

    def facts(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"batch": self.batch, "size": list(self.size), "largest_difference": self.difference}


def trace(graph: Graph, size: Size) -> torch.export.ExportedProgram:
    """The graph by torch.export: any batch, and any image size in whole patches unless it is fixed to `size`.

    Raises:
        NotExportableError: torch cannot trace the network.
    """
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    example = size
    if graph.fixed is None:
        rows, columns = (torch.export.Dim(name, min=graph.min_patches, max=_MAX_SIDE) for name in ("rows", "columns"))
        shapes |= {2: graph.patch * rows, 3: graph.patch * columns}
        # Sides that differ from each other and from all constants, so that they are not taken for them.
        example = (size[0] + graph.patch, size[1] + 3 * graph.patch)
    inputs = graph.inputs(torch.rand(2, graph.backbone.in_chans, *example))
    dynamic = {"images": shapes, "content": {0: shapes[0]}}
    resampling = _resampling(graph.backbone) if graph.fixed is None else contextlib.nullcontext()
    with _refusing(graph, "torch.export"), torch.no_grad(), resampling, quiet():
        return torch.export.export(
            graph,
            inputs,
            dynamic_shapes=dict(list(dynamic.items())[: len(inputs)]),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=graph.fixed is None,
        )


def write_onnx(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> None:
    """The program of the graph as ONNX; weights of 1.8 GB and more are written to a separate file next to it.

    Raises:
        NotExportableError: torch has no ONNX for a part of the network.
    """
    large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _EMBEDDED
    with _refusing(graph, "ONNX"), quiet():
        made = torch.onnx.export(program, dynamo=True, output_names=graph.names, verbose=False)
        assert made is not None
        made.save(path, external_data=large)


def run_program(path: Path) -> Run:
    """A file of torch.export that this process wrote, opened: its inputs -> its outputs."""
    module = torch.export.load(path).module()

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found = module(*inputs)
        return (found,) if isinstance(found, Tensor) else found

    return run


def session(path: Path, *, threads: int | None = None) -> Run:
    """An ONNX file on the CPU: its inputs, pixels float32 [b, C, H, W] in 0 to 1 first -> its outputs.

    Args:
        threads: of ONNX Runtime; None: as many as torch has.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or torch.get_num_threads(), 3
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    names = [one.name for one in opened.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        outputs: Sequence[Any] = opened.run(None, feeds)
        return [torch.from_numpy(output) for output in outputs]

    return run


def compare(graph: Graph, run: Run, cases: Sequence[tuple[int, Size]]) -> list[GraphCheck]:
    """Compare `run` with the network itself, on random pixels of each (batch, size).

    Raises:
        ValueError: a difference is larger than an output's tolerance, or shapes differ.
    """
    checked, parts = [], (name.rpartition(".")[2] for name, _ in graph.backbone.named_modules())
    rounding = 10.0 if "front" in parts else 1.0  # it resamples the noise that is compared, which amplifies rounding
    generator = torch.Generator().manual_seed(0)
    for batch, size in cases:
        images = torch.rand(batch, graph.backbone.in_chans, *size, generator=generator)
        with torch.no_grad():
            expected = graph(images)
        difference = allowed = 0.0
        pairs = zip(expected if isinstance(expected, tuple) else (expected,), run(images), strict=True)
        for output, (ours, theirs) in zip(graph.outputs, pairs, strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(f"{output.name}: shape {list(theirs.shape)}, not {list(ours.shape)}")
            difference = max(difference, (ours - theirs).abs().max().item())
            allowed = max(allowed, rounding * output.tolerance * max(1.0, ours.abs().max().item()))
        checked.append(GraphCheck(batch, size, difference, allowed))
        if not difference <= allowed:  # also of NaN
            raise ValueError(f"{checked[-1]} from {graph.title}; {allowed:.1e} is allowed")
    return checked


def cases(graph: Graph, size: Size) -> list[tuple[int, Size]]:
    """The compared (batch, size): batches of 1, 2 and 5 and, unless the size is fixed, the smallest size, four times
    the side of `size` (or what MOST_TOKENS patches allow), and one that is not square."""
    found = [(1, size), (2, size), (5, size)]
    if graph.fixed is None:
        p, rows, columns = graph.patch, size[0] // graph.patch, size[1] // graph.patch
        times = max(1.0, min(4.0, (MOST_TOKENS / (rows * columns)) ** 0.5))
        large = int(rows * times) * p, int(columns * times) * p
        small = graph.min_patches * p
        found += [(1, (small, small)), (5, (small, small)), (1, large)]
        found.append((2, (size[0] + 2 * p, max(size[1] - p, small))))
    return found


def sides(graph: Graph, size: Size) -> str:
    """What height and width of an image may be, in words."""
    if graph.fixed is not None:
        return f"{size[0]} x {size[1]}"
    return f"multiples of {graph.patch} from {graph.min_patches * graph.patch}"


@contextlib.contextmanager
def _resampling(backbone: ImageEncoder) -> Iterator[None]:
    """Positions are resampled for every grid, the trained one too, so that the traced graph is right for any grid."""
    backbone.resample_always = True
    try:
        yield
    finally:
        backbone.resample_always = False


@contextlib.contextmanager
def _refusing(graph: Graph, what: str) -> Iterator[None]:
    """Turn an exporter's error into one about the network, with the reason from the end of the causes."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise NotExportableError(f"{what} cannot express {graph.title} with this version of torch: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporters' progress and version warnings; the result is compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
