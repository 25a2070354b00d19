"""`fovea launch plan CONFIG --nodes 64 --gpu h200`: time, memory, network, storage, failures of a run, by formulas.

Nothing here was measured on such a cluster: the constants are printed, and each can be replaced by a measured one.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass

from launch.plan.hardware import UTILIZATION, Gpu, find_gpu
from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, load_config
from pretrain.core.machine.command import run_command
from pretrain.core.machine.resources import GIB
from pretrain.core.machine.terminal import safe_output
from pretrain.datasets import open_data

# Llama 3 405B (Grattafiori et al. 2024, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100.
FAILURES_PER_GPU_DAY = 419 / (54 * 16384)
IMAGES_PER_CORE = (
    688  # a second: decode 500 x 400 px and crop to 224 px, one core of an AMD EPYC (measured on a CPU box)
)


@dataclass(frozen=True)
class Cluster:
    """The inputs of the formulas. network: GB/s of one node to the others; storage: GB/s in total."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    cores_per_node: int
    network: float
    storage: float
    utilization: float
    failures_per_gpu_day: float
    restart: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Load:
    """One optimizer step and one checkpoint. flops: of the global batch; bytes: gradients, state, images."""

    batch: int
    steps: int
    flops: float
    gradients: float
    checkpoint: float
    image_bytes: float


@dataclass(frozen=True)
class Forecast:
    """In seconds unless stated otherwise.

    compute, reduce, read, decode: of one step, each alone. step: the slowest of them, because they overlap.
    save: writing one checkpoint. mtbf: between failures of the run. interval: best between checkpoints.
    lost: fraction of the time that checkpoints, repeated work and restarts take.
    """

    compute: float
    reduce: float
    read: float
    decode: float
    step: float
    save: float
    mtbf: float
    interval: float
    lost: float
    total: float


def forecast(load: Load, cluster: Cluster) -> Forecast:
    """The run of `load` on `cluster`.

    compute = flops / (GPUs x utilization x peak). reduce = 2 (N - 1) / N x gradients / network: a ring over N nodes,
    after a sum inside each node. read = batch x image bytes / storage. decode = batch / (nodes x cores x rate).
    save = checkpoint / storage. mtbf = 1 / (GPUs x rate). interval = sqrt(2 x save x mtbf) (Young 1974; Daly 2006).
    lost = save / interval + (interval / 2 + restart) / mtbf.
    """
    compute = load.flops / (cluster.gpus * cluster.utilization * cluster.gpu.bf16 * 1e12)
    reduce = 2 * (cluster.nodes - 1) / cluster.nodes * load.gradients / (cluster.network * 1e9)
    read = load.batch * load.image_bytes / (cluster.storage * 1e9)
    decode = load.batch / (cluster.nodes * cluster.cores_per_node * IMAGES_PER_CORE)
    step = max(compute, reduce, read, decode)
    save = load.checkpoint / (cluster.storage * 1e9)
    mtbf = 86400 / (cluster.gpus * cluster.failures_per_gpu_day)
    interval = max(step, math.sqrt(2 * save * mtbf))
    lost = min(1.0, save / interval + (interval / 2 + cluster.restart) / mtbf)
    total = load.steps * step / (1 - lost) if lost < 1 else math.inf
    return Forecast(compute, reduce, read, decode, step, save, mtbf, interval, lost, total)


def describe(config: PretrainConfig, load: Load, cluster: Cluster, found: Forecast, memory: list[str]) -> str:
    """The forecast as text, its constants last."""
    ways = {"compute": found.compute, "network": found.reduce, "reading": found.read, "decoding": found.decode}
    slowest = max(ways, key=ways.__getitem__)
    rate, every = load.batch / found.step, max(1, round(found.interval / found.step))
    read = rate * load.image_bytes / 1e9
    per_day = 86400 / found.mtbf
    lines = [
        f"run        {load.steps} steps of {load.batch} images on {cluster.nodes} nodes x {cluster.gpus_per_node} GPUs",
        f"compute    {found.compute:.3g} s a step ({load.flops / load.batch / 1e9:.3g} GFLOP an image)",
        *memory,
        f"network    {load.gradients / 1e9:.3g} GB of gradients, {found.reduce:.3g} s a step between nodes",
        f"decoding   {found.decode:.3g} s a step on {cluster.cores_per_node} cores of each node",
        f"reading    {read:.3g} GB/s in total, {read / cluster.nodes:.3g} a node; {found.read:.3g} s a step",
        f"step       {found.step:.3g} s, {rate:.0f} images/s; limited by {slowest}",
        f"checkpoint {load.checkpoint / 1e9:.3g} GB, {found.save:.3g} s to write; best every {_time(found.interval)}: "
        f"checkpoint.every_steps={every} (the configuration has {config.checkpoint.every_steps})",
        f"failures   {per_day:.3g} a day, one in {_time(found.mtbf)}; {found.lost:.2%} of the time for checkpoints, "
        f"repeated steps and restarts",
        f"total      {_time(found.total)}, {found.total / 86400 * cluster.gpus:.0f} GPU-days",
        f"assumed    {cluster.utilization:.0%} of {cluster.gpu.bf16:.0f} TFLOP/s; {cluster.network:g} GB/s a node; "
        f"storage {cluster.storage:g} GB/s; {IMAGES_PER_CORE} images/s a core;",
        f"           {cluster.failures_per_gpu_day:.2g} failures a GPU-day (Llama 3: 16,384 H100); restart "
        f"{cluster.restart:g} s",
    ]
    return "\n".join(lines)


@safe_output()
def main(arguments: list[str]) -> int:
    """Exit status 2 for a wrong configuration or cluster."""
    chosen = _parser().parse_intermixed_args(arguments)
    try:
        print(_plan(chosen))
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _plan(chosen: argparse.Namespace) -> str:
    from launch.plan.cost import count
    from launch.plan.memory import Footprint, possible_stages

    config = load_config(PretrainConfig, chosen.config, chosen.overrides)
    images, image_bytes = chosen.images, chosen.image_kb * 1e3
    if images is None:
        try:
            dataset = open_data(config.data)
        except ValueError as error:
            way_out = "where the data are not on this machine, give the number of images: --images 1281167"
            raise ConfigError(str(chosen.config), [*str(error).splitlines(), way_out]) from error
        images, image_bytes = dataset.num_samples, sum(row.bytes for row in dataset.rows) / dataset.num_samples
    gpu = find_gpu(chosen.gpu)
    cluster = Cluster(
        chosen.nodes,
        chosen.gpus_per_node,
        gpu,
        chosen.cores_per_node,
        chosen.network,
        chosen.storage,
        chosen.utilization,
        chosen.failures_per_gpu_day,
        chosen.restart,
    )
    steps = plan(config, num_samples=images, world_size=cluster.gpus)
    cost = count(config)
    batch = config.optim.global_batch_size
    load = Load(batch, steps.total_steps, cost.flops * batch, cost.trained, cost.checkpoint, image_bytes)
    found = Footprint(cost.trained, cost.fixed, cost.optimizer, cost.per_batch, cost.per_image)
    sizes = []
    for stage in possible_stages(config):
        size = found.total(images=steps.micro_batch, zero_stage=stage, world_size=cluster.gpus)
        sizes.append(f"ZeRO-{stage} {size / GIB:.1f}")
    memory = [f"memory     GiB per GPU with {steps.micro_batch} images: {', '.join(sizes)}; there are {gpu.memory:.0f}"]
    return describe(config, load, cluster, forecast(load, cluster), memory)


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea launch plan", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--nodes", type=_count, required=True)
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h200, h100, a100, ...")
    parser.add_argument("--gpus-per-node", type=_count, default=8)
    parser.add_argument("--cores-per-node", type=_count, default=96, help="cores for decoding (default 96)")
    parser.add_argument("--network", type=_amount, default=400.0, help="GB/s from one node (default 400: 8 x 400 Gb/s)")
    parser.add_argument("--storage", type=_amount, default=20.0, help="GB/s of the file system in total (default 20)")
    parser.add_argument(
        "--utilization", type=_amount, default=UTILIZATION, help="share of the GPU's peak (default 0.35)"
    )
    parser.add_argument("--failures-per-gpu-day", type=_amount, default=FAILURES_PER_GPU_DAY)
    parser.add_argument("--restart", type=_amount, default=300.0, help="seconds from a failure to the next step")
    parser.add_argument("--images", type=_count, help="size of the data set, if it is not on this machine")
    parser.add_argument("--image-kb", type=_amount, default=110.0, help="mean size of an image (default 110)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text!r}")
    return int(text)


def _amount(text: str) -> float:
    if not re.fullmatch(r"[\d.]+(e-?\d+)?", text) or not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return float(text)


if __name__ == "__main__":
    sys.exit(run_command("fovea launch plan", lambda: main(sys.argv[1:])))
