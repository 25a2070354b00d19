"""Cross-entropy of student and teacher per patch, storing no logits (Zhou et al. 2022, "iBOT", eq. 2).

Rows are masked patches of a batch, with weights such that images count equally, however many of their patches are
masked. The logits of 5,000 rows x 65536 prototypes take 1.3 GB, and autograd would keep several such tensors; here they
are streamed (`pretrain.models.losses.prototype_stream`).
"""

from __future__ import annotations

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


class PatchLoss(NamedTuple):
    """`loss` is differentiable; the others are not.

    Attributes:
        loss: weighted sum over rows of the cross-entropy.
        teacher_sum: [K] sum over rows of the teacher's raw logits, for the centre.
        teacher_entropy: weighted sum over rows of the entropy of the teacher's assignment, in nats: the
            lower bound of the loss.
    """

    loss: Tensor
    teacher_sum: Tensor
    teacher_entropy: Tensor


def patch_loss(
    student: Tensor,
    student_layer: Prototypes,
    teacher: Tensor,
    teacher_layer: Prototypes,
    center: Tensor,
    weights: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
) -> PatchLoss:
    """Cross-entropy of each student row with the teacher's row of the same patch; 0 without rows.

    Products are computed in the dtype of autocast, all else in fp32. Backward can run only once.

    Args:
        student, teacher: bottleneck features [n, D]. center: [K], subtracted from the teacher's logits. weights: [n].
    """
    dtype, weights = product_dtype(student), weights.float()[:, None]

    def compute(with_gradients: bool) -> tuple[tuple[Tensor, ...], Gradients | None]:
        logits = StreamedLogits(student, student_layer, dtype)
        of_teacher = StreamedLogits(teacher, teacher_layer, dtype)
        targets = StreamedTargets(of_teacher, center.float(), teacher_temp)
        sharpness = 1 / student_temp
        chunks = chunks_of(len(center), 2 * len(student), center.device)
        for chunk in chunks:
            targets.first(chunk)
            logits.add_to_lse(logits.first(chunk).mul_(sharpness))
        by_rows = torch.zeros_like(logits.rows, dtype=torch.float32)
        by_v = torch.empty_like(logits.v, dtype=torch.float32) if with_gradients else by_rows
        by_g = torch.empty_like(logits.g)
        for chunk in chunks:
            target = targets.probabilities(chunk)
            sharp = logits.again(chunk).mul_(sharpness)
            logits.dot += torch.linalg.vecdot(sharp, target)[:, None]
            if with_gradients:
                difference = sharp.sub_(logits.lse).exp_().sub_(target).mul_(weights * sharpness)
                logits.propagate(chunk, difference, by_rows, by_v[chunk], by_g[chunk])
        loss = (weights * (logits.lse - logits.dot)).sum()
        entropy = (weights * targets.entropy()).sum()
        return (loss, targets.sum, entropy), (by_rows, by_v, by_g[:, None]) if with_gradients else None

    return PatchLoss(*differentiable_once(student, student_layer.weight_v, student_layer.weight_g, compute))


def mask_weights(mask: Tensor) -> Tensor:
    """1 / number of masked patches of the crop, for every True of mask [c, N] in row-major order."""
    return (1.0 / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand(mask.shape)[mask]
