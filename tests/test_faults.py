"""Faults of data, disk and environment in real runs: a sentence and the exit status of its kind, never a traceback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.lab.forks import Fork
from tests.runs import (
    LONG,
    SHARDS,
    data_workers,
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


def test_a_full_disk_is_found_before_the_first_step_and_has_a_status_of_its_own(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.strip()}")
    try:
        config = write_config(tmp_path, "mae")
        status, said = finish(config, f"run_dir={disk / 'run'}", *LASTING)
        assert status == 5 and not losses(disk / "run"), said
        words = ("checkpoint.keep: 12 checkpoints need", "are free under", "choose a run_dir on a larger disk")
        assert all(word in sentence(said) for word in words), said
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        run = start(config, f"run_dir={disk / 'run'}", *LASTING)
        try:
            wait_until(lambda: reached(disk / "run") >= 1, run)
            subprocess.run(["mount", "-o", "remount,size=2m", disk], check=False)
            with suppress(OSError):
                (disk / "fill").write_bytes(bytes(2**26))
            assert run.wait() == 5
        finally:
            kill_all(run)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert "No space left on device" in sentence(run.said), run.said


@pytest.mark.parametrize(
    ("how", "processes"),
    [("SIGTERM", 1), ("SIGINT", 1), ("the file stop", 1), ("SIGTERM", 2), ("the file stop", 2)],
)
def test_a_run_whose_data_does_not_come_follows_a_request_to_stop_and_saves(tmp_path: Path, how: str, processes: int):
    overrides = (*LASTING, "data.num_workers=1", "checkpoint.every_steps=100000")
    run = start(write_config(tmp_path, "mae"), *overrides, processes=processes)
    workers: list[int] = []
    try:
        wait_until(lambda: reached(tmp_path / "run") >= 2, run)
        workers = data_workers(run.ranks[-1].pid)  # the other ranks' data comes
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # as one that waits for storage that does not answer
        before = -1
        while before != reached(tmp_path / "run"):  # the batches that were ready are used
            before = reached(tmp_path / "run")
            time.sleep(1.0)
        if how == "the file stop":
            (tmp_path / "run" / "stop").touch()
        else:
            run.send_signal(signal.Signals[how])
        assert run.wait() == 85, run.said
    finally:
        kill_all(run)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    step = reached(tmp_path / "run")
    assert (tmp_path / "run" / "PREEMPTED").read_text() == f"step {step}\n"
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").exists()
    assert not (tmp_path / "run" / "stop").exists()


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
