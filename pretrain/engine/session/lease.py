"""One writer per run folder. The kernel holds the lock and releases it when the process ends, however that happens."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class RunInUseError(ValueError):
    """The run folder is not available: another process writes to it, or it cannot be locked."""


class Lease:
    """Held by rank 0 for the whole run.

    Raises:
        RunInUseError: the message names the process that holds the lock.
    """

    def __init__(self, run_dir: Path):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunInUseError(f"{run_dir} cannot be written: {error.strerror}; use another run folder") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 4096, 0).decode(errors="replace")
            os.close(self._fd)
            if error.errno != errno.EWOULDBLOCK:
                message = f"{run_dir} cannot be locked: {error.strerror}; use a file system with locks (flock)"
            else:
                message = f"{run_dir} is in use by {_describe(holder)}; stop it, or use another run folder"
            raise RunInUseError(message) from None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(self._fd, 0)
        with suppress(OSError):  # only informative; on a full disk the run itself reports the error
            os.pwrite(self._fd, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Unlock. The file is kept: removing it would let two processes lock two files of the same name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _describe(holder: str) -> str:
    try:
        owner = json.loads(holder)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
