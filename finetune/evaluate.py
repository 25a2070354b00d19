"""One pass over labelled images: the metric, and the best and worst predictions.

Memory holds one batch, what the metric keeps per image (counts, rows), and the few predictions to be drawn.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.data.batches import EvalBatches, Failure, move
from finetune.data.examples import Examples
from finetune.metrics.metric import Scores
from finetune.predictions import Prediction
from finetune.tasks.base import Task
from pretrain.core import distributed
from pretrain.core.configlib import Precision
from pretrain.core.distributed import World
from pretrain.core.precision import autocast
from pretrain.data.loader.workers import run_in_workers

Chosen = tuple[float, int, Prediction]  # quality, number of the example, prediction


class EvaluationError(ValueError):
    """There is no image, or no label, to evaluate on."""


@dataclass(frozen=True)
class Evaluation:
    """The same on every rank.

    best, worst   (quality, number of the example, prediction), the best and the worst first; no example is in both
    failed        (number, name, reason) of examples that could not be decoded; they do not count
    """

    scores: Scores
    best: list[Chosen]
    worst: list[Chosen]
    failed: list[Failure]


def evaluate(
    task: Task,
    examples: Examples,
    *,
    world: World,
    batch_size: int,
    num_workers: int = 0,
    keep: int = 0,
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
    give_up: Callable[[], bool] | None = None,
) -> Evaluation:
    """Predict every example once, over all ranks, and measure; the results do not depend on the number of ranks.

    The average of the weights is evaluated if one is kept. The task is returned to its previous mode.

    Args:
        batch_size: images per batch on a rank. keep: number of best and of worst predictions to keep.
        precision: of the network's computation, which the protocol names.
        progress: called after each batch with the number of examples done by this rank, and of all.
        give_up: asked before each batch and while one is waited for.

    Raises:
        EvaluationError: no example can be decoded, or the metric has nothing to measure on.
        StoppedWaitingError: on every rank, `give_up` was true on one.
    """
    model = task.evaluated
    batches = EvalBatches(
        examples,
        model.eval_transform(),
        model.collate,
        batch_size=batch_size,
        rank=world.rank,
        world_size=world.world_size,
    )
    metric, kept, failed, done = model.metric(examples), _Kept(keep), [], 0
    was_training = model.training
    model.eval()
    try:
        found = run_in_workers(batches, len(batches), num_workers=num_workers, give_up=give_up)
        for batch, held, bad in distributed.until_stopped(found):
            failed += bad
            if batch is not None:
                numbers = batch["index"].tolist()
                with torch.no_grad(), autocast(world.device, precision):
                    predictions = model.predict(move(batch, world.device))
                for index, example, prediction in zip(numbers, held, predictions, strict=True):
                    kept.add(metric.update(index, example, prediction), index, prediction)
            done += len(held) + len(bad)
            if progress is not None:
                progress(done, len(examples))
    finally:
        model.train(was_training)
    failed = sorted(row for part in distributed.all_gather_object(failed) for row in part)
    if len(failed) == len(examples):
        why = f"; the first: {failed[0][1]}: {failed[0][2]}" if failed else ""
        raise EvaluationError(f"no image to evaluate on: none of {len(examples)} images can be decoded{why}")
    metric.gather()
    best, worst = kept.gather()
    scores = _compute(metric)
    return Evaluation(replace(scores, protocol=f"{scores.protocol}; in {precision}"), best, worst, failed)


def _compute(metric: Any) -> Scores:
    """Computed on rank 0 for all ranks; an error there is raised on every rank."""
    scores, problem = None, None
    if distributed.rank() == 0:
        try:
            scores = metric.compute()
        except ValueError as error:
            problem = str(error)
    scores, problem = distributed.broadcast_object((scores, problem))
    if problem is not None:
        raise EvaluationError(problem)
    assert scores is not None
    return scores


class _Kept:
    """The `count` best and the `count` worst predictions; of equal ones the lower number. Quality nan: neither."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._best: list[tuple[float, int, Prediction]] = []  # a heap; its first element is the worst of the best
        self._worst: list[tuple[float, int, Prediction]] = []

    def add(self, quality: float, index: int, prediction: Prediction) -> None:
        if math.isnan(quality) or not self._count:
            return
        for heap, sign in ((self._best, 1.0), (self._worst, -1.0)):
            row = (sign * quality, -index, prediction)
            (heapq.heappush if len(heap) < self._count else heapq.heappushpop)(heap, row)

    def gather(self) -> tuple[list[Chosen], list[Chosen]]:
        """Those of all ranks. With fewer examples than twice the count, the better half is `best`."""
        rows: dict[int, Chosen] = {}
        for best, worst in distributed.all_gather_object((self._best, self._worst)):
            rows |= {-index: (quality, -index, prediction) for quality, index, prediction in best}
            rows |= {-index: (-quality, -index, prediction) for quality, index, prediction in worst}
        ordered = sorted(rows.values(), key=lambda row: (-row[0], row[1]))
        half = min(self._count, -(-len(ordered) // 2))
        best = ordered[:half]
        worst = sorted(ordered[half:], key=lambda row: (row[0], row[1]))[: self._count]
        return best, worst
