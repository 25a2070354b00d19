"""One trial: its folder, its random numbers, the commands it starts, and what their end must look like."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.lab.bench import STEPS, Bench, hashes, logged
from launch.lab.forks import Fork
from launch.lab.verdicts import SILENT, BrokenPromiseError
from pretrain.core.text import has_control_characters

LONGEST = 900.0  # seconds until a command counts as hanging: more than any takes on a busy machine
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Command:
    """A command of Fovea in a process of its own."""

    def __init__(self, process: Fork, output: Path):
        self.process, self._output = process, output

    @property
    def said(self) -> str:
        return self._output.read_text("utf-8", errors="replace") if self._output.exists() else ""

    @property
    def last(self) -> str:
        """Its last lines, for a report."""
        return " / ".join(self.said.strip().splitlines()[-2:])[-400:]

    def wait(self) -> int:
        """The exit status of a command that must end by itself, without a traceback and control characters."""
        try:
            status = self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            kill(self.process)
            raise BrokenPromiseError(f"hangs: not over after {LONGEST:.0f} s: {self.last}") from None
        if "Traceback (most recent call last)" in self.said:
            raise BrokenPromiseError(f"a traceback, status {status}: {self.last}")
        if has_control_characters(self.said.replace("\n", "").replace("\t", "").replace("\r", "")):
            raise BrokenPromiseError(f"a control character was printed: {self.last!a}")
        return status


class Trial:
    """folder: empty, removed after a trial that held. plants: for every command of the trial (the mutation check)."""

    def __init__(self, kind: str, number: int, seed: int, folder: Path, bench: Bench, plants: Sequence[Any] = ()):
        self.folder, self.bench, self._plants = folder, bench, list(plants)
        self.number = number
        self.rng = random.Random(f"{kind}:{number}:{seed}")
        self._commands: list[Command] = []

    @cached_property
    def config(self) -> Path:
        """The configuration of a run in `folder/run`."""
        return self.write("config.yaml", self.bench.pretraining())

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def canary(self) -> Path:
        """A file that exists once a command in an input was run."""
        return self.folder / "canary"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def start(
        self,
        *words: Any,
        environment: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
        plants: Sequence[Sequence[Any]] = (),
        folder: Path | None = None,
    ) -> Command:
        """Start `python -m WORDS` in the folder of the trial."""
        output = self.folder / f"output-{len(self._commands)}.txt"
        outside = {name: value for name, value in os.environ.items() if name not in _OURS}
        fork = Fork(
            [str(word) for word in words],
            outside | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | (environment or {}),
            output,
            folder=str(folder or self.folder),
            limits=limits or {},
            plants=[list(plant) for plant in (*self._plants, *plants)],
        )
        self._commands.append(Command(fork, output))
        return self._commands[-1]

    def stop(self) -> None:
        """Kill what still runs."""
        for command in self._commands:
            kill(command.process)

    # What must hold

    def refused(self, command: Command, *named: str, statuses: Sequence[int] = (2,)) -> None:
        """The command ends with a sentence that names every one of `named`, and one of the statuses."""
        status = command.wait()
        if status == 0:
            raise BrokenPromiseError(f"it went on, status 0: {command.last}", SILENT)
        if status not in statuses:
            raise BrokenPromiseError(f"status {status}, not one of {list(statuses)}: {command.last}")
        for name in named:
            if name not in command.said:
                raise BrokenPromiseError(f"status {status}, but {name!r} is not named: {command.last}")

    def done(self, command: Command) -> None:
        """The command ends with status 0."""
        if (status := command.wait()) != 0:
            raise BrokenPromiseError(f"status {status}: {command.last}")

    def resumes(self, *overrides: Any, **more: Any) -> None:
        """The same command again ends the run with bitwise the weights of the undisturbed one."""
        self.done(self.start("pretrain", self.config, *overrides, **more))
        self.ended_as_undisturbed()

    def ended_as_undisturbed(self, run: Path | None = None) -> None:
        run = run or self.run_dir
        if not (run / "DONE").exists():
            raise BrokenPromiseError("status 0 without the marker DONE", SILENT)
        if hashes(run) != self.bench.weights:
            raise BrokenPromiseError("other weights or optimizer state than the undisturbed run", SILENT)
        losses = logged(run)
        if sorted(losses) != list(range(1, STEPS + 1)) or any(len(rows) > 1 for rows in losses.values()):
            raise BrokenPromiseError("a step is missing in metrics.jsonl or stands in it twice")

    def until(self, condition: Callable[[], bool], command: Command) -> bool:
        """Wait for a condition; False if the command ended before."""
        end = time.monotonic() + LONGEST
        while not condition():
            if command.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise BrokenPromiseError(f"not reached in {LONGEST:.0f} s: {command.last}")
            time.sleep(0.005)
        return True

    def reached(self, step: int) -> Callable[[], bool]:
        """Whether the run has logged `step`."""
        log = self.run_dir / "metrics.jsonl"
        return lambda: log.exists() and f'"step": {step},' in log.read_text("utf-8", errors="replace")


def kill(process: Fork) -> None:
    """SIGKILL to a process and to all that it started, as when a machine is lost."""
    family = [process.pid] if process.poll() is None else []
    for pid in family:  # grows while it is walked
        with suppress(OSError):
            family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if family:
        process.wait(LONGEST)
