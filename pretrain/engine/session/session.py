"""Frame of a run: process group, lock of the run folder, and expected errors as message and exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from pretrain.core import distributed
from pretrain.core.configlib import ConfigError
from pretrain.core.distributed import RendezvousError, World
from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.engine.config import EngineConfig
from pretrain.engine.optim.nonfinite import NonFiniteError
from pretrain.engine.session.lease import Lease, RunInUseError
from pretrain.engine.watchdog.faults import add_fault
from pretrain.engine.watchdog.replicas import ReplicasDifferError
from pretrain.engine.watchdog.start import watched

EXIT_FAILED, EXIT_CONFIG, EXIT_NO_CHECKPOINT = 1, 2, 3
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class RunError(Exception):
    """A run ended by an expected error: the message contains the remedy, `status` is the exit status of the process."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def exit_status(run: Callable[[], int]) -> int:
    """The status that `run` returns; a RunError is printed, and its status returned."""
    try:
        return run()
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        return error.status


def session(
    run_dir: str,
    engine: EngineConfig,
    body: Callable[[World], int],
    *,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Run `body` on all processes of the run while rank 0 holds the lock of the folder; return its result.

    Raises:
        RunError: wrong input (status 2), no complete checkpoint (3), or the run cannot continue (1): one of
            `failures`, non-finite losses, a full disk, replicas that differ.
    """
    if engine.deterministic and engine.device != "cpu" and torch.cuda.is_available():
        _repeat_bitwise()
    try:
        world = distributed.setup(engine.device)
    except ValueError as error:
        raise RunError(str(error), EXIT_CONFIG) from error
    except RendezvousError as error:
        raise RunError(str(error), EXIT_FAILED) from error
    try:
        with ExitStack() as stack:
            stack.callback(distributed.close)
            _hold_lease(Path(run_dir), stack)
            stack.enter_context(watched(Path(run_dir), engine.watch, world))
            return body(world)
    except (ConfigError, RunInUseError) as error:
        raise RunError(str(error), EXIT_CONFIG) from error
    except CheckpointError as error:
        raise RunError(str(error), EXIT_NO_CHECKPOINT) from error
    except ReplicasDifferError as error:
        if world.rank == 0:
            add_fault(Path(run_dir), "replicas", str(error), hosts=error.hosts, ranks=error.ranks)
        raise RunError(str(error), EXIT_FAILED) from error
    except (NonFiniteError, *failures) as error:
        raise RunError(str(error), EXIT_FAILED) from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or f"a file of {run_dir}"
        message = f"{where}: {error.strerror}; once it can be written again, the same command resumes"
        raise RunError(message, EXIT_FAILED) from error


def _repeat_bitwise() -> None:
    """Make CUDA use deterministic kernels; operations without one warn. The CPU kernels in use are deterministic."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialized
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Fovea reads no uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False


def _hold_lease(folder: Path, stack: ExitStack) -> None:
    """Rank 0 locks the folder for all ranks; every rank raises RunInUseError if another run holds the lock."""
    problem = None
    if distributed.rank() == 0:
        try:
            stack.enter_context(Lease(folder))
        except RunInUseError as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise RunInUseError(problem)
