"""Whether a network needs its attention: what it loses when the weights of a module no longer depend on the image.

Guo et al. 2021, section 4.1, ask what is necessary and sufficient for attention. A module whose weights can be
replaced by one set for all images, at no cost, computes a fixed mixing: it does not attend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from finetune.attention.statistics import Gathering, Measured
from finetune.attention.weights import Source, readable, sources
from pretrain.models.activations import Sparsity, observed

FROZEN, SHUFFLED, UNIFORM = "frozen", "shuffled", "uniform"
WAYS = (FROZEN, SHUFFLED, UNIFORM)
RESAMPLES = 2000
ALL = "every attention module"


class Judge(Protocol):
    """Runs the network over all images and says of each whether it was right, bool [n]; None: it has no labels."""

    def __call__(self) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Cost:
    """Accuracy lost, with the interval of 95 % over bootstrap resamples of the images."""

    lost: float
    low: float
    high: float

    @property
    def seen(self) -> bool:
        """Whether the interval is above 0."""
        return self.low > 0


@dataclass(frozen=True)
class Row:
    """A module. costs: by way, see `WAYS`; empty without labels. A feed-forward network has `sparsity` alone."""

    name: str
    kind: str
    measured: Measured | None
    costs: dict[str, Cost] = field(default_factory=dict)
    sparsity: Sparsity | None = None

    @property
    def verdict(self) -> str:
        if not self.costs:
            return ""
        return "attends" if self.costs[FROZEN].seen else "no cost seen when frozen"


@dataclass(frozen=True)
class Study:
    """accuracy: of the unchanged network; None without labels. rows: all attention together, then each module, then the
    feed-forward networks."""

    accuracy: float | None
    images: int
    rows: list[Row]

    @property
    def ways(self) -> list[str]:
        """Those of `WAYS` whose costs were measured."""
        return [way for way in WAYS if any(way in row.costs for row in self.rows)]


def study(
    network: nn.Module,
    judge: Judge,
    *,
    grid: tuple[int, int] | None,
    num_prefix_tokens: int,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Study:
    """Measure every attention module, gate and router of `network`, which is in eval mode.

    Args:
        grid: of the patches of the images; None: attention is on no grid.
        seed: of the bootstrap and of the shuffling between images.

    Raises:
        ValueError: the network has no module whose weights can be read.
    """
    found = sources(network)
    if not found:
        raise ValueError("the network has no attention module, gate or router whose weights can be read")
    gathered = {source.name: Gathering(source.kind, grid, num_prefix_tokens) for source in found}
    with readable(network):
        with observed(network) as activity, _all(found, lambda source: gathered[source.name]):
            intact = judge()
        rows = []
        attention = [source for source in found if source.kind == "attention"]
        groups = [(ALL, attention)] if len(attention) > 1 else []
        groups += [(source.name, [source]) for source in found]
        for name, group in groups:
            costs = {}
            for way in WAYS if intact is not None else ():
                with _all(group, lambda source, way=way: _way(way, source.kind, gathered[source.name].mean, seed)):
                    costs[way] = _cost(intact, judge(), seed)
            single = group[0] if len(group) == 1 else None
            measured = gathered[single.name].measured() if single is not None and name != ALL else None
            rows.append(Row(name, single.kind if single is not None else "attention", measured, costs))
            log(f"{name}: " + ", ".join(f"{way} {cost.lost:+.3f}" for way, cost in costs.items()))
    rows += [Row(name, "mlp", None, sparsity=of.sparsity) for name, of in activity.items() if of.tokens]
    count = next(iter(gathered.values())).count
    return Study(None if intact is None else float(intact.mean()), count, rows)


@contextmanager
def _all(group: Sequence[Source], replace: Callable[[Source], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for source in group:
            stack.enter_context(source.replaced(replace(source)))
        yield


def _way(way: str, kind: str, mean: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Weights [b, ...] -> weights that do not see their own image."""
    generator = torch.Generator().manual_seed(seed)
    uniform = mean.mean() if kind == "gate" else mean.mean(-1, keepdim=True)

    def replace(weights: Tensor) -> Tensor:
        if way == SHUFFLED:  # the batch is rotated: no image keeps its own weights, unless it is alone
            return weights.roll(1 + int(torch.randint(max(len(weights) - 1, 1), (1,), generator=generator)), 0)
        return (mean if way == FROZEN else uniform).to(weights).expand_as(weights)

    return replace


def _cost(intact: np.ndarray | None, changed: np.ndarray | None, seed: int) -> Cost:
    """The mean of intact - changed over the images, and its interval from resampled images."""
    assert intact is not None and changed is not None
    difference = intact.astype(float) - changed.astype(float)
    draws = np.random.default_rng(seed).integers(0, len(difference), (RESAMPLES, len(difference)))
    means = difference[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Cost(float(difference.mean()), float(low), float(high))
