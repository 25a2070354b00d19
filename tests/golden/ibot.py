"""Runs Fovea's own engine on the golden training steps of iBOT, in one process or in several over gloo."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import IBOTConfig
from pretrain.objectives.ibot import IBOT
from pretrain.objectives.multi_crop import crop_after_crop
from tests.engine.settings import Settings
from tests.golden.case import Case, key_third
from tests.golden.dino import build_vit, temperatures
from tests.golden.dino_steps import RecordingEngine, check_query_and_value_biases, optim_settings, schedules
from tests.golden.ranks import run_ranks

PARTS = {"cls": "loss_cls", "patch": "loss_patch", "loss": "loss"}


class PartsEngine(RecordingEngine):
    """Also keeps the parts of the loss."""

    parts: list[dict[str, Tensor]]

    def _forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        losses = super()._forward(batch, step)
        self.parts.append({name: losses[key].detach() for name, key in PARTS.items()})
        return losses


def run_steps(case: Case) -> None:
    results = run_ranks(case, train, case.config["world"])
    for key in sorted(case.due):
        owner = int(key.rpartition("_rank")[2]) if "_rank" in key else 0
        if key in results[owner]:
            zero = key_third(key, case[key]) if key.startswith("grad/") else None
            case.check(key, results[owner][key], zero=zero)
    check_query_and_value_biases(case, results[0])
    for rank, result in enumerate(results):
        for key, value in result.items():  # what is not per rank must be the same on all
            if "_rank" not in key:
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"
    assert "tables" not in case.facts, f"{case.name}: the runner compares no tables of this method"


def train(case: Case, world: World) -> dict[str, Tensor]:
    """All steps of one rank; everything it can say about the tensors of the case, by their keys."""
    objective, chosen = build(case)
    _check_start(objective)
    objective.load_state_dict(ours(case))
    objective.train()
    engine = PartsEngine(objective, **chosen, world=world, seed=0)
    engine.losses, engine.gradients, engine.parts = [], [], []
    rank, result = f"_rank{world.rank}", {}
    for step in range(case.config["steps"]):
        batch = _batch(case, step, world)
        if step == 0:
            given = _logits(copy.deepcopy(objective), batch)
            result |= {f"expect/step0/{name}{rank}": value for name, value in given.items()}
        done = engine.train_step(iter([batch]), step)
        assert not done.skipped
        objective.after_step(step + 1)
        if step == 0:
            result |= theirs("grad/", engine.gradients[0], case, student="")
        result |= {f"expect/step{step}/loss_{name}{rank}": value for name, value in engine.parts[step].items()}
        result[f"expect/step{step}/center"] = objective.center.clone()
        result[f"expect/step{step}/center2"] = objective.patch_center[None].clone()
    state = {name: value for name, value in objective.state_dict().items() if "center" not in name}
    result |= theirs("expect/final/", state, case)
    second = case.config["hyper"] | {
        "warmup_teacher_temp": case.config["hyper"]["warmup_teacher_patch_temp"],
        "teacher_temp": case.config["hyper"]["teacher_patch_temp"],
    }
    epochs = case.config["hyper"]["epochs"]
    return result | schedules(case, objective, chosen) | {
        "expect/teacher_temp2_schedule": temperatures(second, epochs=epochs)
    }  # fmt: skip


def build(case: Case) -> tuple[IBOT, Settings]:
    """Objective and optimizer from the options of the case, all of which must be known."""
    hyper = case.take(
        "hyper", "optimizer", "lr", "min_lr", "epochs", "warmup_epochs", "iters_per_epoch", "weight_decay",
        "weight_decay_end", "momentum_teacher", "clip_grad", "freeze_last_layer", "warmup_teacher_temp",
        "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp", "warmup_teacher_temp_epochs",
        "student_temp", "center_momentum", "center_momentum2", "lambda1", "lambda2",
        neutral={"pred_start_epoch": 0},
    )  # fmt: skip
    head = case.take(
        "head", "out_dim", "patch_out_dim", "hidden_dim", "bottleneck_dim", "nlayers", neutral={"norm": None}
    )
    case.take("mask", "pred_ratio", "pred_ratio_var", "pred_shape")  # the masks are given
    run = {"seed", "save_patch", "g", "batch", "steps", "world", "mask"}
    known = {"ctor", "head", "hyper", "l", "nlocal", "norm_last_layer", "shared_head", "shared_head_teacher"}
    unknown = set(case.config) - run - known
    assert not unknown, f"{case.name}: config has options the runner does not know: {sorted(unknown)}"
    shared = case.config["shared_head"], case.config["shared_head_teacher"]
    config = IBOTConfig(
        out_dim=head["out_dim"],
        # The official code takes out_dim for both where either head is shared.
        patch_out_dim=head["out_dim"] if any(shared) else head["patch_out_dim"],
        shared_head=shared[0],
        shared_head_teacher=shared[1],
        head_hidden_dim=head["hidden_dim"],
        head_bottleneck_dim=head["bottleneck_dim"],
        head_nlayers=head.get("nlayers", 3),
        norm_last_layer=case.config["norm_last_layer"],
        teacher_temp=hyper["teacher_temp"],
        warmup_teacher_temp=hyper["warmup_teacher_temp"],
        teacher_patch_temp=hyper["teacher_patch_temp"],
        warmup_teacher_patch_temp=hyper["warmup_teacher_patch_temp"],
        warmup_teacher_temp_epochs=hyper["warmup_teacher_temp_epochs"],
        momentum_teacher=hyper["momentum_teacher"],
        student_temp=hyper.get("student_temp", 0.1),
        center_momentum=hyper.get("center_momentum", 0.9),
        patch_center_momentum=hyper.get("center_momentum2", 0.9),
        lambda1=hyper["lambda1"],
        lambda2=hyper["lambda2"],
        freeze_last_layer_epochs=hyper["freeze_last_layer"],
        drop_path_rate=0.0,
        local_crops_number=case.config["nlocal"],
        local_crops_size=case.config["l"],
    )
    per_epoch = hyper["iters_per_epoch"]
    horizon = Horizon(total_steps=hyper["epochs"] * per_epoch, steps_per_epoch=per_epoch)
    return IBOT(config, build_vit(case), horizon), optim_settings(hyper)


def ours(case: Case) -> dict[str, Tensor]:
    """The official state under our names."""
    state = case.below("state")
    shared = {"student": case.config["shared_head"], "teacher": case.config["shared_head_teacher"]}
    result = {
        "center": state.pop("ibot_loss.center"),
        "patch_center": state.pop("ibot_loss.center2")[0],
        "mask_token": state.pop("student.backbone.masked_embed")[None],
    }
    for name, value in state.items():
        branch, _, rest = name.partition(".")
        if not (shared[branch] and rest.startswith("head.last_layer2.")):
            result[name.replace("teacher.", "teacher.average.", 1)] = value
    return result


def theirs(prefix: str, values: dict[str, Tensor], case: Case, *, student: str = "student.") -> dict[str, Tensor]:
    """Our tensors under the official names; those of a shared head under both of its names."""
    shared = {"student": case.config["shared_head"], "teacher": case.config["shared_head_teacher"]}
    result = {}
    for name, value in values.items():
        if name == "mask_token":
            result[f"{prefix}{student}backbone.masked_embed"] = value[0].detach().clone()
            continue
        branch, _, rest = name.replace("teacher.average.", "teacher.").partition(".")
        base = prefix + (student if branch == "student" else "teacher.")
        result[base + rest] = value.detach().clone()
        if shared[branch]:
            result[base + rest.replace("head.last_layer.", "head.last_layer2.")] = value.detach().clone()
    return result


def _check_start(objective: IBOT) -> None:
    """A teacher with a shared head starts with the patch prototypes of its student."""
    student, teacher = objective.student.head, objective.teacher.average.head
    assert torch.equal(teacher.patch_layer.weight_v, student.patch_layer.weight_v)
    first = student.patch_layer if teacher.shared else student.last_layer
    assert torch.equal(teacher.last_layer.weight_v, first.weight_v)


@torch.no_grad()
def _logits(objective: IBOT, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the official heads return: class tokens of the global crops, and all patches."""
    crops, mask = objective.crops(batch), crop_after_crop(batch["mask"])
    result = {}
    for branch, of, given in (
        ("student", objective.student, {"mask": mask, "mask_token": objective.mask_token}),
        ("teacher", objective.teacher.average, {}),
    ):
        features, patches = of.encode(crops[0], **given)
        result[f"{branch}_cls"] = of.head.last_layer(of.head.bottleneck(features))
        result[f"{branch}_patch"] = of.head.patch_layer(of.head.bottleneck(patches))
    return result


def _batch(case: Case, step: int, world: World) -> dict[str, Tensor]:
    where = f"input/step{step}" + (f"/rank{world.rank}" if world.world_size > 1 else "")
    local = [case[f"{where}/local{i}"] for i in range(case.config["nlocal"])]
    batch = {"global": torch.stack([case[f"{where}/global{i}"] for i in range(2)], dim=1)}
    batch["mask"] = torch.stack([case[f"{where}/mask{i}"].flatten(1) for i in range(2)], dim=1)
    return batch | ({"local": torch.stack(local, dim=1)} if local else {})
