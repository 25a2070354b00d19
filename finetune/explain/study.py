"""One study of a network on images: its maps, and every number about them, beside those of maps that know nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.examples import BadExample, short_name
from finetune.explain import measures, sanity, shortcuts, slices
from finetune.explain.baselines import BASELINES, baseline
from finetune.explain.data import ImageSet
from finetune.explain.maps import METHODS, NotExplainableError, attention_of, lacking, read_rows
from finetune.explain.measures import Mean, mean_of
from finetune.explain.sanity import Sanity
from finetune.explain.shortcuts import Places
from finetune.explain.slices import Slice
from finetune.explain.subjects import Aim, ClassifierSubject, Subject, TaskSubject

SANITY_IMAGES = 8
Say = Callable[[str], None]


@dataclass(frozen=True)
class Explained:
    """One explained image.

    number: in the set. name: of the image. view: the canvas, uint8 [h, w, 3]. aim: what was explained.
    region: bool [h, w], see `ImageSet.region`. maps: float32 [rows, columns] by method and baseline.
    attention: [heads, rows, columns] by layer, for some images.
    """

    number: int
    name: str
    view: np.ndarray
    aim: Aim
    region: np.ndarray | None
    maps: dict[str, np.ndarray]
    attention: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The numbers of a method or of a baseline.

    gap: insertion minus deletion, high is good. lead: of its gap over that of the best baseline, paired over images;
    None for a baseline. better: whether its gap is above that of every baseline, by intervals that exclude 0.
    """

    name: str
    words: str
    deletion: Mean
    insertion: Mean
    gap: Mean
    pointing: Mean
    mass: Mean
    lead: Mean | None = None
    better: bool = False
    sanity: Sanity | None = None


@dataclass
class Study:
    """Everything that was measured.

    skipped: methods that cannot explain this network, and why. silent: images without an answer to explain.
    failed: (name, reason) of images that cannot be decoded. area: share of the canvas in the regions.
    slices: the worst first. measure: what they are slices of, in words. shortcuts: of a classifier.
    """

    subject: Subject
    images: ImageSet
    seed: int
    rows: list[Row] = field(default_factory=list)
    explained: list[Explained] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    silent: int = 0
    area: Mean | None = None
    slices: list[Slice] = field(default_factory=list)
    measure: str = ""
    shortcuts: Places | None = None


@dataclass(frozen=True)
class Plan:
    """What to compute.

    methods: of METHODS. layer: the attention layer of method "attention"; None: the last. layers: whose attention is
    drawn. limit: images to explain, spread over the set. attention: images whose attention is drawn, the first.
    quick: maps and their faithfulness in fewer steps: no randomized weights, slices and shortcuts.
    """

    methods: Sequence[str]
    layer: str | None = None
    layers: Sequence[str] = ()
    limit: int = 16
    attention: int = 2
    seed: int = 0
    batch_size: int = 8
    quick: bool = False


def explain(subject: Subject, images: ImageSet, plan: Plan, *, device: Any = "cpu", say: Say = lambda _: None) -> Study:
    """The study of `images` by `plan`. Deterministic: the same seed gives the same numbers.

    Raises:
        NotExplainableError: a method fails on this network, and no other is left.
    """
    study = Study(subject, images, plan.seed)
    numbers: dict[str, dict[str, list[float]]] = {}
    methods = {name: name for name in plan.methods}
    first: list[tuple[Tensor, Sequence[Aim], dict[str, Tensor]]] = []
    steps = measures.QUICK_STEPS if plan.quick else measures.STEPS
    for batch, aims, chosen in _batches(study, plan, device):
        maps: dict[str, Tensor] = {}
        for name in list(methods):
            try:
                maps[name] = METHODS[name].compute(subject, batch, aims, plan.layer).cpu()
            except NotExplainableError as error:
                study.skipped[name] = str(error)
                del methods[name]
        if not methods:
            raise NotExplainableError("; ".join(f"{name}: {why}" for name, why in study.skipped.items()))
        places = [number for number, _, _ in chosen]
        for name in BASELINES:
            maps[name] = baseline(name, batch, places, subject.cells, seed=plan.seed)
        examples = [images[number] for number in places]
        regions = [images.region(subject, one, aim) for one, aim in zip(examples, aims, strict=True)]
        faithful = measures.faithfulness(subject, batch, aims, maps, steps=steps)
        for name, values in maps.items():
            found = numbers.setdefault(name, {key: [] for key in ("deletion", "insertion", "pointing", "mass", "area")})
            deleted, inserted = faithful[name]
            found["deletion"] += deleted.tolist()
            found["insertion"] += inserted.tolist()
            found["pointing"] += measures.pointing(values, regions)
            found["mass"] += measures.mass(values, regions)
            found["area"] += measures.shares(regions)
        attention = _attention(study, plan, batch, aims)
        for i, (number, name, view) in enumerate(chosen):
            own = {key: values[i].numpy() for key, values in maps.items()}
            study.explained.append(Explained(number, name, view, aims[i], regions[i], own, attention.get(i, {})))
        if sum(len(given) for given, _, _ in first) < SANITY_IMAGES:
            first.append((batch, aims, maps))
        say(f"{len(study.explained)} images explained")
    if not first:
        why = f": {study.failed[0][0]}: {study.failed[0][1]}" if study.failed else ": the network gives no answer"
        raise NotExplainableError(f"none of the {len(images)} images can be explained{why}")
    checks: dict[str, Sanity] = {}
    if not plan.quick:
        say("weights are randomized")
        some = torch.cat([batch for batch, _, _ in first])[:SANITY_IMAGES]
        aims = [aim for _, of_batch, _ in first for aim in of_batch][:SANITY_IMAGES]
        compute = {name: partial(_computed, METHODS[name].compute, some, plan) for name in methods}
        before = {name: torch.cat([maps[name] for _, _, maps in first])[:SANITY_IMAGES] for name in methods}
        checks = sanity.check(subject, some, aims, compute, before, seed=plan.seed)
    study.rows = _rows(numbers, checks, seed=plan.seed)
    study.area = mean_of(numbers["random"]["area"], seed=plan.seed)
    if plan.quick:
        return study
    batched: dict[str, Any] = {"device": device, "batch_size": plan.batch_size, "say": say}
    if isinstance(subject, TaskSubject) and images.labelled:
        study.slices, study.measure = slices.measured(subject, images, seed=plan.seed, **batched)
    if isinstance(subject, ClassifierSubject):
        study.shortcuts = shortcuts.seek(subject, images, **batched)
    return study


def possible(subject: Subject, asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The methods that can explain the subject, of those asked for (none: all), and why the others cannot.

    Raises:
        NotExplainableError: one that was asked for cannot.
    """
    reasons = {name: why for name in asked or METHODS if (why := lacking(subject, name)) is not None}
    fitting = [name for name in METHODS if lacking(subject, name) is None]
    if asked and reasons:
        name, why = next(iter(reasons.items()))
        raise NotExplainableError(f"--method {name}: {why}; methods that work here: {', '.join(fitting)}")
    return [name for name in asked or METHODS if name not in reasons], reasons


def _computed(compute: Any, images: Tensor, plan: Plan, subject: Subject, aims: Sequence[Aim]) -> Tensor:
    """The maps of `images`, batch by batch."""
    parts = [slice(start, start + plan.batch_size) for start in range(0, len(images), plan.batch_size)]
    return torch.cat([compute(subject, images[part], aims[part], plan.layer).cpu() for part in parts])


def _batches(study: Study, plan: Plan, device: Any) -> Any:
    """(images [b, C, h, w], aims, (number, name, view) of each) of the images that have an answer."""
    count = min(plan.limit, len(study.images))
    places = np.linspace(0, len(study.images) - 1, count).round().astype(int).tolist()
    for start in range(0, count, plan.batch_size):
        prepared, chosen = [], []
        for number in places[start : start + plan.batch_size]:
            try:
                example = study.images[number]
            except BadExample as error:
                study.failed.append((error.name, error.reason))
                continue
            prepared.append(study.subject.prepare(example))
            view = study.subject.pixels(example).permute(1, 2, 0).clamp(0, 255).numpy()
            chosen.append((number, short_name(example.name), replace(example, image=view).as_picture().image))
        if not prepared:
            continue
        images = torch.stack(prepared).to(device)
        aims = study.subject.aims(images)
        kept = [i for i, aim in enumerate(aims) if aim is not None]
        study.silent += len(aims) - len(kept)
        if kept:
            yield images[kept], [aims[i] for i in kept], [chosen[i] for i in kept]


def _attention(study: Study, plan: Plan, images: Tensor, aims: Sequence[Aim]) -> dict[int, dict[str, np.ndarray]]:
    """[heads, rows, columns] by layer, of the images of a batch whose attention is drawn."""
    wanted = min(plan.attention - len(study.explained), len(images))
    tokens = study.subject.tokens
    if wanted <= 0 or not plan.layers or tokens is None:
        return {}
    found: dict[int, dict[str, np.ndarray]] = {i: {} for i in range(wanted)}
    for name, maps in attention_of(study.subject, images[:wanted], aims[:wanted]).items():
        if name not in plan.layers:
            continue
        try:
            rows = read_rows(study.subject, maps, aims[:wanted]).unflatten(2, tokens)
        except NotExplainableError as error:
            study.skipped[f"attention of {name}"] = str(error)
            continue
        for i in range(wanted):
            found[i][name] = rows[i].float().cpu().numpy()
    return found


def _rows(numbers: dict[str, dict[str, list[float]]], checks: dict[str, Sanity], *, seed: int) -> list[Row]:
    gaps = {name: np.subtract(found["insertion"], found["deletion"]) for name, found in numbers.items()}
    best = max(BASELINES, key=lambda name: float(gaps[name].mean()))
    rows = []
    for name, found in numbers.items():
        if name not in METHODS or len(gaps[name]) != len(gaps[best]):
            continue
        leads = [mean_of((gaps[name] - gaps[other]).tolist(), seed=seed) for other in BASELINES]
        lead = mean_of((gaps[name] - gaps[best]).tolist(), seed=seed)
        better = all(one.low > 0 for one in leads) and lead.count > 1
        rows.append(_row(name, METHODS[name].words, found, gaps[name], seed, lead, better, checks.get(name)))
    rows.sort(key=lambda row: -row.gap.value)
    return rows + [_row(name, words, numbers[name], gaps[name], seed) for name, words in BASELINES.items()]


def _row(name: str, words: str, found: dict[str, list[float]], gaps: np.ndarray, seed: int, *more: Any) -> Row:
    deleted, inserted, pointed, mass = (
        mean_of(found[key], seed=seed) for key in ("deletion", "insertion", "pointing", "mass")
    )
    row = Row(name, words, deleted, inserted, mean_of(gaps.tolist(), seed=seed), pointed, mass)
    return replace(row, **dict(zip(("lead", "better", "sanity"), more, strict=False)))
