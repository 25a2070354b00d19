"""Runs the losses of DINOv2 on given logits. Prototypes are an identity here, so that bottlenecks are the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses.center import PendingMean
from pretrain.models.losses.koleo import koleo_loss, nearest
from pretrain.models.losses.patch_loss import mask_weights, patch_loss
from pretrain.models.losses.prototype_stream import StreamedLogits, StreamedTargets
from pretrain.models.losses.sinkhorn import sinkhorn_center
from tests.golden.case import Case
from tests.golden.ranks import run_ranks

CENTERS = ("dino_center", "ibot_center")  # the same on every rank


def run_losses(case: Case) -> None:
    known = {"seed", "world", "B", "K", "N", "P", "D", "ncrops", "n_iter", "teacher_temp", "student_temp", "cm"}
    case.only(*known)
    results = run_ranks(case, train, case.config["world"])
    for key in sorted(case.due):
        owner = int(key.rpartition("_rank")[2]) if "_rank" in key else 0
        if key in results[owner]:
            case.check(key, results[owner][key])


def train(case: Case, world: World) -> dict[str, Tensor]:
    """Everything one rank can say about the tensors of the case, by their keys."""
    several = case.config["world"] > 1
    given = case.below(f"input/rank{world.rank}" if several else "input")
    result = _cls(case, given) | _patches(case, given) | _koleo(given["features"])
    rank = f"_rank{world.rank}" if several else ""
    return {f"expect/{name}" + ("" if name in CENTERS else rank): value for name, value in result.items()}


def _cls(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    temp, center = case.config["teacher_temp"], case["state/dino_center"].clone()
    result = _centering(case, center, given["teacher_cls"], given["teacher_cls_2"], prefix="dino")
    teacher, layer = given["teacher_cls"], identity(given["teacher_cls"])
    balanced = sinkhorn_center(teacher, layer, temp=temp, iterations=case.config["n_iter"])
    result["dino_sinkhorn"] = assignments(teacher, balanced, temp)
    # The official loss sums over all pairs of the crops it is given; what becomes of the pairs is its caller's.
    students = [given[f"student_cls{i}"].clone().requires_grad_() for i in range(case.config["ncrops"])]
    weights = torch.full((case.config["B"],), 1 / case.config["B"])
    pairs = [
        patch_loss(student, layer, crop, layer, balanced, weights, **_temps(case)).loss
        for student in students
        for crop in teacher.split(case.config["B"])
    ]
    loss = torch.stack(pairs).sum()
    gradients = torch.autograd.grad(loss, students)
    result |= {f"dino_loss_dstudent{i}": gradient for i, gradient in enumerate(gradients)}
    return result | {"dino_loss": loss}


def _patches(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    temp, center = case.config["teacher_temp"], case["state/ibot_center"][0].clone()
    result = _centering(case, center, given["teacher_patch_masked"], given["teacher_patch_masked_2"], prefix="ibot")
    result["ibot_center"] = result["ibot_center"][None]
    teacher, mask = given["teacher_patch_masked"], given["masks"]
    layer = identity(teacher)
    balanced = sinkhorn_center(teacher, layer, temp=temp, iterations=case.config["n_iter"])
    result["ibot_sinkhorn"] = assignments(teacher, balanced, temp)
    padded = given["student_patch_masked"].clone().requires_grad_()  # rows beyond the masked ones are not read
    weights = mask_weights(mask) / len(mask)
    for name, factor in (("", 1.0), ("_halfweight", 0.5)):
        student = padded[: len(teacher)]
        of = patch_loss(student, layer, teacher, layer, balanced, weights * factor, **_temps(case))
        result[f"ibot_forward_masked{name}"] = of.loss
        if not name:
            (result["ibot_forward_masked_dstudent"],) = torch.autograd.grad(of.loss, padded)
    # Here the teacher's assignments are given; their logarithm times the temperature are logits that have them.
    full = given["teacher_patch_full"][mask].log() * temp
    student, none = given["student_patch_full"][mask], torch.zeros(full.shape[1])
    result["ibot_forward"] = patch_loss(student, layer, full, layer, none, weights, **_temps(case)).loss
    return result


def _centering(case: Case, center: Tensor, first: Tensor, second: Tensor, *, prefix: str) -> dict[str, Tensor]:
    """Two batches: each is assigned around the centre that the batches before left."""
    temp, result = case.config["teacher_temp"], {}
    for name, logits in (("", first), ("_2", second)):
        result[f"{prefix}_softmax_center{name}"] = assignments(logits, center[0], temp)
        pending = PendingMean()
        # The official code averages the means of the ranks, however many patches each has masked.
        pending.add(identity(logits).sum_of_logits(logits) / len(logits), rows=1)
        pending.move(center, case.config["cm"])
    return result | {f"{prefix}_center": center}


def _koleo(features: Tensor) -> dict[str, Tensor]:
    features = features.clone().requires_grad_()
    loss = koleo_loss(features)
    (gradient,) = torch.autograd.grad(loss, features)
    rows = torch.nn.functional.normalize(features.detach(), dim=-1)
    return {"koleo": loss, "koleo_dfeatures": gradient, "koleo_nn": nearest(rows, rows, first=0)[:, 0]}


def identity(logits: Tensor) -> Prototypes:
    """Prototypes whose logits are the bottlenecks themselves."""
    count = logits.shape[-1]
    layer = Prototypes(count, count, unit_length=True)
    with torch.no_grad():
        layer.weight_v.copy_(torch.eye(count))
    return layer


@torch.no_grad()
def assignments(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """What the teacher's rows are assigned to, [n, K]."""
    layer, everything = identity(logits), slice(0, logits.shape[1])
    targets = StreamedTargets(StreamedLogits(logits, layer, logits.dtype), center, temp)
    targets.first(everything)
    return targets.probabilities(everything)


def _temps(case: Case) -> dict[str, float]:
    return {name: case.config[name] for name in ("student_temp", "teacher_temp")}
