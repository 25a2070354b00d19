from __future__ import annotations

from itertools import islice

import pytest
import torch

from pretrain.core.distributed import World
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.engine.loop import every, fit
from pretrain.engine.nonfinite import NonFiniteError
from pretrain.engine.session.preempt import SAVE, STOP
from tests.engine.scenarios import Normed, build, run, whole_state
from tests.engine.toys import Toy, batches

ALONE = World(0, 1, 0, torch.device("cpu"))


def loop(*, total_steps=10, requests=lambda: 0, poison=None, **periods):
    """Steps at which each callback was called, and the engine."""
    engine = build(ALONE, Toy(), "ddp")
    called: dict[str, list[int]] = {"log": [], "save": [], "probe": [], "after": []}
    after_step = engine.trainable.after_step
    engine.trainable.after_step = lambda step: (called["after"].append(step), after_step(step))[1]
    feed = batches("toy", start=0, accumulation=1, world=1, rank=0, poison=poison)
    try:
        reached = fit(
            engine,
            engine.trainable,
            feed,
            total_steps=total_steps,
            log=lambda step, result: called["log"].append(step),
            save=called["save"].append,
            probe=called["probe"].append,
            requests=requests,
            **{"log_every": 4, "save_every": 3, "probe_every": 5, **periods},
        )
    except NonFiniteError:
        reached = -1
    return reached, called, engine


def test_callbacks_come_at_their_steps_and_at_the_end():
    reached, called, _ = loop()
    assert reached == 10
    assert called["log"] == [1, 4, 8, 10]
    assert called["save"] == [3, 6, 9, 10]
    assert called["probe"] == [5, 10]
    assert called["after"] == list(range(1, 11))


def test_a_period_of_0_is_never_but_the_end_is_saved():
    _, called, _ = loop(save_every=0, probe_every=0)
    assert called["save"] == [10]
    assert called["probe"] == []
    assert not every(10, 0, 10)


def test_a_request_to_stop_saves_at_that_step_and_a_request_to_save_goes_on():
    asked = iter([0, SAVE, 0, 0, STOP])
    reached, called, _ = loop(save_every=100, requests=lambda: next(asked))
    assert reached == 5
    assert called["save"] == [2, 5]


def test_a_request_to_stop_in_the_last_step_ends_a_whole_run():
    asked = iter([0, 0, 0, 0, STOP])
    reached, called, _ = loop(total_steps=5, requests=lambda: next(asked))
    assert reached == 5
    assert called["probe"] == [5], "nobody would measure it later"


def test_a_skipped_step_is_logged_and_leaves_teacher_and_centre():
    _, called, engine = loop(poison={17})
    assert called["after"] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert 3 in called["log"]
    assert engine.trainable.pending_count == 0


def test_a_skipped_step_leaves_the_statistics_of_batch_norms():
    engines = [build(ALONE, Normed(), "ddp") for _ in range(2)]
    found = []
    for engine, poison in zip(engines, (None, {17}), strict=True):
        run(engine, kind="toy", total_steps=2)
        if poison:
            assert run(engine, kind="toy", total_steps=3, poison=poison)[0].skipped
        found.append(whole_state(engine))
    assert found[0].keys() == found[1].keys() and "norm.running_mean" in found[0]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_data_that_does_not_come_abandons_the_step_and_saves_the_one_before():
    feed = batches("toy", start=0, accumulation=2, world=1, rank=0)
    engine, saved = build(ALONE, Normed(), "ddp", accumulation=2), []

    def until(count: int):
        yield from islice(feed, count)
        raise StoppedWaitingError

    run(engine, kind="toy", feed=until(5), save=saved.append)
    assert saved == [2] and engine.step_count == 2
    assert engine.trainable.norm.num_batches_tracked == 4 and engine.trainable.pending_count == 0


def test_two_broken_steps_do_not_stop_a_run_and_three_do_without_saving_them():
    reached, _, _ = loop(poison={16, 24})
    assert reached == 10
    reached, called, engine = loop(poison={32, 40, 48})
    assert reached == -1
    assert engine.step_count == 7
    assert called["save"] == [3, 6], "weights at 6 are those of step 4, whole"


def test_a_finished_run_takes_no_step():
    reached, called, _ = loop(total_steps=0)
    assert reached == 0
    assert not any(called.values())


@pytest.mark.parametrize(("step", "expected"), [(1, False), (3, True), (6, True), (7, True)])
def test_every(step, expected):
    assert every(step, 3, 7) is expected
