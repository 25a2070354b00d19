"""Around a run: the processes meet, the folder is held, and every foreseen error becomes a sentence and a status."""

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


def session(
    run_dir: str,
    engine: EngineConfig,
    body: Callable[[World], int],
    *,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """What `body` returns, computed by all processes of the run together, while rank 0 holds the folder.

    An error that is foreseen is printed instead of raised: wrong input is status 2, no whole checkpoint 3, and a run
    that cannot go on 1 (`failures`, beside losses that are not finite and a disk that takes no more).
    """
    if engine.deterministic and engine.device != "cpu" and torch.cuda.is_available():
        _repeat_bitwise()
    try:
        world = distributed.setup(engine.device)
    except ValueError as error:
        return _fail(error, EXIT_CONFIG)
    except RendezvousError as error:
        return _fail(error, EXIT_FAILED)
    try:
        with ExitStack() as stack:
            stack.callback(distributed.close)
            _hold_lease(Path(run_dir), stack)
            stack.enter_context(watched(Path(run_dir), engine.watch, world))
            return body(world)
    except (ConfigError, RunInUseError) as error:
        return _fail(error, EXIT_CONFIG)
    except CheckpointError as error:
        return _fail(error, EXIT_NO_CHECKPOINT)
    except ReplicasDifferError as error:
        if world.rank == 0:
            add_fault(Path(run_dir), "replicas", str(error), hosts=error.hosts, ranks=error.ranks)
        return _fail(error, EXIT_FAILED)
    except (NonFiniteError, *failures) as error:
        return _fail(error, EXIT_FAILED)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or f"a file of {run_dir}"
        message = f"{where}: {error.strerror}; once it can be written again, the same command goes on"
        return _fail(message, EXIT_FAILED)


def _repeat_bitwise() -> None:
    """Have CUDA use kernels whose sums have a fixed order; what has none warns. CPU kernels in use repeat anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False


def _hold_lease(folder: Path, stack: ExitStack) -> None:
    """Rank 0 locks the folder for all; every rank raises when another run has it."""
    problem = None
    if distributed.rank() == 0:
        try:
            stack.enter_context(Lease(folder))
        except RunInUseError as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise RunInUseError(problem)


def _fail(error: Exception | str, status: int) -> int:
    print(error, file=sys.stderr, flush=True)
    return status
