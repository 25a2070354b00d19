"""`fovea export --budget MS RELEASE...`: which of several releases answers within MS milliseconds on this machine.

Each is a fine-tuned release or run, or a release of a backbone. One image of the size that it was built for goes
through its ONNX graph in ONNX Runtime, on one thread of the CPU. The largest whose median time is within the budget is
chosen: by the primary number where all record the same one of the same validation images, else by parameters.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.core.machine.terminal import safe_output
from pretrain.core.text import shown
from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.models.export import graph as graphs

WARM_UP, RUNS = 5, 50


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one image: median and quartiles of `runs` runs."""

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Score:
    """The primary number of a release, higher is better, and the fingerprint of the validation set."""

    name: str
    value: float
    images: str


@dataclass(frozen=True)
class Candidate:
    """A release. size: of the image. megabytes: of the ONNX graph. score: None: not recorded."""

    name: str
    size: graphs.Size
    parameters: int
    megabytes: float
    latency: Latency
    score: Score | None = None


def random_image(size: graphs.Size, in_chans: int) -> torch.Tensor:
    """A batch of one image of random pixels, always the same."""
    return torch.rand(1, in_chans, *size, generator=torch.Generator().manual_seed(0))


def latency(run: graphs.Run, *inputs: torch.Tensor, warm_up: int = WARM_UP, runs: int = RUNS) -> Latency:
    """The time of one batch of inputs through `run`, after `warm_up` runs that do not count."""
    times = []
    for _ in range(warm_up + runs):
        start = time.perf_counter()
        run(*inputs)
        times.append(1000 * (time.perf_counter() - start))
    low, median, high = statistics.quantiles(times[warm_up:], n=4)
    return Latency(median, low, high, runs)


def choose(candidates: Sequence[Candidate], milliseconds: float) -> tuple[Candidate | None, str]:
    """The largest candidate whose median is within the budget, None if there is none; and by what it is the largest."""
    scores = [one.score for one in candidates if one.score is not None]
    comparable = len(scores) == len(candidates) and len({(score.name, score.images) for score in scores}) == 1
    within = [one for one in candidates if one.latency.median <= milliseconds]
    if not comparable:
        return max(within, key=lambda one: one.parameters, default=None), "parameters"
    best = max(within, key=lambda one: one.score.value if one.score else 0.0, default=None)
    return best, scores[0].name


def measure(folder: Path, *, runs: int = RUNS) -> Candidate:
    """Export the release `folder` as ONNX into a temporary folder, compare it, and measure it.

    Raises:
        ValueError: it is no release, or cannot become a graph, or the graph differs.
    """
    graph, size, score = _open(folder)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        graphs.write_onnx(graph, graphs.trace(graph, size), path)
        run = graphs.session(path, threads=1)
        if not graph.detects:  # on random pixels it finds nothing; `fovea export` compares it on photos
            graphs.compare(graph, run, graphs.cases(graph, size))
        megabytes = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
        measured = latency(run, *graph.inputs(random_image(size, graph.backbone.in_chans)), runs=runs)
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    return Candidate(str(folder), size, parameters, megabytes, measured, score)


def table(candidates: Sequence[Candidate], milliseconds: float) -> list[str]:
    """Lines of a table, the fastest first."""
    lines = [
        f"{'ms per image (quartiles)':>27}  {'within':6}  {'parameters':>12}  {'MB':>8}  {'size':>9}  number  release"
    ]
    for one in sorted(candidates, key=lambda one: one.latency.median):
        fits = "yes" if one.latency.median <= milliseconds else "no"
        score = "none" if one.score is None else f"{shown(one.score.name)} {one.score.value:.4f}"
        size = f"{one.size[0]} x {one.size[1]}"
        lines.append(
            f"{one.latency!s:>27}  {fits:6}  {one.parameters:12,}  {one.megabytes:8.1f}  {size:>9}  {score}  "
            f"{shown(one.name)}"
        )
    return lines


def machine(warm_up: int = WARM_UP, runs: int = RUNS) -> str:
    """What the times are of, in words."""
    import onnxruntime

    return (
        f"{processor()}, one thread, ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, one image; "
        f"median and quartiles of {runs} runs after {warm_up}"
    )


def processor() -> str:
    """The model of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 1: no release is within the budget. 2: one cannot be measured, or wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="fovea export --budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, required=True, metavar="MS", help="milliseconds for one image")
    parser.add_argument("releases", nargs="+", type=Path, metavar="RELEASE")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.budget < float("inf"):
        parser.error(f"--budget {chosen.budget}: milliseconds above 0, such as 20")
    try:
        print(machine())
        candidates = [measure(folder) for folder in dict.fromkeys(chosen.releases)]
    except ModuleNotFoundError as error:
        print(f"fovea export: {error.name} is not installed; pip install onnx onnxscript onnxruntime", file=sys.stderr)
        return 2
    except (ValueError, CheckpointError) as error:
        print(f"fovea export: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(candidates, chosen.budget)))
    best, by = choose(candidates, chosen.budget)
    if best is None:
        fastest = min(one.latency.median for one in candidates)
        print(f"none is within {chosen.budget:g} ms; the fastest takes {fastest:.2f} ms", file=sys.stderr)
        return 1
    print(f"largest within {chosen.budget:g} ms, by {shown(by)}: {shown(best.name)}")
    return 0


def _open(folder: Path) -> tuple[graphs.Graph, graphs.Size, Score | None]:
    """The graph of a release of a task or a backbone, the size it was built for, and its primary number."""
    from finetune.export.graph import Graph
    from finetune.release import TASK, is_task, open_task
    from pretrain.models.release.folder import read_release
    from pretrain.models.release.graphs import FeatureGraph

    if is_task(folder) or (folder / TASK).is_file():
        task, record = open_task(folder)
        graph = Graph(task)
        height, width = task.input_size
        size = (height + -height % graph.patch, width + -width % graph.patch)
        return graph, size, _score(record)
    release = read_release(folder)
    backbone = release.build()
    return FeatureGraph(backbone, release.record["mean"], release.record["std"]), backbone.img_size, None


def _score(record: dict[str, Any]) -> Score | None:
    values = (record.get("metrics") or {}).get("values") or {}
    images = ((record.get("data") or {}).get("data.val") or {}).get("fingerprint")
    name, value = next(iter(values.items()), ("", None))
    return None if value is None or images is None else Score(name, float(value), images)
