"""The training loop: runs until the last step, a request to stop, or too many non-finite steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pretrain.core import distributed, heartbeat
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.trainable import Batch, Trainable
from pretrain.engine.nonfinite import NonFiniteSteps
from pretrain.engine.protocol import Engine, Requests, StepResult
from pretrain.engine.session.preempt import SAVE, STOP
from pretrain.engine.watchdog.stragglers import Stragglers


def fit(
    engine: Engine,
    trainable: Trainable,
    batches: Iterator[Batch],
    *,
    total_steps: int,
    log: Callable[[int, StepResult], None],
    save: Callable[[int], None],
    requests: Requests,
    probe: Callable[[int], None],
    log_every: int,
    save_every: int,
    probe_every: int = 0,
    non_finite: Callable[[int, StepResult], None] | None = None,
    examine: Callable[[int, StepResult], None] | None = None,
    replicas_every: int = 0,
    say: Callable[[str], None] | None = None,
) -> int:
    """Train until `total_steps` optimizer steps are done, or until any rank requests a stop; return the step reached.

    Args:
        batches: this rank's micro-batches on its device, from the first one of step `engine.step_count`. A
            StoppedWaitingError of them abandons the step on all ranks, saves, and stops.
        log: called every `log_every` steps, and at the first, the last, and each skipped step.
        save: called every `save_every` steps (0: never), at the end, and on a request to save or stop.
        probe: called every `probe_every` steps and at the end (0: never).
        requests: the requests of this rank (`preempt.Watch.poll`); all ranks receive them with the step's losses.
        non_finite: called on every rank after each step that was skipped for a non-finite loss or gradient (but not for
            an fp16 overflow). It may raise to end training before anything is saved; default: `NonFiniteSteps`, which
            raises NonFiniteError after three in a row.
        examine: called on every rank after each step, before a save. It may raise to end training.
        replicas_every: steps between checks that all ranks have equal weights, also before each save (0: no checks); if
            they differ, ReplicasDifferError ends training.
        say: on rank 0, reports which ranks the others wait for.
    """
    step, non_finite = engine.step_count, non_finite or NonFiniteSteps()
    stragglers = Stragglers(distributed.all_gather_object(heartbeat.host_name()))
    try:
        while step < total_steps:
            try:
                result = engine.train_step(batches, step, requests=requests())
            except StoppedWaitingError:
                trainable.discard_pending()
                save(step)
                break
            step += 1
            heartbeat.mark("after", step)
            if result.skipped:
                trainable.discard_pending()
            else:
                trainable.after_step(step)
            if every(step, log_every, total_steps) or result.skipped or step == 1:
                log(step, result)
            if result.skipped and not result.overflow:
                non_finite(step, result)
            if examine is not None:
                examine(step, result)
            if say is not None and distributed.rank() == 0:
                for sentence in stragglers(result):
                    say(f"step {step}: {sentence}")
            saves = every(step, save_every, total_steps) or step == total_steps or bool(result.requests & (STOP | SAVE))
            if replicas_every and (saves or every(step, replicas_every, total_steps)):
                engine.check_replicas(step)
            if saves:
                heartbeat.mark("save", step)
                save(step)
            if result.requests & STOP and step < total_steps:
                break
            if every(step, probe_every, total_steps):
                heartbeat.mark("probe", step)
                probe(step)
    finally:
        heartbeat.mark("end", step)
    return step


def every(step: int, period: int, total_steps: int) -> bool:
    """True at multiples of `period` and at the end; never when `period` is 0."""
    return period > 0 and (step % period == 0 or step == total_steps)
