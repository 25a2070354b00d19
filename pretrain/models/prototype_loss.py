"""Cross-entropy of student and teacher over many prototypes, without keeping a logit (Caron et al. 2021, eq. 1 to 4).

Logits of 10 crops x 64 images x 65536 prototypes take 168 MB, and autograd would keep several such tensors. Here the
prototypes pass by in chunks, twice: first for the normalizers, then for loss and gradients, which are ready before
backward asks for them. Chunks are of prototypes, not of rows, so that each writes its own part of the weight gradient.

For student crop v the cross-entropies with all other teachers add up to n_v * logsumexp(s_v) - <w_v, s_v>, where w_v is
the sum of those teachers' probabilities and n_v their number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PrototypeLoss(NamedTuple):
    """`loss` is differentiable; the rest is not.

    Attributes:
        loss: mean cross-entropy over pairs (teacher crop, other student crop) and images.
        teacher_sum: [K] sum over rows of the teacher's raw logits, for the centre.
        teacher_entropy: mean entropy of a teacher assignment, in nats.
        mean_entropy: entropy of the mean teacher assignment, in nats; log K when all prototypes are used alike.
    """

    loss: Tensor
    teacher_sum: Tensor
    teacher_entropy: Tensor
    mean_entropy: Tensor


def prototype_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
) -> PrototypeLoss:
    """Every student crop against every teacher crop but its own.

    Args:
        student: bottlenecks [V, b, D]; the first G crops are those the teacher saw.
        teacher: bottlenecks [G, b, D]. center: [K], subtracted from the teacher's logits.
        student_weight, teacher_weight: [K, D]. Logits are computed in the type of autocast, the rest in fp32.
    """
    return PrototypeLoss(
        *_Function.apply(student, student_weight, teacher, teacher_weight, center, student_temp, teacher_temp)
    )


def chunk_size(rows: int, device: torch.device) -> int:
    """Prototypes at a time: what fits the cache of a CPU, or keeps a GPU's kernels large and its memory small."""
    elements = 2**20 if device.type == "cpu" else 2**25
    return max(1024, elements // rows)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student, student_weight, teacher, teacher_weight, center, student_temp, teacher_temp):
        device = student.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        with torch.autocast(device, enabled=False):
            pair = _Pair(
                student.to(dtype), student_weight.to(dtype), teacher.to(dtype), teacher_weight.to(dtype), center.float()
            )
            pair.normalizers(1 / student_temp, 1 / teacher_temp)
            ctx.gradients = pair.accumulate(with_gradients=any(ctx.needs_input_grad))
        ctx.dtypes = student.dtype, student_weight.dtype
        outputs = pair.loss(), pair.teacher_sum, pair.teacher_entropy(), pair.mean_entropy
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the prototype loss gives its gradients away once; it cannot go backward a second time")
        by_student, by_weight = ctx.gradients
        ctx.gradients = None
        dtype, weight_dtype = ctx.dtypes
        return (by_student * grads[0]).to(dtype), by_weight.mul_(grads[0]).to(weight_dtype), *[None] * 5


class _Pair:
    """Student [V, b, D] and teacher [G, b, D] over the same prototypes."""

    def __init__(
        self, student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor
    ):
        self.views, self.images, _ = student.shape
        self.teachers = len(teacher)
        self.student, self.student_weight = student.flatten(0, 1), student_weight
        self.teacher, self.teacher_weight, self.center = teacher.flatten(0, 1), teacher_weight, center
        self.terms = self.teachers * (self.views - 1)
        size = chunk_size(len(self.student) + len(self.teacher), student.device)
        self.chunks = [slice(start, start + size) for start in range(0, len(center), size)]
        self.teacher_sum = torch.empty_like(center)
        self.mean_entropy = center.new_zeros(())

    def _student_logits(self, chunk: slice) -> Tensor:
        return (self.student @ self.student_weight[chunk].T).float() * self.student_scale

    def _teacher_logits(self, chunk: slice, *, first: bool = False) -> Tensor:
        raw = (self.teacher @ self.teacher_weight[chunk].T).float()
        if first:
            self.teacher_sum[chunk] = raw.sum(dim=0)
        return raw.sub_(self.center[chunk]).mul_(self.teacher_scale)

    def normalizers(self, student_scale: float, teacher_scale: float) -> None:
        """First pass: logsumexp of every row, and the sum of the teacher's logits."""
        self.student_scale, self.teacher_scale = student_scale, teacher_scale
        self.student_lse = self.center.new_full((len(self.student), 1), float("-inf"))
        self.teacher_lse = self.center.new_full((len(self.teacher), 1), float("-inf"))
        for chunk in self.chunks:
            student = self._student_logits(chunk).logsumexp(dim=1, keepdim=True)
            teacher = self._teacher_logits(chunk, first=True).logsumexp(dim=1, keepdim=True)
            self.student_lse = torch.logaddexp(self.student_lse, student)
            self.teacher_lse = torch.logaddexp(self.teacher_lse, teacher)

    def accumulate(self, *, with_gradients: bool) -> tuple[Tensor, Tensor] | None:
        """Second pass: <w, s> per row, the entropies, and the gradients by the student and its weight."""
        self.student_dot = torch.zeros_like(self.student_lse)
        self.teacher_dot = torch.zeros_like(self.teacher_lse)
        by_student = torch.zeros_like(self.student, dtype=torch.float32)
        by_weight = torch.empty_like(self.student_weight, dtype=torch.float32) if with_gradients else by_student
        g, scale = self.teachers, self.student_scale / (self.terms * self.images)
        for chunk in self.chunks:
            logits = self._teacher_logits(chunk)
            probabilities = (logits - self.teacher_lse).exp_()
            self.teacher_dot += (probabilities * logits).sum(dim=1, keepdim=True)
            mean = probabilities.mean(dim=0)
            self.mean_entropy -= torch.xlogy(mean, mean).sum()
            probabilities = probabilities.unflatten(0, (g, self.images))
            total = probabilities.sum(dim=0)
            target = [total - probabilities[v] if v < g else total for v in range(self.views)]
            logits = self._student_logits(chunk)
            by_view = logits.unflatten(0, (self.views, self.images))
            dots = [torch.linalg.vecdot(by_view[v], target[v]) for v in range(self.views)]
            self.student_dot += torch.cat(dots)[:, None]
            if with_gradients:
                difference = logits.sub_(self.student_lse).exp_()
                by_view = difference.unflatten(0, (self.views, self.images))
                for v in range(self.views):
                    by_view[v].mul_(self._partners(v)).sub_(target[v])
                difference = difference.mul_(scale).to(self.student.dtype)
                by_student += difference @ self.student_weight[chunk]
                by_weight[chunk] = difference.T @ self.student
        return (by_student.unflatten(0, (self.views, self.images)), by_weight) if with_gradients else None

    def loss(self) -> Tensor:
        partners = torch.tensor([self._partners(v) for v in range(self.views)], device=self.center.device)
        normalizer = self.student_lse.view(self.views, -1).mean(dim=1) * partners
        return (normalizer.sum() - self.student_dot.sum() / self.images) / self.terms

    def teacher_entropy(self) -> Tensor:
        return (self.teacher_lse - self.teacher_dot).mean()

    def _partners(self, view: int) -> int:
        """How many teachers student crop `view` is compared with."""
        return self.teachers - 1 if view < self.teachers else self.teachers
