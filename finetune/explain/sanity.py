"""Whether a map depends on what was learned: its weights are randomized, from the head down (Adebayo et al. 2018).

At each stage the weights of one more part are permuted within their tensors, so that their distribution stays and what
they hold is gone. A map that survives is a picture of the image. Where the given weights cannot be told from permuted
ones, nothing was learned that a map could show: their largest singular values are those of random matrices (Martin &
Mahoney 2021, "Implicit self-regularization in deep neural networks").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from finetune.explain.subjects import Aim, Subject

SURVIVES = 0.5  # mean rank correlation with the map of random weights from which on a map survives
LEARNED = 1.05  # largest singular value relative to that of the permuted matrix, below which nothing was learned
STAGES = 6
_SMALLEST, _ITERATIONS = 16, 30

Maps = Callable[[Subject, Sequence[Aim]], Tensor]


@dataclass(frozen=True)
class Sanity:
    """Of one map.

    stages: (what is random from here on, mean rank correlation with the map of the given weights), from the head down.
    passes: whether it depends on learned weights. reason: in words.
    """

    stages: list[tuple[str, float]]
    passes: bool
    reason: str

    @property
    def line(self) -> str:
        return f"{'passes' if self.passes else 'does not pass'}: {self.reason}"


def check(
    subject: Subject,
    images: Tensor,
    aims: Sequence[Aim],
    methods: dict[str, Maps],
    before: Mapping[str, Tensor],
    *,
    seed: int,
) -> dict[str, Sanity]:
    """The sanity of each map.

    Args:
        methods: by name, (subject, aims) -> maps [b, rows, columns] of `images`. before: those of the given weights.
    """
    ratio = learned(subject.network, seed=seed)
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in methods}
    for stage, changed in randomized(subject, seed=seed):
        renewed = changed.renewed(images, aims)
        for name, compute in methods.items():
            found[name].append((stage, _correlation(before[name], compute(changed, renewed))))
    return {name: _judged(stages, ratio) for name, stages in found.items()}


def randomized(subject: Subject, *, seed: int) -> Iterator[tuple[str, Subject]]:
    """The subject with more and more of its weights permuted, and the name of the last part of them.

    It is a copy; the subject does not change.
    """
    changed = copy.deepcopy(subject)
    generator = torch.Generator().manual_seed(seed)
    for name, parameters in _stages(changed):
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(_permuted(parameter, generator))
        yield name, changed


@torch.no_grad()
def learned(network: nn.Module, *, seed: int) -> float:
    """The median, over the weight matrices, of the largest singular value relative to that of the permuted matrix: 1
    for random weights; nan: it has no matrix."""
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for module in network.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        matrix = module.weight.float().flatten(1).cpu()
        if min(matrix.shape) < _SMALLEST or not matrix.any():
            continue
        ratios.append(_largest(matrix, generator) / _largest(_permuted(matrix, generator), generator))
    return float(np.median(ratios)) if ratios else float("nan")


def _stages(subject: Subject) -> list[tuple[str, list[nn.Parameter]]]:
    """Parts of the network from the head down, at most `STAGES`, and their parameters."""
    backbone = subject.backbone
    own = {id(parameter) for parameter in backbone.parameters()}
    head = [parameter for parameter in subject.network.parameters() if id(parameter) not in own]
    parts: list[tuple[str, nn.Module]] = []
    if "layers" in backbone.provides:
        parts = [(f"block {i}", block) for i, block in enumerate(backbone.trunk.blocks)]
    else:
        children = [child for child in (getattr(backbone, "model", None) or backbone).named_children()]
        parts = [child for child in children if any(True for _ in child[1].parameters())]
    groups = [group.tolist() for group in np.array_split(np.arange(len(parts))[::-1], STAGES - 2) if len(group)]
    found = [("head", head)] if head else []
    for group in groups:
        name = parts[group[0]][0] if len(group) == 1 else f"{parts[group[0]][0]} to {parts[group[-1]][0]}"
        found.append((name, [parameter for i in group for parameter in parts[i][1].parameters()]))
    done = {id(parameter) for _, parameters in found for parameter in parameters}
    rest = [parameter for parameter in subject.network.parameters() if id(parameter) not in done]
    return [*found, ("all weights", rest)]


def _permuted(values: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(values.numel(), generator=generator).to(values.device)
    return values.flatten()[order].view_as(values)


def _largest(matrix: Tensor, generator: torch.Generator) -> float:
    """The largest singular value, by power iteration."""
    vector = torch.randn(matrix.shape[1], generator=generator)
    for _ in range(_ITERATIONS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp(min=1e-30)
    return float((matrix @ vector).norm())


def _correlation(first: Tensor, second: Tensor) -> float:
    """The mean over images of Spearman's rank correlation of two maps; nan if every map is constant."""
    from scipy.stats import spearmanr

    pairs = zip(first.flatten(1).cpu().numpy(), second.flatten(1).cpu().numpy(), strict=True)
    found = [float(spearmanr(a, b).statistic) for a, b in pairs if a.std() > 0 and b.std() > 0]  # type: ignore[attr-defined]
    return float(np.mean(found)) if found else float("nan")


def _judged(stages: list[tuple[str, float]], ratio: float) -> Sanity:
    last = stages[-1][1]
    if ratio < LEARNED:
        text = f"the network's weights cannot be told from random ones (largest singular values {ratio:.2f} times)"
        return Sanity(stages, False, text)
    if not np.isfinite(last):
        return Sanity(stages, False, "the map is constant")
    text = f"rank correlation with the map of random weights {last:.2f}"
    if last >= SURVIVES:
        return Sanity(stages, False, f"{text}: it shows the image, whatever was learned")
    return Sanity(stages, True, text)
