"""One pass over a set: every example once, by the average where one is kept, the best and the worst kept."""

from __future__ import annotations

import math

import pytest
import torch

from finetune.config import FinetuneOptim
from finetune.evaluate import EvaluationError, _Kept, evaluate
from pretrain.core.distributed import World
from pretrain.core.machine.failures import StoppedWaitingError
from tests.finetune.planted import Planted
from tests.finetune.tiny import Brightness, opened

ALONE = World(0, 1, 0, torch.device("cpu"))
OPTIM = {"lr": 1e-3, "global_batch_size": 8, "total_steps": 4}


def task() -> Brightness:
    torch.manual_seed(1)
    return Brightness(None, opened(), Planted(2).classes)


def test_the_best_and_the_worst_are_those_of_all_whatever_the_batches():
    examples, model = Planted(11), task()
    whole = evaluate(model, examples, world=ALONE, batch_size=11, keep=11)
    ranked = [*whole.best, *reversed(whole.worst)]
    assert sorted(index for _, index, _ in ranked) == list(range(11)), "none is in both"
    assert [quality for quality, _, _ in ranked] == sorted((quality for quality, _, _ in ranked), reverse=True)
    few = evaluate(model, examples, world=ALONE, batch_size=3, keep=2)
    assert [index for _, index, _ in few.best] == [index for _, index, _ in ranked[:2]]
    assert [index for _, index, _ in few.worst] == [index for _, index, _ in ranked[:-3:-1]]
    assert few.scores.values == pytest.approx(whole.scores.values) and not few.failed
    assert evaluate(model, examples, world=ALONE, batch_size=4).best == []


def test_evaluation_restores_the_mode_and_changes_no_statistics():
    model = task().train()
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    evaluate(model, Planted(6), world=ALONE, batch_size=3)
    assert model.training and model.norm.running_mean.equal(before)  # type: ignore[union-attr]


def test_the_average_of_the_weights_predicts():
    model = task()
    model.prepare(FinetuneOptim(**OPTIM, ema_decay=0.5))
    with torch.no_grad():
        model.head.bias += torch.tensor([100.0, 0.0])  # the newest weights say dark of everything
    scores = evaluate(model, Planted(10), world=ALONE, batch_size=5).scores
    assert scores.values == evaluate(task(), Planted(10), world=ALONE, batch_size=5).scores.values
    model.after_step(1)
    assert evaluate(model, Planted(10), world=ALONE, batch_size=5).scores.values == {"accuracy": 0.5}


def test_undecodable_images_do_not_count():
    found = evaluate(task(), Planted(9, broken=(2, 5)), world=ALONE, batch_size=2, keep=9)
    assert [number for number, _, _ in found.failed] == [2, 5]
    assert sorted(index for _, index, _ in [*found.best, *found.worst]) == [0, 1, 3, 4, 6, 7, 8]


def test_no_image_to_evaluate_is_an_error_that_names_one():
    with pytest.raises(EvaluationError, match=r"none of 2 images .* folder/0.jpg: planted damage"):
        evaluate(task(), Planted(2, broken=(0, 1)), world=ALONE, batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_request_to_stop_ends_an_evaluation_and_restores_the_mode(num_workers: int):
    model, asked = task().train(), []
    with pytest.raises(StoppedWaitingError):
        evaluate(
            model, Planted(40), world=ALONE, batch_size=2, num_workers=num_workers,
            give_up=lambda: asked.append(0) or len(asked) > 3,
        )  # fmt: skip
    assert len(asked) == 4 and model.training


def test_evaluation_uses_the_given_precision():
    model, seen = task(), []
    predict = model.predict
    model.predict = lambda batch: seen.append(torch.is_autocast_enabled("cpu")) or predict(batch)  # type: ignore[method-assign]
    for precision in ("fp32", "bf16"):
        evaluate(model, Planted(2), world=ALONE, batch_size=2, precision=precision)
    assert seen == [False, True]


def test_a_prediction_without_a_quality_is_neither_good_nor_bad():
    kept = _Kept(3)
    for index, quality in enumerate((0.2, math.nan, 0.7)):
        kept.add(quality, index, None)  # type: ignore[arg-type]
    best, worst = kept.gather()
    assert [index for _, index, _ in best] == [2] and [index for _, index, _ in worst] == [0]
