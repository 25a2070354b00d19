"""Cross-entropy of student and teacher over many prototypes, storing no logits (Caron et al. 2021, eq. 1 to 4).

Logits of 10 crops x 64 images x 65536 prototypes take 168 MB, and autograd would keep several such tensors; here they
are streamed (`pretrain.models.losses.prototype_stream`).

For student crop v the cross-entropies with all other teachers add up to n_v * logsumexp(s_v) - <w_v, s_v>, where w_v is
the sum of those teachers' probabilities and n_v their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses.prototype_stream import (
    Gradients,
    StreamedLogits,
    StreamedTargets,
    chunks_of,
    differentiable_once,
    product_dtype,
)


class PrototypeLoss(NamedTuple):
    """`loss` is differentiable; the others are not.

    Attributes:
        loss: mean cross-entropy over pairs (teacher crop, other student crop) and images.
        by_crop: [V] the share of each student crop; their sum is `loss`.
        teacher_sum: [K] sum over rows of the teacher's raw logits, for the centre.
        teacher_entropy: mean entropy of the teacher's assignments, in nats.
        mean_entropy: entropy of the mean teacher assignment, in nats; log K when all prototypes are used equally.
    """

    loss: Tensor
    by_crop: Tensor
    teacher_sum: Tensor
    teacher_entropy: Tensor
    mean_entropy: Tensor


def prototype_loss(
    student: Tensor,
    student_layer: Prototypes,
    teacher: Tensor,
    teacher_layer: Prototypes,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    crop_weights: Sequence[float] | None = None,
) -> PrototypeLoss:
    """Cross-entropy of every student crop with every teacher crop except the same one.

    Products are computed in the dtype of autocast, all else in fp32. Backward can run only once.

    Args:
        student: bottleneck features [V, b, D]; the first G crops are those of the teacher.
        teacher: bottleneck features [G, b, D]. center: [K], subtracted from the teacher's logits.
        crop_weights: [V], a factor on the loss of each student crop. They change `loss`, not `by_crop`. None: all 1.
    """
    dtype = product_dtype(student)

    def compute(with_gradients: bool) -> tuple[tuple[Tensor, ...], Gradients | None]:
        pair = _Pair(
            StreamedLogits(student.flatten(0, 1), student_layer, dtype),
            StreamedLogits(teacher.flatten(0, 1), teacher_layer, dtype),
            center.float(),
            student_crops=len(student),
            teacher_crops=len(teacher),
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            crop_weights=crop_weights,
        )
        pair.normalize()
        gradients = pair.accumulate(with_gradients=with_gradients)
        entropies = (pair.targets.entropy().mean(), pair.mean_entropy)
        return (pair.loss(), pair.by_crop(), pair.targets.sum, *entropies), gradients

    return PrototypeLoss(*differentiable_once(student, student_layer.weight_v, student_layer.weight_g, compute))


class _Pair:
    """Student and teacher over the same prototypes."""

    def __init__(
        self,
        student: StreamedLogits,
        teacher: StreamedLogits,
        center: Tensor,
        *,
        student_crops: int,
        teacher_crops: int,
        student_temp: float,
        teacher_temp: float,
        crop_weights: Sequence[float] | None,
    ):
        self.student, self.targets = student, StreamedTargets(teacher, center, teacher_temp)
        self.student_crops, self.teacher_crops = student_crops, teacher_crops
        self.images = len(student.rows) // student_crops
        self.sharpness = 1 / student_temp
        self.terms = teacher_crops * (student_crops - 1)
        self.chunks = chunks_of(len(center), len(student.rows) + len(teacher.rows), center.device)
        self.mean_entropy = center.new_zeros(())
        self.crop_weights = crop_weights

    def normalize(self) -> None:
        """First pass: logsumexp of every row, and the sum of the teacher's logits."""
        for chunk in self.chunks:
            self.targets.first(chunk)
            self.student.add_to_lse(self.student.first(chunk).mul_(self.sharpness))

    def accumulate(self, *, with_gradients: bool) -> Gradients | None:
        """Second pass: <w, s> of each row, the entropies, and the gradients of bottlenecks, weight_v and weight_g."""
        student, size = self.student, (self.student_crops, self.images)
        by_rows = torch.zeros_like(student.rows, dtype=torch.float32)
        by_v = torch.empty_like(student.v, dtype=torch.float32) if with_gradients else by_rows
        by_g = torch.empty_like(student.g)
        for chunk in self.chunks:
            targets = self._summed_targets(chunk)
            logits = student.again(chunk).mul_(self.sharpness)
            by_crop = logits.unflatten(0, size)
            dots = [torch.linalg.vecdot(s, w) for s, w in zip(by_crop, targets, strict=True)]
            student.dot += torch.cat(dots)[:, None]
            if not with_gradients:
                continue
            difference = logits.sub_(student.lse).exp_().unflatten(0, size)
            for crop, target in enumerate(targets):
                difference[crop].mul_(self._partners(crop)).sub_(target)
                if self.crop_weights is not None:
                    difference[crop].mul_(self.crop_weights[crop])
            difference = difference.flatten(0, 1).mul_(self.sharpness / (self.terms * self.images))
            student.propagate(chunk, difference, by_rows, by_v[chunk], by_g[chunk])
        return (by_rows.unflatten(0, size), by_v, by_g[:, None]) if with_gradients else None

    def loss(self) -> Tensor:
        if self.crop_weights is not None:
            return self.by_crop() @ self.mean_entropy.new_tensor(self.crop_weights)
        return (self._normalizer().sum() - self.student.dot.sum() / self.images) / self.terms

    def by_crop(self) -> Tensor:
        """The share [V] of each student crop in the loss."""
        return (self._normalizer() - self.student.dot.view(self.student_crops, -1).mean(dim=1)) / self.terms

    def _normalizer(self) -> Tensor:
        """[V] logsumexp, mean over images, once for each teacher that a student crop is compared with."""
        partners = self.mean_entropy.new_tensor([self._partners(crop) for crop in range(self.student_crops)])
        return self.student.lse.view(self.student_crops, -1).mean(dim=1) * partners

    def _summed_targets(self, chunk: slice) -> list[Tensor]:
        """For each student crop, the sum of the probabilities [b, k] of the teachers compared with it."""
        probabilities = self.targets.probabilities(chunk)
        mean = probabilities.mean(dim=0)
        self.mean_entropy -= torch.xlogy(mean, mean).sum()
        probabilities = probabilities.unflatten(0, (self.teacher_crops, self.images))
        total = probabilities.sum(dim=0)
        seen = [total - probabilities[crop] for crop in range(self.teacher_crops)]
        return seen + [total] * (self.student_crops - self.teacher_crops)

    def _partners(self, crop: int) -> int:
        """Number of teachers that a student crop is compared with."""
        return self.teacher_crops - (crop < self.teacher_crops)
