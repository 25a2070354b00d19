"""Who am I, from any launcher's environment; and a group that outlives restarts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from pretrain.core import distributed
from pretrain.core.distributed import RendezvousError, World, _agree_on_incarnation
from pretrain.core.ranks import Launch, first_host, forget_launchers, job_port, read_launch, without_ranks
from tests.engine.ranks import launch
from tests.runs import LONG

ROOT = Path(__file__).parents[2]
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu[03-05,9],login1",
}


def test_torchrun():
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, "n1", 29500, agent_store=True)


def test_plain_variables_on_one_machine_need_no_local_rank():
    env = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert read_launch(env) == Launch(3, 4, 3, "n1", 29500, agent_store=False)


def test_a_process_per_rank_under_srun():
    port = job_port(123456)
    assert read_launch(SRUN) == Launch(5, 8, 1, "gpu03", port, agent_store=False)
    assert 1024 < port < 32768, "below the range that systems hand out"


def test_the_step_of_srun_wins_over_the_job():
    env = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu04"}
    launch = read_launch(env)
    assert launch is not None
    assert (launch.world_size, launch.master_addr) == (2, "gpu04")


def test_an_address_that_is_given_wins():
    launch = read_launch(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert launch is not None
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 4000)


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-7",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}  # MPICH, Intel MPI
ADDRESS = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA], ids=["Open MPI", "MPICH"])
def test_mpirun_on_one_node_needs_nothing_more_and_its_ranks_share_a_port(env):
    other = {name: value.replace("1", "0") if "RANK" in name else value for name, value in env.items()}
    first, second = read_launch(other), read_launch(env)
    assert first is not None and second is not None
    assert (first.rank, second.rank, second.world_size, second.local_rank) == (0, 1, 2, 1)
    assert first.master_addr == second.master_addr == "127.0.0.1" and first.master_port == second.master_port


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA, SRUN | OPEN_MPI, SRUN | HYDRA])
def test_mpirun_has_priority_over_the_srun_that_started_its_daemons(env):
    assert read_launch(env | ADDRESS) == Launch(1, 2, 1, "n1", 29500, agent_store=False)


def test_srun_with_a_pmi_of_its_own_is_srun():
    assert read_launch(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8", "PMIX_RANK": "5"}) == read_launch(SRUN)


def test_empty_variables_are_unset():
    empty = dict.fromkeys(["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", "PMI_SIZE"], "")
    assert read_launch(empty) is None
    assert read_launch(SRUN | {"RANK": "", "SLURM_STEP_NODELIST": " "}) == read_launch(SRUN)
    env = {"RANK": "", "WORLD_SIZE": " ", "MASTER_ADDR": "n1"}
    forget_launchers(env)
    assert env == {"MASTER_ADDR": "n1"}, "accelerate reads an empty WORLD_SIZE as a number"


def test_no_library_finds_other_ranks_in_variables_of_mpi():
    env = SRUN | OPEN_MPI | HYDRA | {"HOME": "/"}
    assert without_ranks(env) == {"HOME": "/"}
    forget_launchers(env)
    assert not [name for name in env if name.startswith(("OMPI_COMM", "PMI_", "MPI_LOCAL"))]


def test_torchrun_inside_srun_is_torchrun():
    assert read_launch(SRUN | TORCHRUN) == read_launch(TORCHRUN)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    ],
    ids=["plain", "world of one", "srun of one task", "batch script of one task", "salloc shell"],
)
def test_alone(env):
    assert read_launch(env) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below WORLD_SIZE=4"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1': expected an integer"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected at least 1"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_PORT": "auto"}, "MASTER_PORT='auto'"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 is not below SLURM_STEP_NUM_TASKS=8"),
        (SRUN | {"SLURM_JOB_NODELIST": ""}, "neither MASTER_ADDR nor SLURM_JOB_NODELIST"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "start it with srun"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4x"}, "SLURM_NTASKS='4x': expected an integer"),
        (
            {name: OPEN_MPI[name] for name in OPEN_MPI if "LOCAL_SIZE" not in name},
            "OMPI_COMM_WORLD_SIZE=2 but MASTER_ADDR or MASTER_PORT is not set: give every rank .* or start the ranks "
            "with torchrun, srun or `fovea launch local N`",
        ),
        ({"PMI_SIZE": "2"}, "PMI_RANK is not set"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1, but no variable states the number of ranks"),
    ],
)
def test_an_environment_that_contradicts_itself_is_named(env, message):
    with pytest.raises(ValueError, match=message):
        read_launch(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("a-b-[001-200].site.org,c", "a-b-001.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",", "gpu[", "]x"])
def test_a_node_list_without_a_host_is_named(nodelist):
    with pytest.raises(ValueError, match="SLURM node list"):
        first_host(nodelist)


def test_ranks_agree_on_a_name_that_no_dead_rank_knows():
    store = HashStore()
    # The dead: rank 1 had asked and got an answer, rank 2 had asked and accepted.
    for key, value in {
        "fovea/hello/1": "dead1",
        "fovea/answer/1": "dead1 oldname",
        "fovea/hello/2": "dead2",
        "fovea/answer/2": "dead2 oldname",
        "fovea/accept/2": "oldname",
    }.items():
        store.set(key, value)
    names: dict[int, str] = {}

    def join(rank: int, delay: float) -> None:
        time.sleep(delay)
        names[rank] = _agree_on_incarnation(store, rank, 3)

    threads = [threading.Thread(target=join, args=(rank, delay)) for rank, delay in ((0, 0.0), (1, 0.2), (2, 0.1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(names) == 3
    assert len(set(names.values())) == 1
    assert names[0] != "oldname"


RESTARTED = """
import os, signal, sys, torch
from pretrain.core import distributed
world = distributed.setup("cpu")
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
total = distributed.all_reduce_sum(torch.tensor([world.rank + 1.0])).item()
if attempt == 0 and world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    distributed.barrier()
print(f"attempt {attempt} rank {world.rank} total {total}", flush=True)
distributed.close()
"""


@pytest.mark.processes
def test_a_rank_that_is_killed_is_restarted_by_torchrun_and_all_meet_again(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(script)], env=env, capture_output=True, text=True, timeout=LONG)
    assert run.returncode == 0, run.stderr[-3000:]
    # Two processes write to one pipe: their lines may run together.
    assert sorted(re.findall(r"attempt 1 rank \d total [\d.]+\d", run.stdout)) == [
        "attempt 1 rank 0 total 3.0",
        "attempt 1 rank 1 total 3.0",
    ]


def gradients_of_a_sum(world: World, out: Path) -> dict[str, list[float]]:
    """Of the mean over ranks of each rank's loss, by a weight that all ranks share."""
    del out
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    own = weight * (world.rank + 1)
    total = distributed.sum_over_ranks(own)
    (total.square().sum() * (world.rank + 1)).backward()  # each rank weighs what it computes from the sum differently
    assert weight.grad is not None
    return {"sum": total.tolist(), "own": own.tolist(), "gradient": distributed.all_reduce_mean(weight.grad).tolist()}


@pytest.mark.processes
def test_the_sum_over_two_ranks_has_the_gradient_of_the_mean_of_their_losses(tmp_path):
    results = launch(gradients_of_a_sum, world=2, out=tmp_path)
    assert [result["own"] for result in results] == [[2.0, 3.0], [4.0, 6.0]], "the summands stay"
    # total = 3 w; mean loss = 1.5 * total^2 = 13.5 w^2
    assert all(result["sum"] == [6.0, 9.0] for result in results)
    assert all(result["gradient"] == [54.0, 81.0] for result in results)


def test_alone_every_collective_is_a_no_op():
    assert distributed.is_alone()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    tensor = torch.tensor([2.0])
    assert distributed.all_reduce_sum(tensor) is tensor
    assert distributed.all_reduce_mean(tensor).item() == 2.0
    assert distributed.all_reduce_min(tensor).item() == 2.0
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.broadcast(tensor) is tensor
    assert distributed.all_gather_object("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"
    assert distributed.agree(True)
    assert not distributed.agree(False)
    distributed.barrier()


def test_a_port_that_is_taken_is_named_with_the_variables_that_choose_it(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(RendezvousError, match=rf"MASTER_PORT={port}: .*address already in use \(is the port free"):
            distributed.setup("cpu")


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="device 'tpu'"):
        distributed.setup("tpu", timeout=timedelta(seconds=5))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="local rank 0 has no GPU"):
            distributed.setup("cuda")
