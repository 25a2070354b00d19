"""Graphs of a backbone that timm cannot open: features.pt2 (torch.export) and features.onnx, for everybody else.

Each is compared with the backbone on three batch sizes and, unless its size is fixed, four image sizes before it is
kept. Fovea writes them and never reads those of a release. A graph that cannot be had never fails the release: the
reason is recorded.
"""

from __future__ import annotations

import copy
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.export import graph as graphs
from pretrain.models.export.outputs import ExportOutput
from pretrain.models.release.manifest import FEATURES_ONNX, FEATURES_PT2

MOST_SECONDS = 120  # for each file
MOST_BYTES = 1_800_000_000  # of weights: an ONNX file holds no more
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class FeatureGraph(graphs.Graph):
    """Pixels [b, C, H, W] in 0 to 1 -> "features" [b, D], and "tokens" [b, P + N, D] where patches are provided."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: ImageEncoder, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.encoder = copy.deepcopy(backbone).cpu().eval().requires_grad_(False)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        pooled = "the class token" if backbone.class_token else "the mean of the patches"
        self.outputs = (ExportOutput("features", f"[batch, {backbone.embed_dim}]: {pooled}"),)
        self.gives_tokens = "patches" in backbone.provides
        if self.gives_tokens:
            prefix = backbone.num_prefix_tokens
            content = (
                f"[batch, {prefix} + N, {backbone.embed_dim}]: class token and registers, then N patches row by row"
            )
            self.outputs += (ExportOutput("tokens", content if prefix else content.replace("0 + N", "N")),)
        self.title, self.patch, self.fixed = backbone.title, backbone.patch_size, backbone.fixed_size_reason()

    @property
    def backbone(self) -> ImageEncoder:
        return self.encoder

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        normalized = (images - self.mean) / self.std
        if not self.gives_tokens:
            return self.encoder.forward_cls(normalized)
        tokens = self.encoder(normalized)
        if self.encoder.class_token:
            return tokens[:, 0], tokens
        if "layers" in self.encoder.provides:
            return tokens[:, self.encoder.num_prefix_tokens :].mean(1), tokens
        return self.encoder.forward_cls(normalized), tokens


def write_graphs(
    folder: Path, backbone: ImageEncoder, *, mean: Sequence[float], std: Sequence[float], seconds: float = MOST_SECONDS
) -> dict[str, Any]:
    """Write the graphs that can be had into `folder`.

    Args:
        seconds: time limit of each file, in the main thread.

    Returns:
        "outputs": content by name; "sides": what height and width must be; "files": comparisons by file name;
        "lacking": reason by the name of a file that is not there.
    """
    files: dict[str, Any] = {}
    lacking: dict[str, str] = {}
    facts: dict[str, Any] = {"outputs": {}, "sides": "", "files": files, "lacking": lacking}

    def attempt(name: str, make: Callable[[Path], graphs.Run]) -> None:
        path = folder / name
        try:
            with time_limit(seconds):
                run = make(path)
                files[name] = [one.facts() for one in graphs.compare(graph, run, graphs.cases(graph, size))]
        except Exception as error:  # whatever an exporter raises: the release must be written
            lacking[name] = reason_of(error)
            for left in folder.glob(f"{name}*"):
                left.unlink()

    if sum(tensor.nbytes for tensor in backbone.state_dict().values()) > MOST_BYTES:
        lacking[FEATURES_PT2] = lacking[FEATURES_ONNX] = f"its weights are larger than {MOST_BYTES / 1e9:g} GB"
        return facts
    try:
        graph, size = FeatureGraph(backbone, mean, std), backbone.img_size
    except Exception as error:  # such as too little memory for a copy
        lacking[FEATURES_PT2] = lacking[FEATURES_ONNX] = reason_of(error)
        return facts
    facts["outputs"] = {output.name: output.content for output in graph.outputs}
    facts["sides"] = graphs.sides(graph, size)
    programs: list[torch.export.ExportedProgram] = []

    def write_program(path: Path) -> graphs.Run:
        programs.append(graphs.trace(graph, size))
        torch.export.save(programs[0], path)
        return graphs.run_program(path)

    def write_onnx(path: Path) -> graphs.Run:
        graphs.write_onnx(graph, programs[0], path)
        return graphs.session(path)

    attempt(FEATURES_PT2, write_program)
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not programs:
        lacking[FEATURES_ONNX] = lacking[FEATURES_PT2]
    elif absent:
        lacking[FEATURES_ONNX] = f"{', '.join(absent)} is not installed (pip install 'fovea[export]')"
    else:
        attempt(FEATURES_ONNX, write_onnx)
    return facts


def reason_of(error: Exception) -> str:
    """The first line of an error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _LateError(BaseException):
    """The time is over; no `except Exception` of an exporter may hide it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """The body of a `with` that may take this many seconds; no limit outside the main thread, which alone gets signals.

    Raises:
        TimeoutError: it was not done by then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _LateError:
        raise TimeoutError(f"not done within {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
