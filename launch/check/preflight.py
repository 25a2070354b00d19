"""Problems of a run on given nodes, found from its configuration and data before a GPU is used.

Each check is a function that yields findings. An error is what cannot work, a warning what will probably
work badly. Every message names a key (or flag, or limit) and a value that would work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config import FinetuneConfig
from launch.plan.cost import Cost
from launch.plan.hardware import UTILIZATION, Gpu
from launch.plan.machine import Machine
from pretrain.config import Plan, PretrainConfig
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.resources import GIB
from pretrain.data.shards.dataset import Dataset
from pretrain.engine.session.folder import check_same_run
from pretrain.engine.session.needs import Finding, Reading
from pretrain.models.release.manifest import source_problem

RunConfig = PretrainConfig | FinetuneConfig
CHECKPOINT_MINUTES = 60  # more work than this between checkpoints gives a warning


@dataclass(frozen=True)
class JobShape:
    """Nodes and time limit of a job. gpu_memory: bytes, None for CPUs. limit, margin: seconds; limit 0: none."""

    nodes: int
    ranks_per_node: int
    gpu_memory: float | None = None
    gpu: Gpu | None = None
    limit: float = 0
    margin: float = 300

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def batch_facts(config: PretrainConfig, plan: Plan, dataset: Dataset, job: JobShape) -> Iterator[Finding]:
    """Batch, learning rate, steps, epochs, and samples against shards and ranks."""
    optim = config.optim
    epochs = plan.total_steps * optim.global_batch_size / plan.num_samples
    yield Finding(
        "fact",
        f"batch    {optim.global_batch_size} = {job.nodes} nodes x {job.ranks_per_node} ranks x {plan.micro_batch} "
        f"images x {config.engine.accumulation_steps} accumulation; peak lr {plan.lr:.4g}",
    )
    yield Finding(
        "fact",
        f"steps    {plan.total_steps}, {plan.warmup_steps} of warm-up; {epochs:.4g} epochs of {plan.num_samples} "
        f"images in {len(dataset.names)} shards",
    )
    if optim.blr is not None and optim.global_batch_size > 16 * optim.blr_batch * 4:
        yield Finding(
            "warning", f"optim.blr: lr {plan.lr:.3g} is scaled from {optim.blr:.3g}; rarely tried at this scale"
        )
    if plan.steps_per_epoch < 10:
        most = max(job.ranks, plan.num_samples // 10 // job.ranks * job.ranks)
        yield Finding(
            "warning",
            f"optim.global_batch_size: {optim.global_batch_size} is {plan.steps_per_epoch} steps an epoch; "
            f"{most} gives ten or more",
        )
    blocks = math.ceil(len(dataset.names) / config.data.block_shards)
    if len(dataset.names) > 1 and blocks == 1:
        yield Finding(
            "fact", f"order    all shards are shuffled together (data.block_shards {config.data.block_shards})"
        )


def task_facts(config: FinetuneConfig, plan: Plan, validation: int, job: JobShape) -> Iterator[Finding]:
    """Batch, steps and epochs; images of data.val against ranks."""
    batch = config.optim.global_batch_size
    epochs = plan.total_steps * batch / plan.num_samples
    yield Finding(
        "fact",
        f"batch    {batch} = {job.nodes} nodes x {job.ranks_per_node} ranks x {plan.micro_batch} images x "
        f"{config.engine.accumulation_steps} accumulation; peak lr {plan.lr:.4g}",
    )
    yield Finding(
        "fact",
        f"steps    {plan.total_steps}, {plan.warmup_steps} of warm-up; {epochs:.4g} epochs of {plan.num_samples} "
        f"images, measured on {validation}",
    )
    size = config.evaluate.batch_size
    if math.ceil(validation / size) < job.ranks:
        fits = max(1, validation // job.ranks)
        yield Finding(
            "warning",
            f"evaluate.batch_size: {validation} images in batches of {size} are fewer batches than {job.ranks} "
            f"ranks; evaluate.batch_size={fits} gives each a batch",
        )


def run_folder(
    config: RunConfig, fingerprints: Mapping[str, str], *, free: Callable[[], Sequence[str]]
) -> Iterator[Finding]:
    """The folder is writable, and is empty or this run's. free: keys that may change (called if needed)."""
    folder = Path(config.run_dir)
    if (folder / "config.yaml").exists():
        try:
            check_same_run(folder, config, fingerprints, free=free())
        except ConfigError as error:
            yield Finding("error", f"run_dir: {error}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".preflight"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        yield Finding("error", f"run_dir: {folder} is not writable ({error.strerror}); choose another, run_dir=...")


def sources(config: PretrainConfig) -> Iterator[Finding]:
    """The source of the initial weights exists and is not damaged."""
    init = config.init
    for key in ("release", "official", "checkpoint") if init else ():
        path = getattr(init, key)
        problem = None if path is None else source_problem(Path(path))
        if problem is not None:
            yield Finding("error", f"init.{key}: {problem}")


def reading(config: RunConfig, job: JobShape, *, batch: float = 0) -> Reading:
    """How the data will be read on a node. batch: bytes of a micro-batch; 0: not known."""
    return Reading(job.ranks_per_node, config.data.num_workers, config.data.prefetch, batch)


def workers(config: RunConfig, plan: Plan, job: JobShape, machine: Machine) -> Iterator[Finding]:
    """Data workers against the cores of a node and the number of samples."""
    data, ranks = config.data, job.ranks_per_node
    if ranks * data.num_workers > machine.cpus:
        fits = max(1, machine.cpus // ranks)
        yield Finding(
            "warning",
            f"data.num_workers: {ranks} ranks x {data.num_workers} workers on {machine.cpus} cores; {fits} fits, or "
            f"request more with --cpus-per-task {data.num_workers}",
        )
    batches = plan.steps_per_epoch * config.engine.accumulation_steps
    if data.num_workers > batches:
        yield Finding(
            "warning",
            f"data.num_workers: {data.num_workers}, but {plan.num_samples} samples are {batches} batches of "
            f"{plan.micro_batch} an epoch for each of {job.ranks} ranks; data.num_workers={batches} gives each "
            "worker one, or fewer ranks",
        )


def memory(config: PretrainConfig, plan: Plan, cost: Cost, job: JobShape) -> Iterator[Finding]:
    """The estimate of each ZeRO stage against the GPU, and settings that would fit."""
    if job.gpu_memory is None:
        return
    from launch.plan.memory import possible_stages

    deepspeed = config.engine.name == "deepspeed"
    now = config.engine.zero_stage if deepspeed else 0
    stages = possible_stages(config)
    need = {stage: _bytes(config, cost, plan.micro_batch, stage, job.ranks) for stage in stages}
    listed = ", ".join(f"ZeRO-{stage} {size / GIB:.1f}" for stage, size in need.items())
    yield Finding("fact", f"memory   GiB per GPU, estimated: {listed}; there are {job.gpu_memory / GIB:.1f}")
    if need[now] <= job.gpu_memory:
        if need[now] > 0.92 * job.gpu_memory:
            yield Finding(
                "warning", f"engine: {need[now] / job.gpu_memory:.0%} of the GPU's memory; the estimate is not exact"
            )
        return
    ways = [f"engine.name=deepspeed engine.zero_stage={s}" for s in stages if s > now and need[s] <= job.gpu_memory][:1]
    share = plan.micro_batch * config.engine.accumulation_steps
    for accumulation in range(config.engine.accumulation_steps + 1, share + 1):
        if share % accumulation == 0 and _bytes(config, cost, share // accumulation, now, job.ranks) <= job.gpu_memory:
            ways.append(f"engine.accumulation_steps={accumulation}")
            break
    way = " or ".join(ways) or "a smaller model, or GPUs with more memory: no stage and no micro-batch fits"
    yield Finding(
        "error",
        f"engine: {plan.micro_batch} images at a time need about {need[now] / GIB:.1f} GiB under "
        f"{'ZeRO-' + str(now) if deepspeed else 'DDP'}, the GPU has {job.gpu_memory / GIB:.1f}; {way}",
    )


def _bytes(config: PretrainConfig, cost: Cost, images: int, stage: int, ranks: int) -> float:
    from launch.plan.memory import Footprint

    found = Footprint(cost.trained, cost.fixed, cost.optimizer, cost.per_batch, cost.per_image)
    return found.total(images=images, zero_stage=stage, world_size=ranks)


def duration(config: RunConfig, plan: Plan, job: JobShape, images_per_second: float, source: str) -> Iterator[Finding]:
    """Wall time against the limit, and the work between two checkpoints.

    Args:
        images_per_second: over all ranks. source: of that number, for the message.
    """
    step = config.optim.global_batch_size / images_per_second
    total = plan.total_steps * step
    jobs = f", {math.ceil(total / max(1.0, job.limit - job.margin))} jobs of {_time(job.limit)}" if job.limit else ""
    yield Finding("fact", f"time     {_time(total)}{jobs} at {images_per_second:.0f} images/s ({source})")
    between = config.checkpoint.every_steps * step
    if between > 60 * CHECKPOINT_MINUTES:
        steps = max(1, int(60 * CHECKPOINT_MINUTES / 2 / step))
        yield Finding(
            "warning",
            f"checkpoint.every_steps: {config.checkpoint.every_steps} steps are {_time(between)}, lost when a node "
            f"dies; checkpoint.every_steps={steps} loses half an hour at most",
        )
    if job.limit and job.limit - job.margin < 2 * step:
        yield Finding(
            "error",
            f"--time: {_time(job.limit)} with --margin {job.margin:.0f} leaves no room for two steps of "
            f"{step:.1f} s; --time {math.ceil((job.margin + 100 * step) / 60)} (minutes) does",
        )


def waiting(config: RunConfig, share: float) -> Iterator[Finding]:
    """The share of the time that a run waits for data."""
    if share > 0.2:
        more = max(2 * config.data.num_workers, 1)
        yield Finding(
            "warning",
            f"data.num_workers: with {config.data.num_workers} a step waits {share:.0%} of its time for data; try "
            f"data.num_workers={more}",
        )


def limits(job: JobShape) -> Iterator[Finding]:
    """The time limit against the time reserved for saving."""
    if job.limit and job.limit <= 2 * job.margin:
        yield Finding(
            "error",
            f"--margin: {job.margin:.0f} s of a limit of {job.limit:.0f} s are for saving; --margin "
            f"{max(15, int(job.limit / 4))} or --time {math.ceil(job.margin * 4 / 60)} (minutes) works",
        )


def estimated_rate(cost: Cost, job: JobShape, *, bf16: bool) -> float | None:
    """Images per second of all GPUs at the assumed share of their peak; None without a known GPU."""
    if job.gpu is None:
        return None
    peak = (job.gpu.bf16 if bf16 else job.gpu.fp32) * 1e12
    return job.ranks * UTILIZATION * peak / cost.flops


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
