"""Reads rank and world size from the environment of torchrun, `deepspeed`, srun or plain variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Rank, world size and rendezvous address from the environment."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    agent_store: bool  # the launcher's agent already listens at master_addr:master_port


def read_launch(env: Mapping[str, str]) -> Launch | None:
    """Read the variables of torchrun, `deepspeed`, `srun` (one process per rank), or plain ones; None: one process.

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
                raise ValueError(f"WORLD_SIZE={world_size} but {name} is not set: ranks cannot connect to each other")
        agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launch(rank, world_size, local_rank, env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), agent_store)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return _read_slurm(env)
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']} but this process is the batch script itself (no SLURM_STEP_ID): "
            "start it with srun, or request one task"
        )
    return None


def _read_slurm(env: Mapping[str, str]) -> Launch | None:
    rank, local_rank = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
    # The size of the step has priority: `srun -n 2` in a job of 4 tasks is 2 ranks.
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
    """A port that two jobs on one node are unlikely to share, below the ephemeral port range."""
    return 16384 + job_id % 16384


def _integer(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise ValueError(f"{name} is not set, but other variables show that this is one of several ranks")
    if not re.fullmatch(r"\d+", env[name]):
        raise ValueError(f"{name}={env[name]!r}: expected an integer")
    return int(env[name])


def _check_ranks(rank: tuple[str, int], world: tuple[str, int], local: tuple[str, int]) -> None:
    if world[1] < 1:
        raise ValueError(f"{world[0]}={world[1]}: expected at least 1")
    for name, value in (rank, local):
        if value >= world[1]:
            raise ValueError(f"{name}={value} is not below {world[0]}={world[1]}")
