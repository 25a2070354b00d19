"""Output of an evaluation: results.json, the HTML report, and lines for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from finetune.config import FinetuneConfig
from finetune.data.examples import Examples
from finetune.evaluate import Evaluation
from finetune.explain.data import ImageSet
from finetune.explain.dense_subjects import subject_of_task
from finetune.explain.maps import NotExplainableError, lacking
from finetune.explain.measures import QUICK_STEPS
from finetune.explain.page import lines as explanation_lines
from finetune.explain.pictures import maps_picture
from finetune.explain.study import Plan, explain
from finetune.report.page import Page
from finetune.report.write import board_pictures, draw, write_report
from finetune.tasks.base import Task
from pretrain.core.configlib import dump
from pretrain.core.files import write_json
from pretrain.core.record import versions

RESULTS, REPORT = "results.json", "report"
_FAILED = 20


def lines(evaluation: Evaluation, *, step: int) -> list[str]:
    """The numbers and their protocol, for the log."""
    scores = evaluation.scores
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in scores.values.items())
    found = [f"step {step}: {numbers}", f"  measured: {scores.protocol}"]
    if evaluation.failed:
        name, reason = evaluation.failed[0][1:]
        found.append(f"  {len(evaluation.failed)} images could not be decoded and do not count: {name}: {reason}")
    return found


def record(evaluation: Evaluation, *, step: int) -> dict[str, Any]:
    """For fovea.json: the numbers, and how they were measured."""
    return {"step": step, "values": _plain(evaluation.scores.values), "protocol": evaluation.scores.protocol}


def write_results(folder: Path, evaluation: Evaluation, *, step: int, source: Mapping[str, Any]) -> None:
    """results.json of a run: all numbers of the evaluation, their protocol, and the source of the initial weights."""
    scores = evaluation.scores
    name, value = scores.primary
    found = {
        "step": step,
        "primary": {"name": name, "value": value},
        "values": scores.values,
        "protocol": scores.protocol,
        "per_class": scores.per_class,
        "confusion": scores.confusion,
        "curves": scores.curves,
        "undecodable": [{"name": name, "reason": reason} for _, name, reason in evaluation.failed],
        "source": source,
        "versions": versions(),
    }
    write_json(folder / RESULTS, _plain(found))


def _plain(value: Any) -> Any:
    """Values of JSON's types: arrays become lists, non-finite numbers (a class without images) null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(
    folder: Path,
    evaluation: Evaluation,
    task: Task,
    val: Examples,
    *,
    config: FinetuneConfig,
    title: str,
    rows: Sequence[Mapping[str, float]],
    findings: Mapping[str, Sequence[str]],
    match: Sequence[str],
) -> Mapping[str, Tensor]:
    """Write the report of a run below `folder`; returns its pictures for TensorBoard.

    Args:
        title: source of the weights. rows: of metrics.jsonl. findings: lines by set. match: report of the weights.
    """
    model = task.evaluated
    failed = [f"{name}: {reason}" for _, name, reason in evaluation.failed[:_FAILED]]
    warnings = [f"{len(evaluation.failed)} images could not be decoded; they do not count"] if failed else []
    if config.model.random:
        warnings.append("a control: the initial weights were random")
    explained, checks = _explanations(model, val, config.evaluate.explain)
    page = Page(
        title=f"{folder.name}: {config.task.name}",
        subtitle=f"{title}; {config.optim.global_batch_size} images a step",
        scores=evaluation.scores,
        classes=task.classes,
        worst=draw(model, val, evaluation.worst, config.evaluate.picture_channels),
        best=draw(model, val, evaluation.best, config.evaluate.picture_channels),
        rows=rows,
        explained=explained,
        checks=checks,
        findings={**findings, **({"undecodable images": failed} if failed else {})},
        facts={"configuration": dump(config), "how the weights fitted": "\n".join(match)},
        warnings=warnings,
    )
    write_report(folder / REPORT, page)
    return board_pictures(page)


def _explanations(model: Task, val: Examples, count: int) -> tuple[list[tuple[str, np.ndarray]], list[str]]:
    """Maps of `count` predictions by the name of the image, and what is to say of them; none for a task without a
    class."""
    if not count or model.config.name == "depth":
        return [], []
    was_training, device = model.training, model.mean.device
    subject = subject_of_task(model, model.config.name)
    method = "relevance" if lacking(subject, "relevance") is None else "occlusion"
    try:
        study = explain(subject, ImageSet(val, labelled=True), Plan([method], limit=count, quick=True), device=device)
    except NotExplainableError as error:
        return [], [f"{method}: left out: {error}"]
    finally:
        model.train(was_training)
    more = f"{count} images and {QUICK_STEPS} steps only; `fovea explain RUN IMAGES` checks maps on many"
    return [(one.name, maps_picture(one)) for one in study.explained], [*explanation_lines(study), more]
