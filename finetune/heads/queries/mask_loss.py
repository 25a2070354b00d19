"""The loss of a set of masks: every object is assigned to one query, by least cost, the others to "no object".

Mask2Former (Cheng et al. 2022, section 3.2) with the weights of EoMT (Kerssies et al. 2025): binary cross-entropy and
Dice on points, cross-entropy of the classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.heads.queries import matcher, point_sample
from pretrain.core import distributed


@dataclass(frozen=True)
class MaskTargets:
    """The objects of one image: labels int64 [n] from 0; masks bool or uint8 [n, H, W].

    Where `valid` [H, W] is False the truth is unknown (void pixels, crowds): no loss there. None: all is known.
    """

    labels: Tensor
    masks: Tensor
    valid: Tensor | None = None

    @classmethod
    def of_class_map(cls, class_map: Tensor, *, void: int = 255) -> MaskTargets:
        """A mask for every class that occurs in a map [H, W]; `void` is no class, and the truth is unknown there."""
        labels = class_map.unique()
        labels = labels[labels != void].long()
        valid = class_map != void
        return cls(labels, class_map[None] == labels[:, None, None], None if bool(valid.all()) else valid)


@dataclass(frozen=True)
class MaskSetLoss:
    """The loss with its weights. `oversample` and `important` choose the points, see `uncertain_points`."""

    num_classes: int
    num_points: int = 12544
    oversample: float = 3.0
    important: float = 0.75
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    class_weight: float = 2.0
    no_object_weight: float = 0.1

    def __call__(
        self, predictions: list[tuple[Tensor, Tensor]], targets: list[MaskTargets], shifts: Tensor
    ) -> dict[str, Tensor]:
        """The loss summed over all `predictions`, each matched separately; the terms of the last one; and
        "without_query", the number of objects per image that exceed the queries.

        Args:
            predictions: (mask logits [b, q, h, w], class logits [b, q, K + 1]) of every layer that is supervised.
            shifts: a pair of uniform random numbers for every image, [b, 2], which determines the points.

        Raises:
            ValueError: a label is not one of the classes, or the numbers of labels and masks differ.
        """
        self._check(targets)
        counts = self._counts(predictions[0][1], targets)
        known = [
            _Known.at(target, point_sample.spread(shift, self.num_points))
            for target, shift in zip(targets, shifts, strict=True)
        ]
        terms = [self._of_layer(*layer, targets, known, shifts, counts) for layer in predictions]
        total = torch.stack([self._weighted(term) for term in terms]).sum()
        found = {name: value.detach() for name, value in terms[-1].items()}
        return {"loss": total, **found, "without_query": _without_query(targets, predictions[0][1])}

    def _weighted(self, term: dict[str, Tensor]) -> Tensor:
        return self.mask_weight * term["mask"] + self.dice_weight * term["dice"] + self.class_weight * term["class"]

    def _of_layer(
        self,
        mask_logits: Tensor,
        class_logits: Tensor,
        targets: list[MaskTargets],
        known: list[_Known],
        shifts: Tensor,
        counts: Tensor,
    ) -> dict[str, Tensor]:
        expected = class_logits.new_full(class_logits.shape[:2], self.num_classes, dtype=torch.int64)
        cross_entropies, dices = [], []
        for i, (target, at) in enumerate(zip(targets, known, strict=True)):
            queries, objects = self._match(mask_logits[i], class_logits[i], target.labels, at)
            expected[i, queries] = target.labels[objects]
            chosen = mask_logits[i].index_select(0, queries).float()
            cross_entropy, dice = self._compare(chosen, target.masks[objects], target.valid, shifts[i])
            cross_entropies.append(cross_entropy)
            dices.append(dice)
        weights = class_logits.new_ones(self.num_classes + 1, dtype=torch.float32)
        weights[-1] = self.no_object_weight
        by_class = F.cross_entropy(class_logits.float().flatten(0, 1), expected.flatten(), weights, reduction="sum")
        masks, classes = counts
        return {
            "mask": torch.cat(cross_entropies).sum() / masks,
            "dice": torch.cat(dices).sum() / masks,
            "class": by_class / classes,
        }

    @torch.no_grad()
    def _match(self, mask_logits: Tensor, class_logits: Tensor, labels: Tensor, known: _Known) -> tuple[Tensor, Tensor]:
        logits = point_sample.sample_together(mask_logits.float(), known.points)
        cost = self.mask_weight * matcher.mask_cost(logits, known.masks, known.weights)
        cost += self.dice_weight * matcher.dice_cost(logits, known.masks, known.weights)
        cost += self.class_weight * matcher.class_cost(class_logits, labels)
        return matcher.match(cost)

    def _compare(self, logits: Tensor, masks: Tensor, valid: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and Dice loss of every pair of logits [m, h, w] and masks [m, H, W]: two [m]."""
        shifts = point_sample.shifts_of_masks(shift, len(logits))
        points = point_sample.uncertain_points(
            logits, shifts, self.num_points, oversample=self.oversample, important=self.important
        )
        predicted, wanted = point_sample.sample(logits, points), point_sample.sample(masks, points)
        weights = torch.ones_like(wanted)
        if valid is not None:
            weights = (point_sample.sample(valid.expand(len(points), -1, -1), points) > 0.5).float()
        cross_entropy = F.binary_cross_entropy_with_logits(predicted, wanted, weights, reduction="none")
        probability = predicted.sigmoid() * weights
        overlap, sizes = (probability * wanted).sum(1), probability.sum(1) + (wanted * weights).sum(1)
        return cross_entropy.sum(1) / weights.sum(1).clamp(min=1.0), 1 - (2 * overlap + 1) / (sizes + 1)

    def _counts(self, class_logits: Tensor, targets: list[MaskTargets]) -> Tensor:
        """Divisors of the sums over masks and over queries, such that the mean over ranks is that of one rank."""
        queries = class_logits.shape[1]
        masks = sum(min(len(target.labels), queries) for target in targets)
        classes = masks + self.no_object_weight * (len(targets) * queries - masks)
        counts = torch.tensor([masks, classes], dtype=torch.float32, device=class_logits.device)
        return distributed.all_reduce_sum(counts).clamp(min=torch.finfo(torch.float32).tiny) / distributed.world_size()

    def _check(self, targets: list[MaskTargets]) -> None:
        for i, target in enumerate(targets):
            if len(target.labels) != len(target.masks):
                raise ValueError(f"image {i} of the batch: {len(target.labels)} labels for {len(target.masks)} masks")
            if len(target.labels) and not 0 <= int(target.labels.min()) <= int(target.labels.max()) < self.num_classes:
                found = sorted(set(target.labels.tolist()))
                raise ValueError(f"image {i} of the batch: labels {found}, but the head has {self.num_classes} classes")


def _without_query(targets: list[MaskTargets], class_logits: Tensor) -> Tensor:
    over = sum(max(len(target.labels) - class_logits.shape[1], 0) for target in targets)
    return class_logits.new_tensor(over / len(targets), dtype=torch.float32)


@dataclass(frozen=True)
class _Known:
    """The masks of an image [n, p] at the points [p, 2] where all pairs are compared, and the points' weights [p]."""

    points: Tensor
    masks: Tensor
    weights: Tensor

    @classmethod
    def at(cls, target: MaskTargets, points: Tensor) -> _Known:
        weights = points.new_ones(len(points))
        if target.valid is not None:
            weights = (point_sample.sample_together(target.valid[None], points)[0] > 0.5).float()
        return cls(points, point_sample.sample_together(target.masks, points), weights)
