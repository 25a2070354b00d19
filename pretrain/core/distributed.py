"""The process group: rank, world size, and the collectives that Fovea uses. In a single process they are no-ops.

The group is not created through `env://`: after a restart the launcher's store still contains the addresses of dead
processes, and a rank that reads one of them never connects. So rank 0 first agrees with the running ranks on a new
name for this incarnation. (The launcher's restart counter is no such name: agents on different nodes count
differently.)
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pretrain.core import heartbeat
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.ranks import forget_launchers, read_launch

_RENDEZVOUS_SECONDS = 300.0
T = TypeVar("T")
_acts_alone = False
_store: Store | None = None  # of the running processes


class RendezvousError(RuntimeError):
    """The processes of a run cannot connect to each other."""


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def device_name(self) -> str:
        """Name for records: "cpu", or that of the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def setup(device: str = "auto", *, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the other processes of this run (if any) and choose the device.

    Args:
        device: "cpu", "cuda", or "auto" (cuda if available).
        timeout: a collective that takes longer is an error.

    Raises:
        ValueError: environment variables contradict each other, or the device does not exist.
        RendezvousError: the other processes did not connect in time.
    """
    launch = read_launch(os.environ)
    local_rank = launch.local_rank if launch else 0
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: expected auto, cpu or cuda")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU (visible GPUs: {torch.cuda.device_count()}); "
                "start one process per GPU, or set device=cpu"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    forget_launchers(os.environ)
    if launch is None:
        return World(0, 1, 0, where)
    # accelerate and deepspeed read these; SLURM and MPI use other names.
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    listens = launch.rank == 0 and not launch.agent_store
    try:
        store = TCPStore(
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=listens,
            timeout=timedelta(seconds=_RENDEZVOUS_SECONDS),
            wait_for_workers=False,
        )
        incarnation = _agree_on_incarnation(store, launch.rank, launch.world_size)
    except dist.DistError as error:
        advice = "is the port free, and this host its owner" if listens else "is rank 0 running there"
        raise RendezvousError(
            f"rank {launch.rank} at MASTER_ADDR={launch.master_addr} MASTER_PORT={launch.master_port}: "
            f"{str(error).splitlines()[0]} ({advice}?)"
        ) from error
    global _store
    _store = PrefixStore(f"fovea/{incarnation}", store)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=where if device == "cuda" else None,
    )
    return World(launch.rank, launch.world_size, local_rank, where)


def _agree_on_incarnation(store: Store, rank: int, world_size: int) -> str:
    """A name that only the currently running processes know.

    Every rank writes a random nonce (hello); rank 0 answers each nonce with the name it drew; a rank accepts only the
    answer to its own nonce, and confirms it. The answer to the nonce of a dead process is never accepted; the process
    that replaces it overwrites the nonce.
    """
    name, deadline, pause = secrets.token_hex(8), time.monotonic() + _RENDEZVOUS_SECONDS, 0.005
    if rank > 0:
        nonce = secrets.token_hex(8)
        store.set(f"fovea/hello/{rank}", nonce)
        while True:
            asked, _, answer = _read(store, f"fovea/answer/{rank}").partition(" ")
            if asked == nonce:
                store.set(f"fovea/accept/{rank}", answer)
                return answer
            pause = _wait(pause, deadline, f"rank {rank} got no answer from rank 0")
    waiting, answered = set(range(1, world_size)), dict[int, str]()
    while waiting:
        for other in sorted(waiting):
            nonce = _read(store, f"fovea/hello/{other}")
            if nonce and answered.get(other) != nonce:
                store.set(f"fovea/answer/{other}", f"{nonce} {name}")
                answered[other] = nonce
            if _read(store, f"fovea/accept/{other}") == name:
                waiting.discard(other)
        if waiting:
            pause = _wait(pause, deadline, f"rank 0 waits for ranks {sorted(waiting)}")
    return name


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(pause: float, deadline: float, what: str) -> float:
    if time.monotonic() > deadline:
        raise RendezvousError(f"rendezvous: {what} after {_RENDEZVOUS_SECONDS:.0f} s; did every rank start?")
    time.sleep(pause)
    return min(pause * 2, 0.2)


@contextmanager
def alone() -> Generator[None, None, None]:
    """Inside, this process computes as if it were the only one: no function of this module waits for other ranks."""
    global _acts_alone
    before, _acts_alone = _acts_alone, True
    try:
        yield
    finally:
        _acts_alone = before


def is_alone() -> bool:
    return _acts_alone or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def rank() -> int:
    return 0 if is_alone() else dist.get_rank()


def world_size() -> int:
    return 1 if is_alone() else dist.get_world_size()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if not is_alone():
        heartbeat.enter("all_reduce")
        dist.all_reduce(tensor)
        heartbeat.leave()
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    return all_reduce_sum(tensor).div_(world_size())


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Minimum over ranks, in place."""
    if not is_alone():
        heartbeat.enter("all_reduce")
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        heartbeat.leave()
    return tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce_sum(tensor.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Differentiable sum over ranks, out of place; every rank must also run the backward pass, once.

    The gradient of `tensor` is that of the sum of all ranks' losses. With gradients of parameters averaged over ranks,
    as DDP does, this trains the mean of the losses: a loss that every rank computes from the sum counts once.
    """
    return tensor if is_alone() else cast(Tensor, _SumOverRanks.apply(tensor))


def all_gather(tensor: Tensor) -> Tensor:
    """`tensor` [b, ...] of every rank, the same shape on each, in order of rank: [W * b, ...]; without gradient."""
    tensor = tensor.detach()
    if is_alone():
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    heartbeat.enter("all_gather")
    # Its successor, all_gather_single, came with torch 2.13.
    dist.all_gather_into_tensor(gathered, tensor.contiguous())  # pyright: ignore[reportDeprecated]
    heartbeat.leave()
    return gathered


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every rank, in order of rank. Pickles, but only between the processes of this run."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * world_size()
    heartbeat.enter("all_gather_object")
    dist.all_gather_object(values, value)
    heartbeat.leave()
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if is_alone():
        return value
    box = [value]
    heartbeat.enter("broadcast_object")
    dist.broadcast_object_list(box, src=0)
    heartbeat.leave()
    return box[0]


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values, in place; any memory layout."""
    if not is_alone():
        dense = tensor.contiguous()
        heartbeat.enter("broadcast")
        dist.broadcast(dense, src=0)
        heartbeat.leave()
        if dense is not tensor:
            tensor.copy_(dense)
    return tensor


def agree(flag: bool) -> bool:
    """True on every rank when it is true on any."""
    return any(all_gather_object(flag))


def announce(word: str) -> None:
    """Tell all ranks, without waiting for them; `is_announced` asks."""
    if not is_alone() and _store is not None:
        _store.set(f"announced/{word}", "1")


def is_announced(word: str) -> bool:
    """Whether a rank has announced `word` in this run; asks over the network, for waiting loops only."""
    return not is_alone() and _store is not None and _store.check([f"announced/{word}"])


def until_stopped(batches: Iterable[T]) -> Iterator[T]:
    """This rank's batches of a pass over data. Collective at its end.

    Raises:
        StoppedWaitingError: on every rank, one stopped waiting for its batches.
    """
    stopped = False
    try:
        yield from batches
    except StoppedWaitingError:
        stopped = True
    if agree(stopped):
        raise StoppedWaitingError("requested to stop during a pass over the data")


def barrier() -> None:
    if not is_alone():
        heartbeat.enter("barrier")
        dist.barrier()
        heartbeat.leave()


def close() -> None:
    """Leave the group, all ranks together; a group left open makes the launcher's log noisy."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
