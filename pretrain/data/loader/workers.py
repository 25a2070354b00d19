"""Worker processes: items of a pure `__getitem__` in order, in processes that do not outlive their parent.

Workers are forked from a clean server (forkserver), never from a process with threads and a CUDA context. Signals meant
for the run (preemption) do not reach them: the run decides when it stops. They end when the run dies.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import parent_process, util
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory as pin_memory_of

from pretrain.core import heartbeat
from pretrain.core.machine.children import start_fork_server, without_main
from pretrain.core.machine.failures import DataError, MachineError, StoppedWaitingError
from pretrain.data.loader.handover import Items, Parcel, Parcels, shared_memory

_KEPT_FROM_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
_PRELOADED = (__name__, "pretrain.data.loader.microbatch")

_LOOK_SECONDS = 1.0  # between looks at dead workers and requests to stop; DataLoader's own is 5
_NO_LOCKS = {errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.ENOSYS}

Item = TypeVar("Item")


def run_in_workers(
    items: Items[Item],
    length: int,
    *,
    num_workers: int,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    give_up: Callable[[], bool] | None = None,
) -> Generator[Item, None, None]:
    """items[0], items[1], ... items[length - 1], computed by `num_workers` processes, or by this one if that is 0.

    give_up: asked before each item, and every second while one is waited for (not where this process computes it); if
    it is true, StoppedWaitingError.

    An error raised by an item is raised here, a ValueError as DataError. MachineError with the number of the due item
    when a worker died, and when no worker can be started; ValueError when the items cannot be sent to a worker.
    """
    if num_workers < 0 or prefetch_factor < 1:
        raise ValueError(f"num_workers must be >= 0 and prefetch_factor >= 1, got {num_workers} and {prefetch_factor}")
    if not num_workers:
        return _computed_here(items, length, pinned=pin_memory, give_up=give_up or _never)
    try:
        pickled = pickle.dumps(items)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"cannot be sent to worker processes: {error}; define it at the top of a module") from error
    loader = DataLoader(
        Parcels(items),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        sampler=range(length),
        collate_fn=_unchanged,
        num_workers=num_workers,
        multiprocessing_context="forkserver",
        prefetch_factor=prefetch_factor,
        worker_init_fn=_prepare_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise it draws a seed, which is not used, from the run's generator
    )
    return _iterate(loader, pickled, give_up or _never)


def _computed_here(
    items: Items[Item], length: int, *, pinned: bool, give_up: Callable[[], bool]
) -> Generator[Item, None, None]:
    for index in range(length):
        _check(give_up)
        try:
            item = items[index]
        except ValueError as error:
            raise _data_error(error) from error
        heartbeat.alive()
        yield cast(Item, pin_memory_of(item)) if pinned else item


def _free_quietly(error: BaseException) -> None:
    """Free the iterator that DataLoader could not complete: its `__del__` reports what it lacks as a traceback."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    error.__traceback__ = None
    sys.unraisablehook = before


def _iterate(loader: DataLoader, pickled: bytes, give_up: Callable[[], bool]) -> Generator[Any, None, None]:
    try:
        start_fork_server(preload=_PRELOADED, blocked=_KEPT_FROM_WORKERS)
        with without_main(pickled):
            iterator: Any = iter(loader)
    except OSError as error:
        _free_quietly(error)
        if error.errno in _NO_LOCKS:
            raise MachineError(
                f"no data worker can be started: {error.strerror}; {shared_memory()}, and workers need it for their "
                "locks: free it, mount it larger (docker: --shm-size or --ipc=host), or set data.num_workers=0"
            ) from error
        raise
    workers: list[BaseProcess] = list(iterator._workers)
    _look_while_waiting(iterator, give_up)
    opener = ThreadPoolExecutor(1)  # a worker that does not answer holds what opens its parcels
    # For an unfinished iterator: at exit multiprocessing would send SIGTERM, which workers block, and wait forever.
    kill = util.Finalize(None, _kill, args=(workers,), exitpriority=100)
    index, said = 0, False
    try:
        while True:
            try:
                parcel = _opened(next(iterator), opener, give_up)
            except StopIteration:
                return
            except (RuntimeError, OSError) as error:
                if not isinstance(error, MachineError) and "exited unexpectedly" not in str(error):
                    raise
                raise MachineError(f"a data worker died while item {index} was due: {_cause(workers)}") from error
            if isinstance(parcel.error, ValueError):
                raise _data_error(parcel.error) from parcel.error
            if parcel.error is not None:
                raise parcel.error
            if parcel.too_large and not said:
                said = _say_too_large(parcel.too_large)
            heartbeat.alive()
            yield parcel.item
            del parcel
            index += 1
    finally:
        del iterator
        kill()
        opener.shutdown(wait=False, cancel_futures=True)


def _data_error(error: ValueError) -> ValueError:
    return error if isinstance(error, DataError) else DataError(str(error))


def _cause(workers: Sequence[BaseProcess]) -> str:
    """The likely reason, by how the first of the ended workers ended, and the way out."""
    ends = [worker.exitcode for worker in workers if worker.exitcode is not None]
    less = "lower data.num_workers, data.prefetch or the micro-batch"
    if signal.SIGBUS in [-end for end in ends]:
        return f"bus error; {shared_memory()}: mount it larger (docker: --shm-size or --ipc=host), or {less}"
    if any(end > 0 for end in ends):
        return f"it ended with status {max(ends)}, see its own message; where that is about memory, {less}"
    named = f"by {signal.Signals(-min(ends)).name}" if ends and min(ends) < 0 else "from outside"
    return f"killed {named}, usually for lack of memory: {less}"


def _say_too_large(size: int) -> bool:
    print(
        f"data workers: {shared_memory()}, too little for batches of {size / 2**20:.3g} MiB; they go through private "
        "memory, which is slower: mount it larger (docker: --shm-size or --ipc=host), or lower data.prefetch",
        file=sys.stderr,
        flush=True,
    )
    return True


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _prepare_worker(_: int) -> None:
    # Where other code started the fork server, this process inherited no blocked signals from it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_FROM_WORKERS)
    torch.set_num_threads(1)
    heartbeat.show_stacks_on_signal()
    threading.Thread(target=_follow_the_run, daemon=True).start()


def _follow_the_run() -> None:
    """End this worker when the run is dead.

    DataLoader's own check and PR_SET_PDEATHSIG observe the parent process. Here that is the fork server, which
    lives as long as its workers.
    """
    run = parent_process()
    assert run is not None, "a worker has a parent"
    run.join()
    os._exit(1)


def _look_while_waiting(iterator: Any, give_up: Callable[[], bool]) -> None:
    """Have DataLoader ask `give_up`, and notice dead workers, every second of its wait."""
    look_once: Callable[[float], Any] = iterator._try_get_data

    def look(timeout: float = _LOOK_SECONDS) -> Any:
        _check(give_up)
        return look_once(min(timeout, _LOOK_SECONDS))

    iterator._try_get_data = look


def _opened(parcel: Parcel, opener: ThreadPoolExecutor, give_up: Callable[[], bool]) -> Parcel:
    if parcel.sent is None:
        return parcel
    opening = opener.submit(parcel.opened)
    while not wait([opening], _LOOK_SECONDS).done:
        _check(give_up)
    return opening.result()


def _check(give_up: Callable[[], bool]) -> None:
    if give_up():
        raise StoppedWaitingError("requested to stop while the next data did not come")


def _never() -> bool:
    return False


def _unchanged(item: Any) -> Any:
    return item
