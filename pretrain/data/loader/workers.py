"""Worker processes: items of a pure `__getitem__` in order, in processes that do not outlive their parent.

Workers are forked from a clean server (forkserver), never from a process with threads and a CUDA context. Signals meant
for the run (preemption) do not reach them: the run decides when it stops. They end when the run dies.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Generator
from multiprocessing import parent_process, util
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from pretrain.core import heartbeat
from pretrain.core.children import start_fork_server, without_main

_KEPT_FROM_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
_PRELOADED = (__name__, "pretrain.data.loader.microbatch")

Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    def __getitem__(self, index: int) -> Item: ...


def run_in_workers(
    items: Items[Item], length: int, *, num_workers: int, prefetch_factor: int = 2, pin_memory: bool = False
) -> Generator[Item, None, None]:
    """items[0], items[1], ... items[length - 1], computed by `num_workers` processes, or by this one if that is 0.

    An error raised by an item is raised here. RuntimeError with the number of the due item when a worker died;
    ValueError when the items cannot be sent to a worker.
    """
    if num_workers < 0 or prefetch_factor < 1:
        raise ValueError(f"num_workers must be >= 0 and prefetch_factor >= 1, got {num_workers} and {prefetch_factor}")
    pickled = b""
    if num_workers:
        try:
            pickled = pickle.dumps(items)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"cannot be sent to worker processes: {error}; define it at the top of a module"
            ) from error
        start_fork_server(preload=_PRELOADED, blocked=_KEPT_FROM_WORKERS)
    loader = DataLoader(
        items,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        sampler=range(length),
        collate_fn=_unchanged,
        num_workers=num_workers,
        multiprocessing_context="forkserver" if num_workers else None,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=_prepare_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise it draws a seed, which is not used, from the run's generator
    )
    return _iterate(loader, pickled)


def _iterate(loader: DataLoader, pickled: bytes) -> Generator[Any, None, None]:
    with without_main(pickled):
        iterator = iter(loader)
    workers = list(getattr(iterator, "_workers", ()))  # none when the items are computed in this process
    # For an unfinished iterator: at exit multiprocessing would send SIGTERM, which workers block, and wait forever.
    kill = util.Finalize(None, _kill, args=(workers,), exitpriority=100)
    index = 0
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error):
                    raise
                raise RuntimeError(
                    f"a data worker died while item {index} was due ({error}); usually for lack of memory: "
                    "lower num_workers, prefetch_factor or the micro-batch"
                ) from error
            heartbeat.alive()
            yield item
            index += 1
    finally:
        del iterator
        kill()


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


def _unchanged(item: Any) -> Any:
    return item
