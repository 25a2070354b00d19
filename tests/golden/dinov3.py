"""Runs the losses of Fovea's DINOv2 on the golden cases of DINOv3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.core import distributed
from pretrain.core.distributed import World
from pretrain.models.losses.koleo import koleo_loss
from pretrain.models.losses.patch_loss import mask_weights, patch_loss
from pretrain.models.losses.sinkhorn import sinkhorn_center
from pretrain.models.teachers.gram_teacher import compared, gram_loss, to_grid
from tests.golden.case import Case
from tests.golden.dinov2_losses import assignments, identity
from tests.golden.ranks import run_ranks


def run_gram(case: Case) -> None:
    case.only("shape", "grid_teacher", "variants", "resize")
    for index, variant in enumerate(case.config["variants"]):
        given: dict[str, Any] = dict(variant)
        level, tokens = "image" if given.pop("img_level") else "batch", given.pop("tokens")
        both, teacher_only = given.pop("remove_neg"), given.pop("remove_only_teacher_neg")
        negatives = "zero" if both else "zero_teacher" if teacher_only else "keep"
        normalize = given.pop("apply_norm")
        assert not given, f"{case.name}: options that the runner does not know: {sorted(given)}"
        student = case["input/student"].clone().requires_grad_()
        pair = [compared(x, case["input/masks"], level=level, tokens=tokens) for x in (student, case["input/teacher"])]
        loss = gram_loss(pair[0], pair[1], normalize=normalize, negatives=negatives)
        (gradient,) = torch.autograd.grad(loss, student)
        case.check(f"expect/variant{index}", loss)
        case.check(f"grad/variant{index}/student", gradient)
    side, large = round(case.config["shape"][1] ** 0.5), case.config["grid_teacher"]
    for how, antialias in case.config["resize"]:
        assert how == "bicubic", f"{case.name}: {how}"
        resized = to_grid(case["input/teacher_large"], (large, large), (side, side), antialias=antialias)
        case.check(f"expect/resized_{how}{'_antialias' if antialias else ''}", resized)


def run_losses(case: Case) -> None:
    known = ("B", "N", "K", "P", "D", "local", "mask_p", "teacher_temp", "student_temp", "n_iter", "koleo", "world")
    case.only(*known)
    ranks = {key.split("/")[1] for key in case.tensors if key.startswith("input/rank")}
    results = run_ranks(case, losses_of_rank, max(1, len(ranks)))
    for rank, result in enumerate(results):
        for key, value in result.items():
            kind, _, name = key.partition("/")
            case.check(f"{kind}/rank{rank}/{name}" if ranks else key, value)


def losses_of_rank(case: Case, world: World) -> dict[str, Tensor]:
    """Everything one rank can say about the tensors of the case, by their keys without the rank."""
    given = case.below(f"input/rank{world.rank}") if world.world_size > 1 else case.below("input")
    return _class(case, given) | _patches(case, given) | _koleo(case, given["features"])


def _class(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    teacher, layer, temps = given["teacher_cls"], identity(given["teacher_cls"]), _temps(case)
    balanced = sinkhorn_center(teacher, layer, temp=temps["teacher_temp"], iterations=case.config["n_iter"])
    result = {"expect/dino_sinkhorn": assignments(teacher, balanced, temps["teacher_temp"])}
    targets, weights = teacher.split(case.config["B"]), torch.full((case.config["B"],), 1 / case.config["B"])
    for name, key, diagonal in (
        ("dino_global", "student_global", False),
        ("dino_global_diagonal", "student_global", True),
        ("dino_local", "student_local", True),
    ):
        students = given[key].clone().requires_grad_()
        pairs = [
            patch_loss(student, layer, target, layer, balanced, weights, **temps).loss
            for i, student in enumerate(students)
            for j, target in enumerate(targets)
            if diagonal or i != j
        ]
        loss = torch.stack(pairs).mean()
        (gradient,) = torch.autograd.grad(loss, students)
        result |= {f"expect/{name}": loss, f"grad/{name}/{key}": gradient}
    return result


def _patches(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    teacher, mask, temps = given["teacher_patch"], given["masks"], _temps(case)
    layer = identity(teacher)
    balanced = sinkhorn_center(teacher, layer, temp=temps["teacher_temp"], iterations=case.config["n_iter"])
    student = given["student_patch"].clone().requires_grad_()
    weights = mask_weights(mask)
    loss = patch_loss(student, layer, teacher, layer, balanced, weights / len(mask), **temps).loss
    (gradient,) = torch.autograd.grad(loss, student)
    return {
        "expect/ibot_sinkhorn": assignments(teacher, balanced, temps["teacher_temp"]),
        "expect/ibot_total_masked": distributed.all_reduce_sum(torch.tensor([len(teacher)])),
        "expect/masks_weight": weights,
        "expect/ibot": loss,
        "grad/ibot/student_patch": gradient,
    }


def _koleo(case: Case, features: Tensor) -> dict[str, Tensor]:
    result = {}
    for neighbours, group in [(None, None), *case.config["koleo"]]:
        name = "koleo" if neighbours is None else f"koleo_top{neighbours}" + (f"_group{group}" if group else "")
        rows = features.clone().requires_grad_()
        scope = "rank" if neighbours is None else "all"
        loss = koleo_loss(rows, scope=scope, neighbours=neighbours or 1, group=group)
        (gradient,) = torch.autograd.grad(loss, rows)
        result |= {f"expect/{name}": loss, f"grad/{name}/features": gradient}
    return result


def _temps(case: Case) -> dict[str, float]:
    return {name: case.config[name] for name in ("student_temp", "teacher_temp")}
