"""What a run needs of a machine, against what is there: open files, shared memory, memory, disk. No torch here.

`fovea launch check` asks before a job, and every run asks again before its first step.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from pretrain.core.machine.failures import DiskError, MachineError
from pretrain.core.machine.resources import Resources, open_now, size_text
from pretrain.engine.checkpoint.commit import checkpoints
from pretrain.engine.config import CheckpointConfig, OptimConfig
from pretrain.engine.optim.table import KINDS

if TYPE_CHECKING:
    from torch import nn

FILES_OF_A_RANK = 128  # libraries, sockets, logs
_MORE_FILES = 16  # that a rank opens after its start: a checkpoint, a picture, pipes of its workers
FILES_OF_A_BATCH = 8  # a batch in flight is an open file for each of its tensors
# Memory that is not shared with others: of a worker, and of the server that a rank's workers are forked from, measured
# with torch 2.14 on photos of 224 px. A large photo while it is decoded comes on top.
BYTES_OF_A_WORKER = 32 * 2**20
BYTES_OF_A_SERVER = 288 * 2**20


@dataclass(frozen=True)
class Finding:
    """level: "error" stops the job, "warning" and "fact" do not."""

    level: Literal["error", "warning", "fact"]
    text: str
    of_disk: bool = False

    def __str__(self) -> str:
        return self.text if self.level == "fact" else f"{self.level}: {self.text}"


@dataclass(frozen=True)
class Reading:
    """How the data is read on a node. ranks: of the node. batch: bytes of a micro-batch as a worker sends it."""

    ranks: int
    num_workers: int
    prefetch: int
    batch: float = 0
    open_shards: int = 0

    @property
    def workers(self) -> int:
        return self.ranks * self.num_workers


def open_files(reading: Reading, machine: Resources, *, others: int = FILES_OF_A_RANK) -> Iterator[Finding]:
    """The limit of a process against the files of a rank, with its batches in flight, and of a worker with shards.

    Args:
        others: files that a rank has open besides.
    """
    in_flight = reading.num_workers * reading.prefetch * FILES_OF_A_BATCH
    files = others + max(in_flight, reading.open_shards)
    if files > machine.open_files:
        enough = 2 ** math.ceil(math.log2(files))
        yield Finding(
            "error",
            f"ulimit -n: {machine.open_files} open files, a rank needs about {files}; raise it with "
            f"`ulimit -n {enough}` (of a SLURM job: --environment 'ulimit -n {enough}'), or lower data.num_workers",
        )


def shared_memory(reading: Reading, machine: Resources) -> Iterator[Finding]:
    """Prefetched batches of a node's workers against its /dev/shm; where it is full they go through private memory."""
    count, one = reading.workers, reading.batch
    needed = count * reading.prefetch * one
    if needed > machine.shm:
        fits = int(machine.shm / (count * one))
        way = f"data.prefetch={fits}"
        if not fits:
            way = f"data.num_workers={max(0, int(machine.shm / (reading.ranks * one)))} data.prefetch=1"
        yield Finding(
            "warning",
            f"data.prefetch: {count} workers x {reading.prefetch} batches of {size_text(one)} need "
            f"{size_text(needed)} of /dev/shm, {size_text(machine.shm)} are free: the others go through private "
            f"memory, which is slower; {way} fits, or mount it larger (docker: --shm-size or --ipc=host)",
        )


def host_memory(reading: Reading, machine: Resources) -> Iterator[Finding]:
    """A node's workers and their prefetched batches against its free memory."""
    count = reading.workers
    own = count * BYTES_OF_A_WORKER + reading.ranks * BYTES_OF_A_SERVER if count else 0
    needed = count * reading.prefetch * reading.batch + own
    if needed > machine.memory:
        fits = int((machine.memory - own) / (count * reading.batch)) if machine.memory > own else 0
        key, way = ("data.prefetch", f"data.prefetch={fits} fits") if fits else ("data.num_workers", "use fewer")
        yield Finding(
            "error",
            f"{key}: {count} workers ({size_text(own)}) x {reading.prefetch} batches of {size_text(reading.batch)} "
            f"need {size_text(needed)} of memory, {size_text(machine.memory)} are free; {way}, or request more",
        )


def disk(
    checkpoint: CheckpointConfig, total_steps: int, size: float, machine: Resources, *, run_dir: str, existing: int = 0
) -> Iterator[Finding]:
    """The checkpoints that will be kept, and one being written, against the free space of the run folder.

    Args:
        size: bytes of one. existing: number of those that are there already.
    """
    every = checkpoint.milestone_every_steps
    milestones = total_steps // every if every else 0
    saves = math.ceil(total_steps / checkpoint.every_steps)
    count = min(saves, checkpoint.keep + milestones + 1) + 1  # one to rewind to, one being written
    needed = max(1, count - existing) * size
    have = f", {existing} of them exist" if existing else ""
    yield Finding("fact", f"disk     {count} checkpoints of {size_text(size)}{have}, {size_text(machine.disk)} free")
    if needed > machine.disk:
        fits = existing + int(machine.disk / size) - 2
        way = _fewer(checkpoint.keep, fits, total_steps if milestones else 0) if fits >= 1 else ""
        way = f"{way} fits" if way else "choose a run_dir on a larger disk"
        yield Finding(
            "error",
            f"checkpoint.keep: {count} checkpoints{have} need {size_text(needed)}, {size_text(machine.disk)} are free "
            f"under {run_dir}; {way}",
            of_disk=True,
        )


def _fewer(keep: int, fits: int, total_steps: int) -> str:
    """Settings by which at most `fits` checkpoints are kept. total_steps: 0 without milestones."""
    keep = min(keep, max(1, fits - 1) if total_steps else fits)
    way = f"checkpoint.keep={keep}"
    if not total_steps:
        return way
    every = math.ceil(total_steps / (fits - keep)) if fits > keep else "null"
    return f"{way} checkpoint.milestone_every_steps={every}"


def checkpoint_bytes(model: nn.Module, optim: OptimConfig) -> int:
    """Bytes of a checkpoint of the whole model: its state (weights, averages) and the optimizer's."""
    from pretrain.engine.optim.optimizer import state_bytes

    kept = sum(tensor.nbytes for tensor in model.state_dict().values())
    if KINDS[optim.name].averages:  # the weights that are trained, beside their average
        kept += sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return kept + state_bytes(optim, model)


class _RunConfig(Protocol):
    @property
    def run_dir(self) -> str: ...

    @property
    def checkpoint(self) -> CheckpointConfig: ...


def check_machines(
    config: _RunConfig, reading: Reading, total_steps: int, size: float, say: Callable[[str], None]
) -> None:
    """Collective, before the first step: whether every machine has what the run needs; rank 0 says the warnings.

    Args:
        reading: for one rank; the ranks of each machine are counted. size: bytes of a checkpoint.

    Raises:
        MachineError: on every rank, with the errors of all machines. DiskError: they are of the disk.
    """
    from pretrain.core import distributed

    machine, rank = Resources.here(Path(config.run_dir)), distributed.rank()
    hosts = distributed.all_gather_object(socket.gethostname())
    found = [*open_files(reading, machine, others=open_now() + _MORE_FILES)]
    if hosts.index(hosts[rank]) == rank:
        node = replace(reading, ranks=hosts.count(hosts[rank]))
        found += [*shared_memory(node, machine), *host_memory(node, machine)]
    if rank == 0:
        existing = len(checkpoints(Path(config.run_dir) / "checkpoints"))
        found += disk(config.checkpoint, total_steps, size, machine, run_dir=config.run_dir, existing=existing)
    everywhere = dict.fromkeys(one for each in distributed.all_gather_object(found) for one in each)
    if errors := [one for one in everywhere if one.level == "error"]:
        kind = DiskError if all(one.of_disk for one in errors) else MachineError
        raise kind("\n".join(one.text for one in errors))
    for one in everywhere:
        if one.level == "warning":
            say(str(one))
