"""The process group: who am I, and the few collectives the rest needs. Alone, every function here is a no-op.

The group is made by us, not by `env://`: after a restart the launcher's store still holds the addresses of dead
processes, and a rank that reads one of them never connects. So rank 0 first agrees with the living ranks on a fresh
name for this incarnation. (The launcher's restart counter cannot be that name: agents of several nodes count
differently.)
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_RENDEZVOUS_SECONDS = 300.0


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


@dataclass(frozen=True)
class Launch:
    """What the environment says about how this process was started."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    agent_store: bool  # the launcher's agent already listens at master_addr:master_port


def setup(device: str = "auto", *, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the other processes of this run (if any) and choose the device.

    Args:
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        timeout: a collective that takes longer is an error.

    Raises:
        ValueError: the environment contradicts itself, or there is no such device.
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
                f"local rank {local_rank} has no GPU: this process sees {torch.cuda.device_count()}; "
                "start one process per GPU, or set device=cpu"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if launch is None:
        return World(0, 1, 0, where)
    # Libraries below us (accelerate, deepspeed) read these, also where SLURM named them otherwise.
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    store = TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0 and not launch.agent_store,
        timeout=timedelta(seconds=_RENDEZVOUS_SECONDS),
        wait_for_workers=False,
    )
    incarnation = _agree_on_incarnation(store, launch.rank, launch.world_size)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=PrefixStore(f"fovea/{incarnation}", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=where if device == "cuda" else None,
    )
    return World(launch.rank, launch.world_size, local_rank, where)


def read_launch(env: Mapping[str, str]) -> Launch | None:
    """Understand torchrun, `deepspeed`, `srun` (a process per rank) and plain variables; None: this process is alone.

    Raises:
        ValueError: variables are missing or contradict each other; the message names them.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, world_size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        # Without LOCAL_RANK: one machine.
        local_rank = _integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank
        _check_ranks(("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank))
        if world_size == 1:
            return None
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not env.get(name):
                raise ValueError(f"WORLD_SIZE={world_size} but {name} is not set: ranks cannot find each other")
        agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launch(rank, world_size, local_rank, env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), agent_store)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return _read_slurm(env)
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']} but this process is the batch script itself (no SLURM_STEP_ID): "
            "start it with srun, or ask for one task"
        )
    return None


def _read_slurm(env: Mapping[str, str]) -> Launch | None:
    rank, local_rank = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
    # The step's size wins: `srun -n 2` inside a job of 4 tasks is 2 ranks.
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    world_size = _integer(env, size_name)
    _check_ranks(("SLURM_PROCID", rank), (size_name, world_size), ("SLURM_LOCALID", local_rank))
    if world_size == 1:
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    address = env.get("MASTER_ADDR") or (first_host(nodes) if nodes else "")
    if not address:
        raise ValueError(f"{size_name}={world_size} but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set")
    port = _integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else job_port(_integer(env, "SLURM_JOB_ID"))
    return Launch(rank, world_size, local_rank, address, port, agent_store=False)


def first_host(nodelist: str) -> str:
    """First name of a SLURM node list: "gpu[03-05,9],login1" -> "gpu03"; also "r[1-2]n[01-16]" -> "r1n01"."""
    head = re.match(r"((?:[^,\[\]]|\[[^\]]*\])+)(,|$)", nodelist.strip())
    if not head:
        raise ValueError(f"SLURM node list {nodelist!r}: cannot find a first host in it")
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head.group(1))
    if "[" in host or "]" in host:
        raise ValueError(f"SLURM node list {nodelist!r}: cannot find a first host in it")
    return host


def job_port(job_id: int) -> int:
    """A port that two jobs on one node hardly share, below the range that systems hand out themselves."""
    return 16384 + job_id % 16384


def _integer(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise ValueError(f"{name} is not set though other variables say this is one rank of several")
    if not re.fullmatch(r"\d+", env[name]):
        raise ValueError(f"{name}={env[name]!r}: expected a whole number")
    return int(env[name])


def _check_ranks(rank: tuple[str, int], world: tuple[str, int], local: tuple[str, int]) -> None:
    if world[1] < 1:
        raise ValueError(f"{world[0]}={world[1]}: expected at least 1")
    for name, value in (rank, local):
        if value >= world[1]:
            raise ValueError(f"{name}={value} is not below {world[0]}={world[1]}")


def _agree_on_incarnation(store: Store, rank: int, world_size: int) -> str:
    """A name only the processes alive now know.

    Every rank says hello with a nonce of its own; rank 0 answers each nonce with the name it drew; a rank accepts the
    answer to its own nonce only, and says so. A dead process' hello gets an answer that nobody accepts, until its
    successor overwrites it.
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
        raise RuntimeError(f"rendezvous: {what} after {_RENDEZVOUS_SECONDS:.0f} s; did every rank start?")
    time.sleep(pause)
    return min(pause * 2, 0.2)


def is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def rank() -> int:
    return 0 if is_alone() else dist.get_rank()


def world_size() -> int:
    return 1 if is_alone() else dist.get_world_size()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if not is_alone():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    return all_reduce_sum(tensor).div_(world_size())


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Minimum over ranks, in place."""
    if not is_alone():
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every rank, in order of rank. Pickles, but only between the processes of this run."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if is_alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values, in place; any memory layout."""
    if not is_alone():
        dense = tensor.contiguous()
        dist.broadcast(dense, src=0)
        if dense is not tensor:
            tensor.copy_(dense)
    return tensor


def agree(flag: bool) -> bool:
    """True on every rank when it is true on any."""
    return any(all_gather_object(flag))


def barrier() -> None:
    if not is_alone():
        dist.barrier()


def close() -> None:
    """Leave the group, all ranks together; a group left open makes the launcher's log noisy."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
