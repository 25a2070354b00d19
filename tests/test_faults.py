"""Faults of data, disk and environment in real runs: a sentence and the exit status of its kind, never a traceback."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.lab.forks import Fork
from tests.runs import (
    LONG,
    SHARDS,
    finish,
    kill_all,
    losses,
    rank_environments,
    reached,
    start,
    wait_until,
    write_config,
)

pytestmark = pytest.mark.processes

LASTING = ("optim.total_steps=100000", "optim.warmup_steps=4")


def sentence(said: str) -> str:
    """What a run that ended by a fault has said last."""
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_run_folder_that_is_gone_ends_the_run(tmp_path: Path, what: str):
    run = start(write_config(tmp_path, "mae"), *LASTING, "checkpoint.every_steps=100000")
    try:
        wait_until(lambda: reached(tmp_path / "run") >= 2, run)
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if what == "replaced":
            (tmp_path / "run").mkdir()
        assert run.wait() == 7
    finally:
        kill_all(run)
    assert str(tmp_path / "run") in sentence(run.said)  # that it is gone may be noticed first by any of its files


def test_shards_that_are_removed_in_mid_run_are_named(tmp_path: Path):
    shutil.copytree(SHARDS / "train", tmp_path / "shards")
    config = write_config(tmp_path, "mae")
    workers = ("data.num_workers=1", "data.block_shards=1")
    run = start(config, *LASTING, *workers, f"data.shards={tmp_path / 'shards'}")
    try:
        wait_until(lambda: reached(tmp_path / "run") >= 1, run)
        shutil.rmtree(tmp_path / "shards")
        assert run.wait() == 2
    finally:
        kill_all(run)
    assert str(tmp_path / "shards") in sentence(run.said)


def test_damaged_lines_of_the_log_are_dropped_when_the_run_resumes(tmp_path: Path):
    config = write_config(tmp_path, "mae")
    log = tmp_path / "run" / "metrics.jsonl"
    assert finish(config, "optim.total_steps=8")[0] == 0
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"\x00\xff\n", b"[1]\n", *lines[1:]]))
    (tmp_path / "run" / "DONE").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    status, said = finish(config, "optim.total_steps=8")
    assert status == 0 and "metrics.jsonl: 2 damaged lines were dropped" in said, said
    assert sorted(losses(tmp_path / "run")) == list(range(1, 9))


def test_a_full_disk_has_a_status_of_its_own(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.strip()}")
    try:
        status, said = finish(write_config(tmp_path, "mae"), f"run_dir={disk / 'run'}", *LASTING)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert status == 5 and "No space left on device" in sentence(said), said


@pytest.mark.parametrize("mpi", ["OMPI_COMM_WORLD", "PMI"])
def test_ranks_of_mpirun_train_together(tmp_path: Path, mpi: str):
    names = ("LOCAL_RANK", "LOCAL_SIZE") if mpi.startswith("OMPI") else ("LOCALRANKID", "LOCALNRANKS")
    local = f"{mpi}_" if mpi.startswith("OMPI") else "MPI_"
    config = write_config(tmp_path, "mae")
    output = tmp_path / "output.txt"
    (outside,) = rank_environments(1)
    ranks = [
        Fork(
            ["fovea", "pretrain", str(config), "optim.total_steps=4", "optim.warmup_steps=1"],
            outside
            | {f"{mpi}_RANK": str(rank), f"{mpi}_SIZE": "2", f"{local}{names[0]}": str(rank), f"{local}{names[1]}": "2"}
            | {"PMIX_NAMESPACE": str(tmp_path)},
            output,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(LONG) for rank in ranks] == [0, 0], output.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    assert (tmp_path / "run" / "DONE").exists()
    assert '"world_size": 2' in (tmp_path / "run" / "environment.jsonl").read_text()
