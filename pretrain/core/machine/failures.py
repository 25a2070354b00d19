"""Faults of the user's data, files and machine, as a sentence and an exit status. What is none of these is a bug.

Exit statuses: docs/exit_status.md.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.core.configlib import ConfigError
from pretrain.core.files import SpecialFileError

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_NO_CHECKPOINT = 3
EXIT_DISK = 5
EXIT_MACHINE = 6
EXIT_FILES = 7

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_OPEN_FILES = {errno.EMFILE, errno.ENFILE}
_MEMORY = {errno.ENOMEM, errno.EAGAIN}  # EAGAIN: no process can be started
# Texts of torch, the C++ library and Python where an allocation or a thread failed.
_NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "annot allocate memory", "std::bad_alloc"),
    "failed to map segment",  # of a library that is loaded
)
_NO_THREAD = ("can't start new thread", "can't create new thread", "Resource temporarily unavailable")
# Texts of gloo and NCCL on the ranks that remain when one has ended.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process")


class DataError(ValueError):
    """Data that cannot be used, met while a run reads it."""


class MachineError(RuntimeError):
    """This machine lacks a resource; the message names it and the way out."""


class StoppedWaitingError(RuntimeError):
    """The run was requested to stop, and the data that it waits for does not come."""


class DiskError(MachineError):
    """The disk is too small for what the run will write."""


@dataclass(frozen=True)
class Failure:
    """A sentence that names the cause and the way out, and the exit status of its kind."""

    text: str
    status: int


def failure_of(error: BaseException, *, place: str = "") -> Failure | None:
    """What `error`, or what caused it, means to the user; None for a bug, which deserves its traceback.

    Args:
        place: what was written, for an error of the disk that names no file.
    """
    if (lacking := machine_failure(error)) is not None:  # also where a reader said of its data what it lacked
        return lacking
    for cause in _causes(error):
        if (found := _failure(cause, place)) is not None:
            return found
    return None


def machine_failure(error: BaseException) -> Failure | None:
    """The failure if `error` was caused by too many open files, or by a lack of memory or processes."""
    lacks = (cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno in _OPEN_FILES | _MEMORY)
    cause = next(lacks, None)
    return None if cause is None else _of_system(cause, "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _failure(error: BaseException, place: str) -> Failure | None:
    text = str(error)
    first = text.strip().partition("\n")[0]
    if isinstance(error, DataError | ConfigError):
        return Failure(text, EXIT_INPUT)
    if isinstance(error, MachineError):
        return Failure(text, EXIT_DISK if isinstance(error, DiskError) else EXIT_MACHINE)
    if isinstance(error, SpecialFileError):
        return Failure(f"{error.filename} {error.strerror}", EXIT_INPUT)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error, place)
    # torch.OutOfMemoryError has a name of its own; this module imports no torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _has(text, _NO_MEMORY):
        return Failure(f"out of memory ({first or 'MemoryError'}){_limit()}; {_LESS_MEMORY}", EXIT_MACHINE)
    if isinstance(error, RuntimeError) and _has(text, _NO_THREAD):
        return Failure(f"{first}: {_MORE_PROCESSES}", EXIT_MACHINE)
    if isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in text:  # of safetensors
        return _too_many_files(first)
    if isinstance(error, RuntimeError) and _has(text, _LOST_RANK):
        return Failure(f"lost the connection to another rank, whose own message says why it ended ({first})", 1)
    if type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in text:
        return Failure(f"{first}; {_FREE_DISK}", EXIT_DISK)
    return None


_FREE_DISK = "once it can be written again, the same command resumes"
_LESS_MEMORY = (
    "use smaller micro-batches (engine.accumulation_steps, optim.global_batch_size), fewer data.num_workers, or a "
    "machine or a limit (ulimit -v, the job's --mem) with more"
)
_MORE_PROCESSES = "no further process or thread can be started; raise the limit (ulimit -u), or lower data.num_workers"


def _of_system(error: OSError, place: str) -> Failure | None:
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    what = f"{where}: {error.strerror}" if where else str(error.strerror)
    if error.errno in _DISK:
        what = f"{where or place}: {error.strerror}" if where or place else what
        return Failure(f"{what}; {_FREE_DISK}", EXIT_DISK)
    if error.errno in _OPEN_FILES:
        return _too_many_files(what)
    if error.errno in _MEMORY:
        way_out = _LESS_MEMORY if error.errno == errno.ENOMEM else _MORE_PROCESSES
        return Failure(f"{what}{_limit()}; {way_out}", EXIT_MACHINE)
    if isinstance(error, ConnectionError):
        return Failure(f"another process of the run ended: {what}; its own message says why", EXIT_FAILED)
    if not where:
        return Failure(what, EXIT_FILES) if error.errno in (errno.EIO, errno.ESTALE) else None
    return Failure(f"{what}; restore it or its permissions, then the same command resumes", EXIT_FILES)


def _too_many_files(what: str) -> Failure:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Failure(f"{what}: the limit is {limit}; raise it (ulimit -n), or lower data.num_workers", EXIT_MACHINE)


def _limit() -> str:
    """The limit of this process's address space, where there is one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else f"; the limit of this process is {limit / 2**30:.3g} GiB"


def _has(text: str, parts: tuple[str, ...]) -> bool:
    return any(part in text for part in parts)
