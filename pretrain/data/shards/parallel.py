"""Run one function over many jobs in worker processes that never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pretrain.core.machine.children import start_fork_server, without_main

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, function(job)) as they finish; in order and in this process when `workers` is 1.

    `function` and the jobs must pickle. RuntimeError when a worker is killed.
    """
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, function(job)
        return
    # forkserver: forking a process that has threads (a progress bar) can deadlock
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker)
    try:
        with without_main(pickle.dumps(function)):
            pending = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(pending):
            yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process was killed (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """End without a traceback on an interrupt, and with the parent: a killed parent would leave its workers waiting."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
