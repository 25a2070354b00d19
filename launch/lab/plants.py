"""Faults that the laboratory plants in a process of its own before the command runs; the product's files are unchanged.

A plant is [NAME, argument, ...]. `die`, `lose_power`, `fail`, `slow`, `clock` and `shared_memory` are faults. `without`
removes one protection: the trials that depend on it must then fail, or they prove nothing (`fovea lab --self-test`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
_NEW_MOUNTS = 0x20000  # CLONE_NEWNS


def plant(plants: Sequence[Sequence[Any]]) -> None:
    """Plant every fault, protections that are removed first."""
    for name, *arguments in sorted(plants, key=lambda one: one[0] != "without"):
        _PLANTS[name](*arguments)


def _hook(name: str, before: Callable[[int, tuple[Any, ...]], None]) -> None:
    """Call `before(number of the call, its arguments)` before each call of os.NAME in this process."""
    real, parent, count = getattr(os, name), os.getpid(), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        if os.getpid() == parent:  # not in children that are forked
            count += 1
            before(count, arguments)
        return real(*arguments, **named)

    setattr(os, name, call)


def _die(call: str, number: int) -> None:
    """SIGKILL before the number-th call of os.CALL; of a write, after half of its bytes."""
    write = os.write

    def before(count: int, arguments: tuple[Any, ...]) -> None:
        if count == number:
            if call == "write":
                write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    _hook(call, before)


def _fail(call: str, number: int, code: int, path: str) -> None:
    """From the number-th call of os.CALL on, calls that concern a file below `path` fail with an error number."""

    def before(count: int, arguments: tuple[Any, ...]) -> None:
        if count >= number and _place(arguments[0]).startswith(path):
            raise OSError(code, os.strerror(code), None if isinstance(arguments[0], int) else str(arguments[0]))

    _hook(call, before)


def _slow(call: str, seconds: float, path: str) -> None:
    """A pause before every call of os.CALL that concerns a file below `path`."""

    def before(count: int, arguments: tuple[Any, ...]) -> None:
        if _place(arguments[0]).startswith(path):
            time.sleep(seconds)

    _hook(call, before)


def _lose_power(call: str, number: int, folder: str) -> None:
    """SIGKILL before the number-th call of os.CALL, then what had not reached the disk below `folder` is lost.

    The worst that POSIX allows: a file that this process wrote and did not fsync afterwards is empty; a rename whose
    folder was not fsynced afterwards did not happen.
    """
    started, synced, renames = time.time(), set[int](), list[tuple[str, str]]()
    rename, sync_is_real = os.rename, os.fsync is not _nothing

    def on_sync(count: int, arguments: tuple[Any, ...]) -> None:
        if sync_is_real:
            place = _place(arguments[0])
            synced.add(os.fstat(arguments[0]).st_ino)
            renames[:] = [pair for pair in renames if str(Path(pair[1]).parent) != place]

    def on_rename(count: int, arguments: tuple[Any, ...]) -> None:
        if str(arguments[1]).startswith(folder):
            renames.append((str(arguments[0]), str(arguments[1])))

    def lose(count: int, arguments: tuple[Any, ...]) -> None:
        if count != number:
            return
        for path in Path(folder).rglob("*"):
            state = path.stat()
            if path.is_file() and state.st_mtime >= started and state.st_ino not in synced:
                os.truncate(path, 0)
        for old, new in reversed(renames):
            if Path(new).exists() and not Path(old).exists():
                rename(new, old)
        os.kill(os.getpid(), signal.SIGKILL)

    _hook("fsync", on_sync)
    _hook("rename", on_rename)
    _hook(call, lose)


def _clock(seconds: float, after: int) -> None:
    """From its `after`-th reading on, the clock of the day is `seconds` off."""
    real, count = time.time, 0

    def now() -> float:
        nonlocal count
        count += 1
        return real() + (seconds if count > after else 0)

    time.time = now


def _shared_memory(kilobytes: int) -> None:
    """A /dev/shm of this size, seen by this process and its children only."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", "/dev/shm"]):
        subprocess.run(["mount", *words], check=True)


def _place(file: Any) -> str:
    return str(Path(f"/proc/self/fd/{file}").readlink()) if isinstance(file, int) else os.fspath(file)


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


def _without(protection: str) -> None:
    PROTECTIONS[protection]()


def _without_fsync() -> None:
    os.fsync = _nothing


def _without_rename() -> None:
    """Checkpoints are written under their final name."""
    from pretrain.engine.checkpoint import commit

    def new_folder(folder: Path, token: str | None = None) -> Path:
        folder.mkdir(parents=True)
        return folder

    commit.new_folder, commit.publish_folder = new_folder, _nothing  # type: ignore[assignment]


def _without_barrier() -> None:
    """Rank 0 commits a checkpoint with its own files, and does not wait for those of the other ranks."""
    from pretrain.core import distributed

    gather = distributed.all_gather_object

    def alone(value: Any) -> list[Any]:
        is_receipt = isinstance(value, tuple) and isinstance(value[0], list)
        return [value] if is_receipt else gather(value)

    distributed.all_gather_object = alone


def _without_crc() -> None:
    from pretrain.data.shards import reader

    class Any32(int):
        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    class Checksum:
        value = staticmethod(lambda data: Any32())

    reader.google_crc32c = Checksum  # type: ignore[assignment]


def _without_finite() -> None:
    from pretrain.models.importers import weights

    weights.not_finite.__code__ = _nothing_found.__code__


def _nothing_found(state: Any) -> None:
    return None


def _without_manifest() -> None:
    from pretrain.core import manifest

    def no_difference(folder: Any, record: Any) -> None:
        return None

    manifest.difference.__code__ = no_difference.__code__


PROTECTIONS: dict[str, Callable[[], None]] = {
    "fsync": _without_fsync,
    "rename": _without_rename,
    "barrier": _without_barrier,
    "crc": _without_crc,
    "finite": _without_finite,
    "manifest": _without_manifest,
}
_PLANTS: dict[str, Callable[..., None]] = {
    "die": _die,
    "fail": _fail,
    "slow": _slow,
    "lose_power": _lose_power,
    "clock": _clock,
    "shared_memory": _shared_memory,
    "without": _without,
}
