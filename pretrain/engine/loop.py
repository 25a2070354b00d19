"""The loop: takes steps until the end, a request to stop, or three broken steps in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pretrain.engine.preempt import SAVE, STOP
from pretrain.engine.trainable import Batch, Engine, Requests, StepResult, Trainable

MAX_BROKEN_STEPS = 3


class NonFiniteError(RuntimeError):
    """Training cannot go on: steps in a row had no finite loss or gradient."""


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
) -> int:
    """Train until `total_steps` optimizer steps are done, or until any rank asks to stop; return the step reached.

    Args:
        batches: this rank's micro-batches on its device, from the first one of step `engine.step_count`.
        log: called every `log_every` steps, and at the first, the last, and each skipped one.
        save: called every `save_every` steps (0: never), at the end, and when asked to save or stop.
        probe: called every `probe_every` steps (0: never) and then at the end.
        requests: what this rank wants now (`preempt.Watch.poll`): all ranks come to know it with the step's losses.

    Raises:
        NonFiniteError: after `MAX_BROKEN_STEPS` skipped steps in a row; nothing is saved of them.
    """
    step, broken = engine.step_count, 0
    while step < total_steps:
        result = engine.train_step(batches, step, requests=requests())
        step += 1
        if result.skipped:
            trainable.discard_pending()
        else:
            trainable.after_step(step)
        if not result.overflow:  # the search for the fp16 loss scale neither breaks nor mends
            broken = broken + 1 if result.skipped else 0
        if every(step, log_every, total_steps) or result.skipped or step == 1:
            log(step, result)
        if broken == MAX_BROKEN_STEPS:
            raise NonFiniteError(_why(step, result))
        if every(step, save_every, total_steps) or step == total_steps or result.requests & (STOP | SAVE):
            save(step)
        if result.requests & STOP:
            break
        if every(step, probe_every, total_steps):
            probe(step)
    return step


def every(step: int, period: int, total_steps: int) -> bool:
    """True at multiples of `period` and at the end; never when `period` is 0."""
    return period > 0 and (step % period == 0 or step == total_steps)


def _why(step: int, result: StepResult) -> str:
    often = f"{MAX_BROKEN_STEPS} steps in a row"
    if not result.bad_ranks:
        return f"step {step}: the gradient norm was not finite {often}; lower the learning rate"
    return (
        f"step {step}: the loss was not finite {often}, last on ranks {list(result.bad_ranks)} "
        f"at sample positions {list(result.bad_positions)[:16]}; look at these samples, or lower the learning rate"
    )
