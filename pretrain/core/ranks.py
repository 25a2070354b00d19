"""Reads rank and world size from the environment of torchrun, `deepspeed`, mpirun, srun or plain variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from zlib import crc32


@dataclass(frozen=True)
class Launch:
    """Rank, world size and rendezvous address from the environment."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    agent_store: bool  # the launcher's agent already listens at master_addr:master_port


@dataclass(frozen=True)
class _Mpi:
    """The variables of one `mpirun`. local_size may be missing."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_OPEN_MPI = _Mpi(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
_MVAPICH = _Mpi(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
_HYDRA = _Mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI; srun --mpi=pmi2
# Libraries read some of these too, in an order of their own.
_MPI_VARIABLES = {name for mpi in (_OPEN_MPI, _MVAPICH, _HYDRA) for name in vars(mpi).values()}
_PLAIN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
_TORCH_VARIABLES = {*_PLAIN_VARIABLES, "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE"}
_BY_HAND = "start the ranks with torchrun, srun or `fovea launch local N`"


def read_launch(env: Mapping[str, str]) -> Launch | None:
    """Read the variables of torchrun, `deepspeed`, mpirun, `srun` (one process per rank), or plain ones.

    An empty variable counts as unset. Returns None for one process.

    Raises:
        ValueError: variables are missing or contradict each other; the message names them.
    """
    env = {name: value for name, value in env.items() if value.strip()}
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, world_size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        # Without LOCAL_RANK: one machine.
        local_rank = _integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank
        _check_ranks(("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank))
        if world_size == 1:
            return None
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise ValueError(f"WORLD_SIZE={world_size} but {name} is not set: ranks cannot connect to each other")
        agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launch(rank, world_size, local_rank, env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), agent_store)
    for mpi in (_OPEN_MPI, _MVAPICH):  # before SLURM: mpirun may start its own daemons with srun
        if mpi.size in env or mpi.rank in env:
            return _read_mpi(env, mpi)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        size = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
        by_daemons = _HYDRA.size in env and (env[_HYDRA.size], env.get(_HYDRA.rank)) != (size, env["SLURM_PROCID"])
        return _read_mpi(env, _HYDRA) if by_daemons else _read_slurm(env)
    if _HYDRA.size in env or _HYDRA.rank in env:
        return _read_mpi(env, _HYDRA)
    if "PMIX_RANK" in env:
        raise ValueError(f"PMIX_RANK={env['PMIX_RANK']}, but no variable states the number of ranks; {_BY_HAND}")
    if "SLURM_PROCID" in env and variable(env, "SLURM_NTASKS", 1) > 1:
        raise ValueError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']} but this process is the batch script itself (no SLURM_STEP_ID): "
            "start it with srun, or request one task"
        )
    return None


def forget_launchers(env: MutableMapping[str, str]) -> None:
    """Remove the variables of mpirun and empty ones: no library finds other ranks in them than `read_launch` did.

    accelerate reads an empty WORLD_SIZE as a number.
    """
    empty = {name for name in _TORCH_VARIABLES if not env.get(name, "").strip()}
    for name in (_MPI_VARIABLES | empty) & env.keys():
        del env[name]


def without_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for a process that is none of the ranks around it."""
    ranks = _MPI_VARIABLES | _PLAIN_VARIABLES
    return {
        name: value for name, value in env.items() if not name.startswith(("SLURM_", "PMIX_")) and name not in ranks
    }


def variable(env: Mapping[str, str], name: str, default: int) -> int:
    """The integer in a variable; `default` where it is empty or not set. ValueError for another text, with the name."""
    return _integer(env, name) if env.get(name, "").strip() else default


def _read_mpi(env: Mapping[str, str], mpi: _Mpi) -> Launch | None:
    rank, world_size = _integer(env, mpi.rank), _integer(env, mpi.size)
    if world_size == 1:
        return None
    local_size = variable(env, mpi.local_size, 0)
    one_node = local_size == world_size
    local_rank = variable(env, mpi.local_rank, rank) if one_node else _integer(env, mpi.local_rank)
    _check_ranks((mpi.rank, rank), (mpi.size, world_size), (mpi.local_rank, local_rank))
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        if not one_node:
            raise ValueError(
                f"{mpi.size}={world_size} but MASTER_ADDR or MASTER_PORT is not set: give every rank the host of rank "
                f"0 and a free port there (Open MPI: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500), or {_BY_HAND}"
            )
        return Launch(rank, world_size, local_rank, "127.0.0.1", job_port(_mpi_job(env)), agent_store=False)
    return Launch(rank, world_size, local_rank, env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), agent_store=False)


def _mpi_job(env: Mapping[str, str]) -> int:
    """A number that the ranks of one mpirun share: of its job, else their parent's, which starts those of a node."""
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    return crc32(job.encode()) if job else os.getppid()


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
    if not re.fullmatch(r"\d+", env[name].strip()):
        raise ValueError(f"{name}={env[name]!r}: expected an integer")
    return int(env[name])


def _check_ranks(rank: tuple[str, int], world: tuple[str, int], local: tuple[str, int]) -> None:
    if world[1] < 1:
        raise ValueError(f"{world[0]}={world[1]}: expected at least 1")
    for name, value in (rank, local):
        if value >= world[1]:
            raise ValueError(f"{name}={value} is not below {world[0]}={world[1]}")
