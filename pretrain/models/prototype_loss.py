"""Cross-entropy of student and teacher over many prototypes, storing no logits (Caron et al. 2021, eq. 1 to 4).

Logits of 10 crops x 64 images x 65536 prototypes take 168 MB, and autograd would keep several such tensors. Here the
prototypes pass by in chunks, twice: first for the normalizers, then for loss and gradients, which are ready before
backward asks for them. Chunks are of prototypes, not of rows, so that each writes its own part of the weight gradient,
and their normalization (Salimans & Kingma 2016) is applied to the chunk's logits: no normalized copy is made.

For student crop v the cross-entropies with all other teachers add up to n_v * logsumexp(s_v) - <w_v, s_v>, where w_v is
the sum of those teachers' probabilities and n_v their number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.models.heads import Prototypes

KEPT_LOGITS = 2**23  # below this many the first pass keeps them (32 MB); above, the second computes them again


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
    student_layer: Prototypes,
    teacher: Tensor,
    teacher_layer: Prototypes,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
) -> PrototypeLoss:
    """Every student crop against every teacher crop but its own.

    Products are computed in the type of autocast, all else in fp32. Backward can run once.

    Args:
        student: bottlenecks [V, b, D]; the first G crops are those the teacher saw.
        teacher: bottlenecks [G, b, D]. center: [K], subtracted from the teacher's logits.
    """
    v, g = student_layer.weight_v, student_layer.weight_g
    others = (teacher, teacher_layer.weight_v, teacher_layer.weight_g, center, student_temp, teacher_temp)
    return PrototypeLoss(*_Function.apply(student, v, g, *others))


def chunk_size(rows: int, device: torch.device) -> int:
    """Prototypes at a time: what the cache of a CPU holds, or what keeps a GPU's kernels large and its memory small."""
    return 2048 if device.type == "cpu" else max(1024, 2**25 // rows)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student, v, g, teacher, teacher_v, teacher_g, center, student_temp, teacher_temp):
        device = student.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        with torch.autocast(device, enabled=False):
            pair = _Pair(_Logits(student, v, g, dtype), _Logits(teacher, teacher_v, teacher_g, dtype), center.float())
            pair.normalize(1 / student_temp, 1 / teacher_temp)
            ctx.gradients = pair.accumulate(with_gradients=any(ctx.needs_input_grad))
        ctx.dtypes = student.dtype, v.dtype, g.dtype
        outputs = pair.loss(), pair.teacher_sum, pair.teacher_entropy(), pair.mean_entropy
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the prototype loss gives its gradients away once; it cannot go backward a second time")
        gradients, ctx.gradients = ctx.gradients, None
        return *(x.mul_(grads[0]).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 6


class _Logits:
    """Bottlenecks [crops, b, D] times normalized prototypes, chunk by chunk; `scale` is gain / length of each."""

    def __init__(self, bottlenecks: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype):
        self.crops, self.images, self.dim = bottlenecks.shape
        self.rows, self.v, self.g, self.dtype = bottlenecks.flatten(0, 1).to(dtype), v, g.float()[:, 0], dtype
        self.length, self.scale = torch.empty_like(self.g), torch.empty_like(self.g)
        self.lse = self.g.new_full((len(self.rows), 1), float("-inf"))
        self.dot = self.g.new_zeros(len(self.rows), 1)
        self._kept: dict[int, Tensor] = {}

    def first(self, chunk: slice) -> Tensor:
        """Raw logits of the chunk, fp32; also measures its prototypes."""
        v = self.v[chunk]
        self.length[chunk] = torch.linalg.vector_norm(v, dim=1, dtype=torch.float32)
        self.scale[chunk] = self.g[chunk] / self.length[chunk]
        logits = self._compute(chunk)
        if len(self.rows) * len(self.g) <= KEPT_LOGITS:
            self._kept[chunk.start] = logits.clone()
        return logits

    def again(self, chunk: slice) -> Tensor:
        """The same, in the second pass."""
        kept = self._kept.pop(chunk.start, None)
        return self._compute(chunk) if kept is None else kept

    def _compute(self, chunk: slice) -> Tensor:
        return (self.rows @ self.v[chunk].to(self.dtype).T).float().mul_(self.scale[chunk])


class _Pair:
    """Student and teacher over the same prototypes."""

    def __init__(self, student: _Logits, teacher: _Logits, center: Tensor):
        self.student, self.teacher, self.center = student, teacher, center
        self.terms = teacher.crops * (student.crops - 1)
        size = chunk_size(len(student.rows) + len(teacher.rows), center.device)
        self.chunks = [slice(start, start + size) for start in range(0, len(center), size)]
        self.teacher_sum = torch.empty_like(center)
        self.mean_entropy = center.new_zeros(())

    def normalize(self, student_sharpness: float, teacher_sharpness: float) -> None:
        """First pass: logsumexp of every row, and the sum of the teacher's logits. Sharpness is 1 / temperature."""
        self.student_sharpness, self.teacher_sharpness = student_sharpness, teacher_sharpness
        for chunk in self.chunks:
            raw = self.teacher.first(chunk)
            self.teacher_sum[chunk] = raw.sum(dim=0)
            sharp = self._sharpen_teacher(raw, chunk)
            self.teacher.lse = torch.logaddexp(self.teacher.lse, sharp.logsumexp(dim=1, keepdim=True))
            sharp = self.student.first(chunk).mul_(student_sharpness)
            self.student.lse = torch.logaddexp(self.student.lse, sharp.logsumexp(dim=1, keepdim=True))

    def accumulate(self, *, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor] | None:
        """Second pass: <w, s> of each row, the entropies, and the gradients by bottlenecks, weight_v and weight_g."""
        student, size = self.student, (self.student.crops, self.student.images)
        by_rows = torch.zeros_like(student.rows, dtype=torch.float32)
        by_v = torch.empty_like(student.v, dtype=torch.float32) if with_gradients else by_rows
        by_g = torch.empty_like(student.g)
        for chunk in self.chunks:
            targets = self._targets(chunk)
            logits = student.again(chunk).mul_(self.student_sharpness)
            by_crop = logits.unflatten(0, size)
            student.dot += torch.cat([torch.linalg.vecdot(s, w) for s, w in zip(by_crop, targets, strict=True)])[
                :, None
            ]
            if not with_gradients:
                continue
            difference = logits.sub_(student.lse).exp_().unflatten(0, size)
            for crop, target in enumerate(targets):
                difference[crop].mul_(self._partners(crop)).sub_(target)
            difference = difference.flatten(0, 1).mul_(self.student_sharpness / (self.terms * student.images))
            self._propagate(chunk, difference, by_rows, by_v[chunk], by_g[chunk])
        return (by_rows.unflatten(0, size), by_v, by_g[:, None]) if with_gradients else None

    def _propagate(self, chunk: slice, difference: Tensor, by_rows: Tensor, by_v: Tensor, by_g: Tensor) -> None:
        """From the gradient by the chunk's logits to those by bottlenecks, directions and gains."""
        student, v = self.student, self.student.v[chunk]
        scale, length = student.scale[chunk], student.length[chunk]
        by_weight = (difference.to(student.dtype).T @ student.rows).float()
        along = torch.linalg.vecdot(by_weight, v.float())
        torch.mul(by_weight, scale[:, None], out=by_v)
        by_v.addcmul_(v, (along * scale / length.square())[:, None], value=-1.0)
        by_g.copy_(along / length)
        by_rows += difference.mul_(scale).to(student.dtype) @ v.to(student.dtype)

    def _targets(self, chunk: slice) -> list[Tensor]:
        """For each student crop the summed probabilities [b, k] of the teachers it is compared with."""
        teacher = self.teacher
        logits = self._sharpen_teacher(teacher.again(chunk), chunk)
        probabilities = (logits - teacher.lse).exp_()
        teacher.dot += torch.linalg.vecdot(probabilities, logits)[:, None]
        mean = probabilities.mean(dim=0)
        self.mean_entropy -= torch.xlogy(mean, mean).sum()
        probabilities = probabilities.unflatten(0, (teacher.crops, teacher.images))
        total = probabilities.sum(dim=0)
        seen = [total - probabilities[crop] for crop in range(teacher.crops)]
        return seen + [total] * (self.student.crops - teacher.crops)

    def _sharpen_teacher(self, raw: Tensor, chunk: slice) -> Tensor:
        return raw.sub_(self.center[chunk]).mul_(self.teacher_sharpness)

    def loss(self) -> Tensor:
        student = self.student
        partners = self.center.new_tensor([self._partners(crop) for crop in range(student.crops)])
        normalizer = student.lse.view(student.crops, -1).mean(dim=1) * partners
        return (normalizer.sum() - student.dot.sum() / student.images) / self.terms

    def teacher_entropy(self) -> Tensor:
        return (self.teacher.lse - self.teacher.dot).mean()

    def _partners(self, crop: int) -> int:
        """How many teachers a student crop is compared with."""
        return self.teacher.crops - (crop < self.teacher.crops)
