"""Runs Fovea's own engine on the golden training steps of DINO, in one process or in several over gloo."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.engine.accelerate import AccelerateEngine
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import DINOConfig
from pretrain.objectives.dino import DINO
from tests.engine.settings import Settings, schedules_of, settings
from tests.golden.case import Case, is_statistic, key_third
from tests.golden.dino import before_batch_norm, build_vit, temperatures
from tests.golden.ranks import run_ranks


class RecordingEngine(AccelerateEngine):
    """Keeps what the steps went through."""

    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]

    def _forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        losses = super()._forward(batch, step)
        self.losses.append(losses["loss"].detach())
        return losses

    def _gradients(self) -> Any:
        gradients = super()._gradients()
        self.gradients.append({fragment.name: gradient.clone() for fragment, gradient in gradients})
        return gradients


def run_steps(case: Case) -> None:
    results = run_ranks(case, train, case.config["world"])
    objective, _ = build(case)
    for key in sorted(case.due):
        owner = int(key.rpartition("_rank")[2].partition("/")[0]) if "_rank" in key else 0
        if key in results[owner]:
            case.check(key, results[owner][key], zero=zero_gradients(objective, key, case[key]))
    check_query_and_value_biases(case, results[0])
    for rank, result in enumerate(results):
        for key, value in result.items():  # what is not per rank must be the same on all
            if "_rank" not in key and not is_statistic(key):
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"
    check_groups(case, objective)


def zero_gradients(objective: DINO, key: str, tensor: Tensor) -> Tensor | None:
    """Marks the entries of a gradient that are zero in exact arithmetic."""
    if not key.startswith("grad/"):
        return None
    if "head." in key:
        return before_batch_norm(objective.student.head, key.removeprefix("grad/head."), tensor)
    return key_third(key, tensor)


def train(case: Case, world: World) -> dict[str, Tensor]:
    """All steps of one rank; everything it can say about the tensors of the case, by their keys."""
    objective, chosen = build(case)
    case_state = case.below("state")
    center = case_state.pop("dino_loss.center")
    ours = {name.replace("teacher.", "teacher.average.", 1): value for name, value in case_state.items()}
    objective.load_state_dict(ours | {"center": center})
    objective.train()
    engine = RecordingEngine(objective, **chosen, world=world, seed=0)
    engine.losses, engine.gradients = [], []

    result: dict[str, Tensor] = {}
    for step in range(case.config["steps"]):
        batch = _batch(case, step, world)
        if step == 0:
            crops, twin = objective.crops(batch), copy.deepcopy(objective)  # BatchNorm counts every forward pass
            with torch.no_grad():
                result[f"expect/step0/student_out_rank{world.rank}"] = twin.student(*crops)
                result[f"expect/step0/teacher_out_rank{world.rank}"] = twin.teacher(crops[0])
        done = engine.train_step(iter([batch]), step)
        assert not done.skipped
        objective.after_step(step + 1)
        gradients = engine.gradients[step]
        if step == 0:
            result |= {f"grad/{name.removeprefix('student.')}": value for name, value in gradients.items()}
        names = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
        result[f"expect/step{step}/loss_rank{world.rank}"] = engine.losses[step]
        result[f"expect/step{step}/grad_norms"] = torch.stack([gradients[name].norm() for name in names])
        result[f"expect/step{step}/center"] = objective.center.clone()
        for name, value in objective.state_dict().items():
            if is_statistic(name):
                official = name.replace("teacher.average.", "teacher.", 1)
                result[f"expect/step{step}/buffer_rank{world.rank}/{official}"] = value.clone()
    final = {name.replace("teacher.average.", "teacher.", 1): v for name, v in objective.state_dict().items()}
    result |= {f"expect/final/{name}": value.clone() for name, value in final.items() if name != "center"}
    return result | schedules(case, objective, chosen)


def build(case: Case) -> tuple[DINO, Settings]:
    """Objective and optimizer from the options of the case, all of which must be known."""
    hyper = case.take(
        "hyper", "optimizer", "lr", "min_lr", "epochs", "warmup_epochs", "iters_per_epoch", "weight_decay",
        "weight_decay_end", "momentum_teacher", "clip_grad", "freeze_last_layer", "warmup_teacher_temp",
        "teacher_temp", "warmup_teacher_temp_epochs", "student_temp", "center_momentum", "start_warmup_value",
    )  # fmt: skip
    head = case.take("head", "out_dim", "hidden_dim", "bottleneck_dim", "nlayers", "use_bn")
    vit = build_vit(case)
    case.only("ctor", "head", "hyper", "g", "l", "nlocal", "batch", "steps", "world", "norm_last_layer")
    config = DINOConfig(
        out_dim=head["out_dim"],
        head_hidden_dim=head.get("hidden_dim", 2048),
        head_bottleneck_dim=head.get("bottleneck_dim", 256),
        head_nlayers=max(head.get("nlayers", 3), 1),
        sync_bn=False,  # the official code synchronizes them, which on CPUs it cannot
        use_bn_in_head=head.get("use_bn", False),
        norm_last_layer=case.config["norm_last_layer"],
        teacher_temp=hyper["teacher_temp"],
        warmup_teacher_temp=hyper["warmup_teacher_temp"],
        warmup_teacher_temp_epochs=hyper["warmup_teacher_temp_epochs"],
        momentum_teacher=hyper["momentum_teacher"],
        student_temp=hyper.get("student_temp", 0.1),
        center_momentum=hyper.get("center_momentum", 0.9),
        freeze_last_layer_epochs=hyper["freeze_last_layer"],
        drop_path_rate=0.0,
        local_crops_number=case.config["nlocal"],
        local_crops_size=case.config["l"],
    )
    per_epoch = hyper["iters_per_epoch"]
    horizon = Horizon(total_steps=hyper["epochs"] * per_epoch, steps_per_epoch=per_epoch)
    return DINO(config, vit, horizon), optim_settings(hyper)


def optim_settings(hyper: dict[str, Any]) -> Settings:
    """Of the official code's flags."""
    per_epoch = hyper["iters_per_epoch"]
    return settings(
        name=hyper["optimizer"],
        lr=hyper["lr"],
        min_lr=hyper["min_lr"],
        total_steps=hyper["epochs"] * per_epoch,
        warmup_steps=hyper["warmup_epochs"] * per_epoch,
        warmup_form="closed",
        warmup_lr=hyper.get("start_warmup_value", 0.0),
        weight_decay=hyper["weight_decay"],
        weight_decay_end=hyper["weight_decay_end"],
        clip_grad=hyper["clip_grad"] or None,
        clip_mode="per_tensor",
    )


def _batch(case: Case, step: int, world: World) -> dict[str, Tensor]:
    where = f"input/step{step}" + (f"/rank{world.rank}" if world.world_size > 1 else "")
    local = [case[f"{where}/local{i}"] for i in range(case.config["nlocal"])]
    batch = {"global": torch.stack([case[f"{where}/global{i}"] for i in range(2)], dim=1)}
    return batch | ({"local": torch.stack(local, dim=1)} if local else {})


def schedules(case: Case, objective: Any, chosen: Settings) -> dict[str, Tensor]:
    steps, epochs = range(chosen["plan"].total_steps), case.config["hyper"]["epochs"]
    rates = schedules_of(chosen)
    tables = {
        "lr_schedule": [rates.lr_at(step) for step in steps],
        "wd_schedule": [rates.weight_decay_at(step) for step in steps],
        "momentum_schedule": [objective.momentum(step) for step in steps],
    }
    result = {f"expect/{name}": torch.tensor(values, dtype=torch.float64) for name, values in tables.items()}
    return result | {"expect/teacher_temp_schedule": temperatures(case.config["hyper"], epochs=epochs)}


def check_groups(case: Case, objective: Any) -> None:
    """Weight decay of every parameter as in the table of the case."""
    (table,) = (t for title, t in case.facts["tables"].items() if title.startswith("optimizer group"))
    groups = {
        name.removeprefix("student."): 0 if group["weight_decay_scale"] else 1
        for group in objective.param_groups()
        for name in group["names"]
    }
    assert groups == table, f"{case.name}: weight decay differs for {sorted(set(groups.items()) ^ set(table.items()))}"


def check_query_and_value_biases(case: Case, result: dict[str, Tensor]) -> None:
    """Hold the q and v thirds of qkv biases to the tolerance of the other weights.

    AdamW turns the rounding noise of the key third into steps as large as the learning rate, so the tolerance of the
    whole tensor is wide.
    """
    names = [f"expect/final/{key}" for key in case.below("expect/final")]
    strict = [case.tolerance(name)[0] for name in names if not name.endswith("qkv.bias")]
    for name in names:
        mark = key_third(name, case[name])
        if mark is not None:
            off = (result[name] - case[name]).abs()[~mark].max().item()
            if not off <= 2 * max(strict) + 1e-5 * case[name].abs().max().item():
                case.mismatches.append(f"{name}: query or value part off by {off:.3g}, allowed {2 * max(strict):.3g}")
