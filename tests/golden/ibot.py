"""Runs Fovea's own engine on the golden training steps of iBOT, in one process or in several over gloo."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import IBOTConfig
from pretrain.objectives.ibot import IBOT
from pretrain.objectives.multi_crop import crop_after_crop
from tests.engine.settings import Settings
from tests.golden.case import Case, is_statistic, key_third
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
            case.check(key, results[owner][key], zero=_zero_gradients(case, key))
    check_query_and_value_biases(case, results[0])
    for rank, result in enumerate(results):
        for key, value in result.items():  # what is not per rank must be the same on all
            if "_rank" not in key and not is_statistic(key):
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"
    assert "tables" not in case.facts, f"{case.name}: the runner compares no tables of this method"


def _zero_gradients(case: Case, key: str) -> Tensor | None:
    """Marks the entries of a gradient that are zero in exact arithmetic: a batch norm takes biases away again."""
    if not key.startswith("grad/"):
        return None
    found = re.fullmatch(r"grad/head\.mlp\.(\d+)\.bias", key)
    layers = max(case.config["head"].get("nlayers", 3), 1)
    if found and str(case.config["head"].get("norm")).endswith("bn"):
        return torch.full_like(case[key], int(found[1]) % 3 == 0 and int(found[1]) < 3 * (layers - 1), dtype=torch.bool)
    return key_third(key, case[key])


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
        "pred_start_epoch", "start_warmup_value",
    )  # fmt: skip
    head = case.take(
        "head", "out_dim", "patch_out_dim", "hidden_dim", "bottleneck_dim", "nlayers", "norm", "act",
        neutral={"last_norm": None},
    )  # fmt: skip
    case.take("mask", "pred_ratio", "pred_ratio_var", "pred_shape")  # the masks are given
    case.only(
        "ctor", "head", "hyper", "g", "l", "nlocal", "batch", "steps", "world", "mask", "norm_last_layer",
        "shared_head", "shared_head_teacher", "use_masked_im_modeling", "masked_im_modeling",
    )  # fmt: skip
    shared = case.config["shared_head"], case.config["shared_head_teacher"]
    config = IBOTConfig(
        out_dim=head["out_dim"],
        # The official code takes out_dim for both where either head is shared.
        patch_out_dim=head["out_dim"] if any(shared) else head["patch_out_dim"],
        shared_head=shared[0],
        shared_head_teacher=shared[1],
        head_hidden_dim=head.get("hidden_dim", 2048),
        head_bottleneck_dim=head.get("bottleneck_dim", 256),
        head_nlayers=max(head.get("nlayers", 3), 1),
        head_norm={"syncbn": "bn", None: "none"}.get(head.get("norm"), head.get("norm")),
        head_act=head.get("act", "gelu"),
        sync_bn=head.get("norm") == "syncbn",
        use_masked_im_modeling="state/student.backbone.masked_embed" in case.tensors,
        pred_start_epoch=hyper.get("pred_start_epoch", 0),
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
    }
    if "student.backbone.masked_embed" in state:
        result["mask_token"] = state.pop("student.backbone.masked_embed")[None]
    for name, value in state.items():
        branch, _, rest = name.partition(".")
        if not (shared[branch] and rest.startswith("head.last_layer2.")) and rest not in repeated_norms(case, rest):
            name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
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
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        branch, _, rest = name.replace("teacher.average.", "teacher.").partition(".")
        base = prefix + (student if branch == "student" else "teacher.")
        result[base + rest] = value.detach().clone()
        for repeated in repeated_norms(case, rest):
            result[base + repeated] = value.detach().clone()
        if shared[branch]:
            result[base + rest.replace("head.last_layer.", "head.last_layer2.")] = value.detach().clone()
    return result


def repeated_norms(case: Case, name: str) -> list[str]:
    """All names but the first of the norm of the official head, which is one module after every hidden layer."""
    head = case.config["head"]
    found = re.fullmatch(r"(head\.mlp\.)(\d+)(\..*)", name)
    if head.get("norm") is None or found is None or int(found[2]) % 3 != 1:
        return []
    return [f"{found[1]}{3 * i + 1}{found[3]}" for i in range(1, head.get("nlayers", 3) - 1)]


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
    unseen = {"mask": None if objective.mask_token is None else mask, "mask_token": objective.mask_token}
    for branch, of, given in (("student", objective.student, unseen), ("teacher", objective.teacher.average, {})):
        features, patches = of.encode(crops[0], **given)
        cls, of_patches = of.bottlenecks(features, patches)
        result[f"{branch}_cls"] = of.head.last_layer(cls)
        result[f"{branch}_patch"] = of.head.patch_layer(of_patches).unflatten(0, patches.shape[:2])
    return result


def _batch(case: Case, step: int, world: World) -> dict[str, Tensor]:
    where = f"input/step{step}" + (f"/rank{world.rank}" if world.world_size > 1 else "")
    local = [case[f"{where}/local{i}"] for i in range(case.config["nlocal"])]
    batch = {"global": torch.stack([case[f"{where}/global{i}"] for i in range(2)], dim=1)}
    batch["mask"] = torch.stack([case[f"{where}/mask{i}"].flatten(1) for i in range(2)], dim=1)
    return batch | ({"local": torch.stack(local, dim=1)} if local else {})
