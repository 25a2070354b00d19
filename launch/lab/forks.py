"""`python -m MODULE WORD ...` without the imports: processes forked from one server that has imported torch and Fovea.

A trial then costs its steps, not its imports. Each process is real: it has its own memory, session and exit status, and
signals kill it. What it shares with the others is the seed of str hashes; tests/launch/hosts/test_local.py compares,
bitwise, a run of such processes with a run of separate commands.

The server (`python -m launch.lab.forks`) reads requests as JSON lines, and writes the pids and exit statuses as JSON
lines.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from launch.lab.plants import plant
from pretrain.core.machine.children import HOME, child_environment

# What the processes would import one by one; no module that is run with `python -m`.
_PRELOADED = ("accelerate", "deepspeed", "timm", "torch.utils.tensorboard", "finetune.run", "pretrain.run")


@dataclass(frozen=True)
class Request:
    """A process to fork.

    Attributes:
        words: MODULE and its arguments. environment: complete. output: a file that gets stdout and stderr.
        folder: the current folder.
        limits: soft limits by name, for instance {"RLIMIT_NOFILE": 64}.
        plants: faults that are planted in the process before MODULE runs (launch/lab/plants.py).
    """

    words: list[str]
    environment: dict[str, str]
    output: str
    folder: str = str(HOME)
    limits: dict[str, int] = field(default_factory=dict)
    plants: list[list[Any]] = field(default_factory=list)


class Fork:
    """A process that was forked; as subprocess.Popen, as far as it is used."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], output: Path, **more: Any):
        self._server = server()
        self.pid = self._server.fork(Request([str(word) for word in words], dict(environment), str(output), **more))

    @property
    def returncode(self) -> int | None:
        return self._server.statuses.get(self.pid)

    def poll(self) -> int | None:
        self._server.read(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status; subprocess.TimeoutExpired if the process has not ended by then."""
        end = time.monotonic() + timeout
        while (status := self.returncode) is None:
            if (left := end - time.monotonic()) < 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self._server.read(left)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The client's end of the fork server. statuses: exit statuses by pid, of the processes that have ended."""

    def __init__(self):
        environment = os.environ | child_environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "launch.lab.forks"]
        self.process = subprocess.Popen(command, cwd=HOME, env=environment, stdin=pipe, stdout=pipe, bufsize=0)
        self.statuses: dict[int, int] = {}
        self._forked: list[int] = []
        self._unread = b""

    def fork(self, request: Request) -> int:
        """The pid of the new process."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        while not self._forked:
            self.read(600)
        pid = self._forked.pop()
        self.statuses.pop(pid, None)  # of an earlier process with the same pid
        return pid

    def read(self, timeout: float) -> None:
        """Take in what the server has written; wait for it at most `timeout` seconds."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        assert chunk, f"the fork server ended with status {self.process.wait()}"
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            pid, status = json.loads(line)
            if status is None:
                self._forked.append(pid)
            else:
                self.statuses[pid] = status


@cache
def server() -> Server:
    """The server of this process; it ends with it."""
    return Server()


def serve() -> Request | None:
    """Fork for every request on stdin, until it is closed. Returns in the new process, with its request."""
    requests, answers = sys.stdin.fileno(), sys.stdout.fileno()
    running: dict[int, int] = {}  # pid by pidfd
    unread = b""
    while True:
        for ready in select.select([requests, *running], [], [])[0]:
            if ready != requests:
                os.close(ready)
                pid, status = os.waitpid(running.pop(ready), 0)
                _answer(answers, pid, os.waitstatus_to_exitcode(status))
                continue
            chunk = os.read(requests, 1 << 16)
            if not chunk:
                return None
            *lines, unread = (unread + chunk).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    for pidfd in running:
                        os.close(pidfd)
                    return Request(**json.loads(line))
                running[os.pidfd_open(pid)] = pid
                _answer(answers, pid, None)


def _answer(answers: int, pid: int, status: int | None) -> None:
    with suppress(BrokenPipeError):  # the client has ended
        os.write(answers, json.dumps([pid, status]).encode() + b"\n")


def become(request: Request) -> None:
    """Be the process that was requested, to the end of the interpreter."""
    os.setsid()
    os.chdir(request.folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    said = os.open(request.output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(said)
    os.environ.clear()
    os.environ.update(request.environment)
    for name, value in request.limits.items():
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    plant(request.plants)
    module, *words = request.words
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in _PRELOADED:
        import_module(name)
    gc.freeze()  # or every process copies, to free it at its end, what it shares with the server
    if request := serve():
        become(request)
