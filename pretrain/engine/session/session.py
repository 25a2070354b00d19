"""Frame of a run: process group, lock of the run folder, and expected errors as message and exit status."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from pretrain.core import distributed
from pretrain.core.configlib import ConfigError
from pretrain.core.distributed import RendezvousError, World
from pretrain.core.machine.failures import EXIT_FAILED, EXIT_INPUT, failure_of
from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.engine.config import EngineConfig
from pretrain.engine.nonfinite import NonFiniteError
from pretrain.engine.session.lease import Lease, RunInUseError
from pretrain.engine.watchdog.faults import add_fault
from pretrain.engine.watchdog.replicas import ReplicasDifferError
from pretrain.engine.watchdog.start import watched


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
        RunError: the run cannot continue, with the status of docs/exit_status.md: 1 for `failures`, non-finite losses
            and replicas that differ, 2 for wrong input, 3 without a complete checkpoint, others for the machine.
    """
    if engine.deterministic and engine.device != "cpu" and torch.cuda.is_available():
        _repeat_bitwise()
    try:
        world = distributed.setup(engine.device)
    except ValueError as error:
        raise RunError(str(error), EXIT_INPUT) from error
    except RendezvousError as error:
        raise RunError(str(error), EXIT_FAILED) from error
    try:
        with ExitStack() as stack:
            stack.callback(distributed.close)
            stack.enter_context(_faults_of_threads())
            _hold_lease(Path(run_dir), stack)
            stack.enter_context(watched(Path(run_dir), engine.watch, world))
            return body(world)
    except (ConfigError, RunInUseError) as error:
        raise RunError(str(error), EXIT_INPUT) from error
    except CheckpointError as error:
        raise RunError(str(error), error.status) from error
    except ReplicasDifferError as error:
        if world.rank == 0:
            add_fault(Path(run_dir), "replicas", str(error), hosts=error.hosts, ranks=error.ranks)
        raise RunError(str(error), EXIT_FAILED) from error
    except (NonFiniteError, *failures) as error:
        raise RunError(str(error), EXIT_FAILED) from error
    except Exception as error:
        failure = failure_of(error, place=f"a file of {run_dir}")
        if failure is None:
            raise
        where = f"rank {world.rank}: " if world.world_size > 1 else ""
        raise RunError(where + failure.text, failure.status) from error


@contextmanager
def _faults_of_threads() -> Generator[None, None, None]:
    """Inside, a fault of the machine in a thread (TensorBoard's, on a full disk) is a line, as it is in the run."""
    before = threading.excepthook

    def show(ended: threading.ExceptHookArgs) -> None:
        failure = None if ended.exc_value is None else failure_of(ended.exc_value)
        if failure is None:
            before(ended)
        else:
            print(failure.text, file=sys.stderr, flush=True)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before


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
