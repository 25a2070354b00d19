"""The two probes on every kind of feature: fixed protocols, so that numbers compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.probes.features import Batches, Features, collect, with_both
from pretrain.probes.knn import knn_accuracy
from pretrain.probes.linear import PENALTIES, LinearScore, linear_score


@dataclass(frozen=True)
class Score:
    """Accuracies of one kind of feature; `linear` is None where it was not asked for."""

    knn: float
    linear: LinearScore | None


@dataclass(frozen=True)
class Asked:
    """What to measure: k and temperature of the neighbours' vote, whether a linear classifier too, and whether the
    class token and the mean patch token also as one vector."""

    k: int = 20
    temperature: float = 0.07
    linear: bool = True
    both: bool = True

    def in_words(self) -> list[str]:
        """The protocol, a line per probe."""
        lines = [
            f"{self.k}-NN: features of length 1, votes weighted by exp(cosine / {self.temperature}), top-1; "
            "bank = train, queries = val"
        ]
        if self.linear:
            lines.append(
                "linear: logistic regression on standardized features by L-BFGS, top-1; L2 of "
                f"{PENALTIES[0]:g} to {PENALTIES[-1]:g} (decades) chosen on a fifth of train, then fitted to all of it"
            )
        return [*lines, "no augmentation; pixels have the mean train image subtracted"]


def probe(
    bank: Batches,
    queries: Batches,
    features: Callable[[Tensor], Features],
    *,
    device: torch.device,
    asked: Asked,
) -> tuple[dict[str, Score], int]:
    """Scores by kind of feature, and how many queries there were. Every rank gives its share and gets the whole.

    Pixels are centred by the mean of the bank, as a raw-pixel baseline should be.
    """
    bank_features, bank_labels = collect(bank, features, device)
    query_features, labels = collect(queries, features, device)
    if asked.both:
        bank_features, query_features = with_both(bank_features), with_both(query_features)
    scores = {}
    for name, stored in bank_features.items():
        centre = stored.mean(0) if name == "pixels" else torch.zeros(())
        given = (
            (stored - centre).to(device), bank_labels.to(device),
            (query_features[name] - centre).to(device), labels.to(device),
        )  # fmt: skip
        scores[name] = Score(
            knn_accuracy(*given, k=asked.k, temperature=asked.temperature),
            linear_score(*given) if asked.linear else None,
        )
    return scores, len(labels)


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy over `count` queries, from the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / count)
