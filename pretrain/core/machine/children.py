"""Python processes that Fovea starts: they find Fovea's packages, and never search the current folder for modules.

`python -m`, `python -c` and so `multiprocessing` search the current folder first; many folders hold a `pretrain.py`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, resource_tracker, util
from pathlib import Path
from signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask
from types import ModuleType

HOME = Path(__file__).resolve().parents[3]
# A path of a Unix socket has at most 107 bytes; multiprocessing appends /pymp-xxxxxxxx/listener-xxxxxxxx.
_LONGEST_TEMPORARY = 107 - 32
_SHORT_TEMPORARY = "/tmp"


def child_environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a Python process: PYTHONSAFEPATH, and `PYTHONPATH` with Fovea and without the current folder.

    Args:
        given: the environment that they are added to; default: this process's.
    """
    searched = (os.environ if given is None else given).get("PYTHONPATH", "").split(os.pathsep)
    here = {"", ".", *_current_folder()}
    paths = [path for path in searched if path not in here and path != str(HOME)]
    if not is_installed():  # those folders come after the standard library
        paths.insert(0, str(HOME))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def is_installed() -> bool:
    """Whether Fovea is imported from where packages are installed, not from a checkout."""
    return HOME.name in ("site-packages", "dist-packages")


def _current_folder() -> list[str]:
    with suppress(OSError):  # it was removed
        return [str(Path.cwd()), str(Path.cwd().resolve())]
    return []


def start_fork_server(*, preload: Sequence[str] = (), blocked: Collection[int] = ()) -> None:
    """Start multiprocessing's fork server, if there is none, from which workers are forked.

    Args:
        preload: modules that it imports.
        blocked: signals that it and its workers block. Here they are blocked only meanwhile: one that arrives is
            delivered afterwards, not lost.

    Raises:
        OSError: no folder for its socket.
    """
    get_context("forkserver").set_forkserver_preload(list(preload))  # by default, the user's script
    before = {name: os.environ.get(name) for name in child_environment()}
    os.environ.update(child_environment())
    _shorten_temporary_folder()
    try:
        resource_tracker.ensure_running()  # it unblocks signals when it starts
        mask = pthread_sigmask(SIG_BLOCK, blocked)
        try:
            forkserver.ensure_running()
        finally:
            pthread_sigmask(SIG_SETMASK, mask)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _shorten_temporary_folder() -> None:
    """Under a long TMPDIR, have multiprocessing put the sockets of this process and of its workers in /tmp."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST_TEMPORARY:
        return
    tempfile.tempdir = _SHORT_TEMPORARY
    try:
        util.get_temp_dir()  # creates it once, and removes it at exit
    except OSError as error:
        raise OSError(
            error.errno,
            f"TMPDIR={usual} is too long for a socket (at most {_LONGEST_TEMPORARY} bytes), and {_SHORT_TEMPORARY} "
            f"cannot be used ({error.strerror}); set TMPDIR to a shorter path",
        ) from error
    finally:
        tempfile.tempdir = usual


@contextmanager
def without_main(pickled: bytes) -> Generator[None, None, None]:
    """Inside, processes of multiprocessing do not run the user's script again, unless `pickled` names a part of it.

    A script without an `if __name__ == "__main__":` would start its run in every worker, and one from standard input
    has no file to run.
    """
    main = sys.modules["__main__"]
    if b"__main__" in pickled:
        yield
        return
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
