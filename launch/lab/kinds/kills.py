"""Runs that are killed, stopped, suspended or started twice."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.lab.bench import EVERY, STEPS, hashes
from launch.lab.plants import CALLS
from launch.lab.trial import LONGEST, Command, Trial, kill
from launch.lab.verdicts import SILENT, BrokenPromiseError

_SECONDS = 1.5  # about as long as a run takes
_ZERO1 = ("engine.name=deepspeed", "engine.zero_stage=1")


def any_moment(trial: Trial) -> None:
    _kill_once(trial)
    trial.resumes()


def several_times(trial: Trial) -> None:
    for _ in range(3):
        _kill_once(trial)
    trial.resumes()


def _kill_once(trial: Trial) -> None:
    command = trial.start("pretrain", trial.config)
    if trial.rng.random() < 0.3:  # at the start; else while it trains
        time.sleep(trial.rng.uniform(0, _SECONDS))
    else:
        trial.until(trial.reached(trial.rng.randint(1, STEPS)), command)
        time.sleep(trial.rng.uniform(0, 0.1))
    kill(command.process)


def at_a_call(trial: Trial) -> None:
    _end_at_a_call(trial, "die")


def power_failure(trial: Trial) -> None:
    _end_at_a_call(trial, "lose_power", str(trial.run_dir / "checkpoints"))


def _end_at_a_call(trial: Trial, plant: str, *more: str) -> None:
    # fsync and rename are the calls of a commit
    call = trial.rng.choice((*CALLS, "fsync", "rename", "rename", "write"))
    number = trial.rng.randint(1, {"write": 150, "open": 60, "fsync": 50}.get(call, 16))
    trial.start("pretrain", trial.config, plants=[[plant, call, number, *more]]).process.wait(LONGEST)
    _complete_or_absent(trial)
    trial.resumes()


def _complete_or_absent(trial: Trial) -> None:
    """What has the name of a checkpoint is a complete one."""
    from pretrain.engine.checkpoint import commit

    for folder in commit.checkpoints(trial.run_dir / "checkpoints"):
        try:
            commit.verify(folder)
        except commit.DamagedError as damage:
            raise BrokenPromiseError(f"an incomplete checkpoint: {damage}") from None


def one_of_two_ranks(trial: Trial) -> None:
    """Rank 1 is slow to write and dies while it does, when a rank 0 that did not wait would have committed."""
    undisturbed = trial.bench.folder / "two-ranks"
    if not (undisturbed / "DONE").exists():
        for rank in _ranks(trial, undisturbed):
            trial.done(rank)
    plants = [["slow", "write", 0.01, str(trial.run_dir)], ["die", "write", trial.rng.randint(10, 200)]]
    first, second = _ranks(trial, trial.run_dir, plants)
    trial.until(lambda: second.process.poll() is not None, first)
    time.sleep(0.5)
    kill(first.process)
    kill(second.process)
    _complete_or_absent(trial)
    if not (trial.run_dir / "DONE").exists():
        for rank in _ranks(trial, trial.run_dir):
            trial.done(rank)
    if hashes(trial.run_dir) != hashes(undisturbed):
        raise BrokenPromiseError("other weights or optimizer state than the undisturbed run of two ranks", SILENT)


def _ranks(trial: Trial, run_dir: Path, plants: Sequence[Sequence[Any]] = ()) -> list[Command]:
    """Two ranks with ZeRO-1, each of which writes a part of a checkpoint. plants: for the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        trial.start(
            *("pretrain", trial.config, f"run_dir={run_dir}", *_ZERO1),
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            plants=plants if rank else (),
        )
        for rank in range(2)
    ]


def a_worker(trial: Trial) -> None:
    command = trial.start("pretrain", trial.config, "data.num_workers=1")
    trial.until(trial.reached(trial.rng.randint(1, STEPS - 2)), command)
    for pid in _family(command.process.pid):
        if b"forkserver" in _command_line(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if (status := command.wait()) not in (0, 6):
        raise BrokenPromiseError(f"status {status}: {command.last}")
    trial.resumes("data.num_workers=1")


def terminated(trial: Trial) -> None:
    _ask(trial, signal.SIGTERM)


def interrupted(trial: Trial) -> None:
    _ask(trial, signal.SIGINT)


def _ask(trial: Trial, number: int) -> None:
    command = trial.start("pretrain", trial.config)
    trial.until(trial.reached(trial.rng.randint(1, STEPS)), command)
    time.sleep(trial.rng.uniform(0, 0.05))
    command.process.send_signal(number)
    status = command.wait()
    if status not in (0, 85):
        raise BrokenPromiseError(f"status {status}: {command.last}")
    if (trial.run_dir / ("PREEMPTED" if status else "DONE")).exists() is False:
        raise BrokenPromiseError(f"status {status} without its marker: {command.last}")
    trial.resumes()


def suspended(trial: Trial) -> None:
    command = trial.start("pretrain", trial.config)
    trial.until(trial.reached(trial.rng.randint(1, STEPS)), command)
    command.process.send_signal(signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0, 1))
    command.process.send_signal(signal.SIGCONT)
    trial.done(command)
    trial.ended_as_undisturbed()


def started_twice(trial: Trial) -> None:
    first = trial.start("pretrain", trial.config)
    trial.until(trial.reached(trial.rng.randint(1, EVERY)), first)
    first.process.send_signal(signal.SIGSTOP)  # it cannot end before the second has looked
    try:
        trial.refused(trial.start("pretrain", trial.config), "is in use by")
    finally:
        first.process.send_signal(signal.SIGCONT)
    trial.done(first)
    trial.ended_as_undisturbed()


def clock_leaps(trial: Trial) -> None:
    leap = ["clock", trial.rng.choice((-86400.0, -5.0, 3600.0, 1e8)), trial.rng.randint(1, 60)]
    command = trial.start("pretrain", trial.config, plants=[leap])
    trial.until(trial.reached(trial.rng.randint(1, STEPS)), command)
    kill(command.process)
    trial.resumes(plants=[leap])


def _family(pid: int) -> list[int]:
    family = [pid]
    for parent in family:
        with suppress(OSError):
            family += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return family[1:]


def _command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
