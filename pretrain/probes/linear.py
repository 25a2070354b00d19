"""Linear accuracy of frozen features: multinomial logistic regression, its L2 penalty chosen without the test images.

Features are standardized by the images the classifier is fitted to, as BatchNorm without affine does in MAE's linear
probe (He et al. 2021, A.1). The penalty is the one of `PENALTIES` with the best top-1 on a fifth of the train images,
on which the classifier of that trial was not fitted; the classifier is then fitted to all of them. The problem is
convex and starts from 0: the only random choice is the fifth, by a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each starts from the solution of the one before
MAX_ITERATIONS = 100
_CHUNK = 1 << 14
_EPS = 1e-6


@dataclass(frozen=True)
class LinearScore:
    """accuracy: top-1 on the queries. penalty: the L2 chosen. held_out: top-1 on the fifth that chose it."""

    accuracy: float
    penalty: float
    held_out: float


@dataclass
class LinearClassifier:
    """Standardization and weights: `mean`, `std` [d], `weight` [d, C], `bias` [C]."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def start(features: Tensor, num_classes: int) -> LinearClassifier:
        """Zero weights for features [n, d]."""
        weight = features.new_zeros(features.shape[1], num_classes)
        std = (features.var(0, correction=0) + _EPS).sqrt()
        return LinearClassifier(features.mean(0), std, weight, features.new_zeros(num_classes))

    def logits(self, features: Tensor) -> Tensor:
        """Features [b, d] -> [b, C]."""
        return self.standardize(features) @ self.weight + self.bias

    def standardize(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def fit(self, features: Tensor, labels: Tensor, penalty: float) -> LinearClassifier:
        """Minimize mean cross-entropy + penalty / 2 * |weight|^2 by L-BFGS from the present weights, in place.

        `features` [n, d] are standardized.
        """
        parameters = [self.weight, self.bias]
        solver = torch.optim.LBFGS(
            parameters, max_iter=MAX_ITERATIONS, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            loss, self.weight.grad, self.bias.grad = self._loss(features, labels, penalty)
            return loss

        solver.step(closure)  # pyright: ignore[reportArgumentType]  # it takes tensors, its stub says floats
        self.weight.grad = self.bias.grad = None
        return self

    def _loss(self, features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        """Value and gradients, in chunks: the probabilities of a million images and a thousand classes are 5 GB."""
        loss = 0.5 * penalty * self.weight.square().sum()
        weight_grad, bias_grad = penalty * self.weight, torch.zeros_like(self.bias)
        for chunk, truth in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
            log_probabilities = F.log_softmax(chunk @ self.weight + self.bias, dim=1)
            loss = loss + F.nll_loss(log_probabilities, truth, reduction="sum") / len(labels)
            error = log_probabilities.exp_()
            error[torch.arange(len(truth), device=truth.device), truth] -= 1
            error /= len(labels)
            weight_grad += chunk.T @ error
            bias_grad += error.sum(0)
        return loss, weight_grad, bias_grad


@torch.no_grad()
def linear_score(train: Tensor, train_labels: Tensor, queries: Tensor, labels: Tensor) -> LinearScore:
    """Fit to `train` [n, d] with labels int64 [n]; top-1 on `queries` [q, d] with labels [q].

    A label that no train image has counts as wrong.

    Raises:
        ValueError: fewer than 5 train images, or no query: no fifth can be held out, or nothing can be classified.
    """
    if len(train) < 5 or not len(queries):
        raise ValueError(
            f"the linear probe needs at least 5 train images and a query, got {len(train)} and {len(queries)}"
        )
    classes, targets = train_labels.unique(return_inverse=True)
    train = train.float()
    fit, held_out = _fifth(len(train), train.device)
    trials = {
        penalty: _accuracy(classifier, train[held_out], targets[held_out])
        for penalty, classifier in _path(train[fit], targets[fit], len(classes), PENALTIES)
    }
    best = max(trials, key=lambda penalty: (trials[penalty], penalty))
    stronger = [penalty for penalty in PENALTIES if penalty >= best]
    *_, (_, classifier) = _path(train, targets, len(classes), stronger)
    right = sum(
        int((classes[classifier.logits(chunk.float()).argmax(1)] == truth).sum())
        for chunk, truth in zip(queries.split(_CHUNK), labels.split(_CHUNK), strict=True)
    )
    return LinearScore(right / len(queries), best, trials[best])


def _path(
    features: Tensor, targets: Tensor, num_classes: int, penalties: tuple[float, ...] | list[float]
) -> Iterator[tuple[float, LinearClassifier]]:
    """One classifier, fitted to each penalty in turn."""
    classifier = LinearClassifier.start(features, num_classes)
    features = classifier.standardize(features)  # once: hundreds of evaluations read it
    for penalty in penalties:
        yield penalty, classifier.fit(features, targets, penalty)


def _accuracy(classifier: LinearClassifier, features: Tensor, targets: Tensor) -> float:
    chunks = zip(features.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return sum(int((classifier.logits(chunk).argmax(1) == truth).sum()) for chunk, truth in chunks) / len(features)


def _fifth(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers to fit to and to hold out, by a fixed permutation: sorted data must not lose whole classes."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    return order[count // 5 :], order[: count // 5]
