"""The nodes of a job, measured by every rank before the first step: products, sums, versions, clocks.

A rank that is slow or wrong is found by comparison with the others; its node is named.
"""

from __future__ import annotations

import math
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.core import distributed
from pretrain.core.record import versions

SLOW = 0.8  # of the median: slower ranks are named
WRONG = 1e-2  # relative error of a product: rounding to bf16 is below half of it
EXIT_BROKEN = 3
SKEW_SECONDS = 5.0  # between clocks
_SECONDS = 0.5  # of each measurement


@dataclass(frozen=True)
class NodeReport:
    """What one rank measured. product: TFLOP/s. reduce: GB/s of a large sum over all ranks, as this rank sees it."""

    rank: int
    node: str
    device: str
    driver: str
    versions: dict[str, str]
    clock: float
    product: float
    product_error: float
    sum_error: float
    reduce: float


def check_nodes(*, device: str = "auto") -> int:
    """Measure together with the other ranks; rank 0 prints. Exit status 3 on the ranks of a broken node.

    The process group is created and closed here, so this is the last action of the process.
    """
    try:
        world = distributed.setup(device)
    except ValueError as error:
        print(f"error: rank on {socket.gethostname()}: {error}", file=sys.stderr)
        return EXIT_BROKEN
    try:
        reports = distributed.all_gather_object(_measure(world.rank, world.device))
        errors, warnings = judge(reports)
        if world.rank == 0:
            products, slowest = [report.product for report in reports], min(report.reduce for report in reports)
            print(
                f"nodes    {len({r.node for r in reports})} with {len(reports)} ranks on {reports[0].device}; "
                f"products {min(products):.3g}-{max(products):.3g} TFLOP/s, sums {slowest:.3g} GB/s"
            )
            for line in warnings:
                print(f"warning: {line}")
            for line in errors:
                print(f"error: {line}")
        return EXIT_BROKEN if any(is_broken(report) for report in reports if report.node == socket.gethostname()) else 0
    finally:
        distributed.close()


def is_broken(report: NodeReport) -> bool:
    """It computes wrong results."""
    return not report.product_error < WRONG or bool(report.sum_error)


def judge(reports: Sequence[NodeReport]) -> tuple[list[str], list[str]]:
    """(errors, warnings) about the ranks that differ from the rest."""
    errors, warnings = [], []
    for report in filter(is_broken, reports):
        who = f"{report.node} (rank {report.rank})"
        if not report.product_error < WRONG:
            errors.append(f"{who}: a product of matrices is wrong by {report.product_error:.2g}; exclude the node")
        if report.sum_error:
            errors.append(f"{who}: a sum over ranks is wrong by {report.sum_error:.2g}; exclude the node")
    for what, unit, of in (
        ("products", "TFLOP/s", lambda report: report.product),
        ("sums", "GB/s", lambda report: report.reduce),
    ):
        warnings += _slow(reports, what, unit, of)
    for what, of in (
        ("device", lambda report: report.device),
        ("driver", lambda report: report.driver),
        *((name, lambda report, name=name: report.versions[name]) for name in reports[0].versions),
    ):
        warnings += _different(reports, what, of)
    middle = statistics.median(report.clock for report in reports)
    for report in reports:
        if abs(report.clock - middle) > SKEW_SECONDS:
            warnings.append(f"{report.node}: its clock is {report.clock - middle:+.0f} s off; time limits depend on it")
    return errors, warnings


def _slow(reports: Sequence[NodeReport], what: str, unit: str, of: Callable[[NodeReport], float]) -> list[str]:
    middle = statistics.median(of(report) for report in reports)
    return [
        f"{report.node} (rank {report.rank}): {what} at {of(report):.3g} {unit}, the median is {middle:.3g}; a step "
        "waits for the slowest: exclude the node (--exclude) if this persists"
        for report in reports
        if of(report) < SLOW * middle and not math.isinf(middle)
    ]


def _different(reports: Sequence[NodeReport], what: str, of: Callable[[NodeReport], str]) -> list[str]:
    """The nodes whose value differs from the majority."""
    values = [of(report) for report in reports]
    usual = statistics.mode(values)
    odd = sorted(
        {f"{report.node} has {value}" for report, value in zip(reports, values, strict=True) if value != usual}
    )
    return [f"{what}: {', '.join(odd)}, the others {usual}; install the same on all"] if odd else []


def _measure(rank: int, device: object) -> NodeReport:
    import torch

    assert isinstance(device, torch.device)
    on_gpu = device.type == "cuda"
    product, product_error = _product(torch, device, size=8192 if on_gpu else 256)
    reduce, sum_error = _sum(torch, device, rank, numbers=2**26 if on_gpu else 2**18)
    return NodeReport(
        rank=rank,
        node=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        driver=_driver() if on_gpu else "",
        versions=versions(),
        clock=_clock(),
        product=product,
        product_error=product_error,
        sum_error=sum_error,
        reduce=reduce,
    )


def _clock() -> float:
    """This node's time at the same moment on all ranks."""
    distributed.barrier()
    return time.time()


def _product(torch, device, *, size: int) -> tuple[float, float]:
    """(TFLOP/s in bf16, relative error against the same product by rows in fp32)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, torch.bfloat16)
    b = torch.randn(size, size, generator=generator).to(device, torch.bfloat16)
    result = a @ b  # warms up
    count, start = 0, _now(torch, device)
    while (seconds := _now(torch, device) - start) < _SECONDS:
        result = a @ b
        count += 1
    rows = a[:16].float() @ b.float()
    error = ((result[:16].float() - rows).norm() / rows.norm()).item()
    return 2 * size**3 * count / seconds / 1e12, error if math.isfinite(error) else math.inf


def _sum(torch, device, rank: int, *, numbers: int) -> tuple[float, float]:
    """(GB/s through each rank's link for a ring's sum, largest error of a sum whose result is known)."""
    world = distributed.world_size()
    values = torch.full((numbers,), float(rank + 1), device=device)
    distributed.all_reduce_sum(values)
    error = (values - world * (world + 1) / 2).abs().max().item()
    if world == 1:
        return math.inf, error
    repeats, start = 5, _now(torch, device)
    for _ in range(repeats):
        distributed.all_reduce_sum(values.zero_())
    seconds = _now(torch, device) - start
    return repeats * numbers * 4 * 2 * (world - 1) / world / seconds / 1e9, error


def _now(torch, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
