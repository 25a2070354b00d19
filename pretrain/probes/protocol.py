"""The two probes on every kind of feature: fixed protocols, so that numbers compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.sampling.subset import of_each_class
from pretrain.probes.features import Batches, Features, collect, with_both
from pretrain.probes.knn import knn_accuracies
from pretrain.probes.linear import PENALTIES, LinearScore, linear_score


@dataclass(frozen=True)
class Score:
    """Accuracies of one kind of feature; `knn` by k, `linear` is None where it was not requested."""

    knn: dict[int, float]
    linear: LinearScore | None


@dataclass(frozen=True)
class ProbeRequest:
    """What to measure: each k and the temperature of the neighbours' vote, whether a linear classifier too, and whether
    the class token and the mean patch token also as one vector; a part of the train images, see `of_each_class`."""

    ks: tuple[int, ...] = (20,)
    temperature: float = 0.07
    linear: bool = True
    both: bool = True
    fraction: float | None = None
    per_class: int | None = None
    subset_seed: int = 0

    def in_words(self) -> list[str]:
        """The protocol, a line per probe."""
        lines = [
            f"{', '.join(map(str, self.ks))}-NN: features of length 1, votes weighted by "
            f"exp(cosine / {self.temperature}), top-1; bank = train, queries = val"
        ]
        if self.linear:
            lines.append(
                "linear: logistic regression on standardized features by L-BFGS, top-1; L2 of "
                f"{PENALTIES[0]:g} to {PENALTIES[-1]:g} (decades) chosen on a fifth of train, then fitted to all of it"
            )
        if self.per_class is not None or self.fraction is not None:
            part = f"{self.per_class} images" if self.per_class is not None else f"{self.fraction:.1%}"
            lines.append(f"train: {part} of each class (seed {self.subset_seed})")
        return [*lines, "no augmentation; pixels have the mean train image subtracted"]


def probe(
    bank: Batches,
    queries: Batches,
    features: Callable[[Tensor], Features],
    *,
    device: torch.device,
    asked: ProbeRequest,
) -> tuple[dict[str, Score], int]:
    """Scores by kind of feature, and how many queries there were. Every rank passes its share, all get the result.

    Pixels are centred by the mean of the bank, as a raw-pixel baseline should be.
    """
    learnt, asked_of = collect(bank, features, device), collect(queries, features, device)
    return scores(learnt, asked_of, device=device, asked=asked), len(asked_of[1])


def scores(
    bank: tuple[Features, Tensor], queries: tuple[Features, Tensor], *, device: torch.device, asked: ProbeRequest
) -> dict[str, Score]:
    """Scores by kind of feature; bank, queries: features [n, d] by kind, and their labels int64 [n]."""
    (bank_features, bank_labels), (query_features, labels) = bank, queries
    if asked.per_class is not None or asked.fraction is not None:
        part = {"fraction": asked.fraction, "per_class": asked.per_class, "seed": asked.subset_seed}
        rows = torch.from_numpy(of_each_class(bank_labels.numpy(), **part))
        bank_features, bank_labels = {name: value[rows] for name, value in bank_features.items()}, bank_labels[rows]
    if asked.both:
        bank_features, query_features = with_both(bank_features), with_both(query_features)
    found = {}
    for name, stored in bank_features.items():
        centre = stored.mean(0) if name == "pixels" else torch.zeros(())
        given = (
            (stored - centre).to(device), bank_labels.to(device),
            (query_features[name] - centre).to(device), labels.to(device),
        )  # fmt: skip
        found[name] = Score(
            knn_accuracies(*given, ks=asked.ks, temperature=asked.temperature),
            linear_score(*given) if asked.linear else None,
        )
    return found


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy over `count` queries, from the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / count)
