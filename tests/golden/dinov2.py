"""Runs Fovea on the golden cases of the combined objective of DINOv2."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import DINOv2Config
from pretrain.objectives.dinov2 import DINOv2
from tests.golden import dinov2_vit
from tests.golden.case import Case, key_third

PARTS = {
    "total_loss": "loss",
    "dino_global_crops_loss": "loss_cls_global",
    "dino_local_crops_loss": "loss_cls_local",
    "ibot_loss": "loss_patch",
    "koleo_loss": "loss_koleo",
}


class GivenSchedules(DINOv2):
    """Takes the temperatures and the momentum of the case."""

    temps: list[float]
    given_momentum: float

    def teacher_temp(self, step: int) -> float:
        return self.temps[step]

    def momentum(self, step: int) -> float:
        return self.given_momentum


def run_objective(case: Case) -> None:
    """Calls of the objective with an update of the teacher between them; the student does not change."""
    objective = build(case)
    centers = {name: value for name, value in objective.state_dict().items() if "center" in name}
    objective.load_state_dict(centers | ours(case))  # Sinkhorn-Knopp has no centres of its own
    objective.train()
    gradients = None
    for step in range(len(objective.temps)):
        batch = _batch(case, step)
        losses = objective(batch, step)
        if gradients is None:
            losses["loss"].backward()
            gradients = {name: parameter.grad for name, parameter in objective.named_parameters()}
        where = f"expect/step{step}"
        for name, part in PARTS.items():
            if f"{where}/{name}" in case.due:
                case.check(f"{where}/{name}", losses[part])
        objective.after_step(step + 1)
        if step == 0:
            for name in case.below("expect/teacher_after_ema"):
                follower = objective.state_dict()[ours_of(case, f"teacher.{name}")]
                case.check(f"expect/teacher_after_ema/{name}", follower)
    assert gradients is not None
    for name, expect in case.below("grad").items():
        gradient = gradients["mask_token" if name == "backbone.mask_token" else ours_of(case, f"student.{name}")]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient.view(expect.shape), zero=key_third(name, expect))
    case.check("expect/final/dino_loss.center", objective.center)
    if case.config["w_ibot"]:  # else the official code has no such centre: none that it moves
        case.check("expect/final/ibot_patch_loss.center", objective.patch_center[None])
    case.due.discard("expect/final/ibot_patch_loss.center")


def build(case: Case) -> GivenSchedules:
    """The objective from the options of the case, all of which must be known."""
    known = {"seed", "centering", "batch", "nlocal", "g", "l", "ctor", "K", "P", "hid", "bot", "separate_head", "koleo"}
    case.only(*known, "w_dino", "w_ibot", "teacher_temp", "m", "nlayers")
    sizes = {"hidden": case.config["hid"], "bottleneck": case.config["bot"], "layers": case.config.get("nlayers", 3)}
    config = DINOv2Config(
        out_dim=case.config["K"],
        head_hidden_dim=sizes["hidden"],
        head_bottleneck_dim=sizes["bottleneck"],
        head_nlayers=sizes["layers"],
        separate_patch_head=case.config["separate_head"],
        patch_out_dim=case.config["P"],
        patch_hidden_dim=sizes["hidden"],
        patch_bottleneck_dim=sizes["bottleneck"],
        patch_nlayers=sizes["layers"],
        centering=case.config["centering"],
        dino_weight=case.config["w_dino"],
        ibot_weight=case.config["w_ibot"],
        koleo_weight=case.config["koleo"],
        drop_path_rate=0.0,
        local_crops_number=case.config["nlocal"],
        local_crops_size=case.config["l"],
    )
    objective = GivenSchedules(config, dinov2_vit.new_vit(case), Horizon(total_steps=10, steps_per_epoch=1))
    objective.temps, objective.given_momentum = case.config["teacher_temp"], case.config["m"]
    return objective


def ours(case: Case) -> dict[str, Tensor]:
    """The official state under our names; its teacher's mask token is never read."""
    state = {ours_of(case, name): value for name, value in case.below("state").items()}
    state.pop("teacher.average.backbone.mask_token")
    result = {"mask_token": state.pop("student.backbone.mask_token")[None]}
    if "dino_loss.center" in state:
        result |= {"center": state.pop("dino_loss.center"), "patch_center": state.pop("ibot_patch_loss.center")[0]}
    return state | result


def ours_of(case: Case, name: str) -> str:
    """Our name of a parameter of the official student or teacher."""
    branch, mark, inner = name.partition("backbone.")
    inner = dinov2_vit.ours(inner, chunks=dinov2_vit.chunks(case)) if mark else inner
    return branch.replace("teacher.", "teacher.average.") + mark + inner


def _batch(case: Case, step: int) -> dict[str, Tensor]:
    """The batch of the official collate function, which is crop after crop."""
    where, local, images = f"input/step{step}", case.config["nlocal"], case.config["batch"]
    mask = case[f"{where}/collated_masks"]
    weights = case[f"{where}/masks_weight"]
    assert torch.equal(mask.flatten().nonzero().flatten(), case[f"{where}/mask_indices_list"])
    assert torch.equal((1 / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)[mask], weights)
    batch = {
        "global": case[f"{where}/collated_global_crops"].unflatten(0, (2, images)).transpose(0, 1),
        "mask": mask.unflatten(0, (2, images)).transpose(0, 1),
    }
    if local:
        batch["local"] = case[f"{where}/collated_local_crops"].unflatten(0, (local, images)).transpose(0, 1)
    return batch
