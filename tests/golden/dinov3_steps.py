"""Runs Fovea's own engine on the golden training steps of DINOv3, in one process or in several over gloo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.engine.accelerate import AccelerateEngine
from pretrain.objectives.base import Horizon
from pretrain.objectives.dinov2 import DINOv2
from tests.engine.settings import Settings, schedules_of
from tests.golden.case import Case
from tests.golden.dinov3_options import Options
from tests.golden.dinov3_vit import KNOWN, drawn_uniforms, drops_of_blocks, new_vit, official, ours
from tests.golden.ranks import run_ranks

HEADS = ("dino_head", "ibot_head")


class RecordingEngine(AccelerateEngine):
    """Keeps the losses and the gradients of the last step."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def _forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        self.losses = super()._forward(batch, step)
        return self.losses

    def _gradients(self) -> Any:
        gradients = super()._gradients()
        self.gradients = {fragment.name: gradient.clone() for fragment, gradient in gradients}
        return gradients


def run_schedules(case: Case) -> None:
    case.only("variants")
    for name, given in case.config["variants"].items():
        options = Options(case, given)
        size = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8, "img_size": 16}
        small = {"dino.head_n_prototypes": 2, "ibot.head_n_prototypes": 2, "student.drop_path_rate": 0.0}
        objective = new_objective(Options(case, given | small), size)
        for key in case.below(f"expect/{name}"):
            count = len(case[f"expect/{name}/{key}"])
            values = [scheduled(objective, options.optim(), step)[key] for step in range(count)]
            case.check(f"expect/{name}/{key}", torch.tensor(values, dtype=torch.float64))
    case.due.discard("expect/unused")


def scheduled(objective: DINOv2, chosen: Settings, step: int) -> dict[str, float]:
    """Everything that depends on the step alone."""
    rates = schedules_of(chosen)
    frozen = max(group["frozen_steps"] for group in objective.param_groups())
    return {
        "lr": rates.lr_at(step),
        "last_layer_lr": 0.0 if step < frozen else rates.lr_at(step),
        "weight_decay": rates.weight_decay_at(step),
        "momentum": objective.momentum(step),
        "teacher_temp": objective.teacher_temp(step),
    }


def new_objective(options: Options, size: dict[str, Any]) -> DINOv2:
    constructor = options.constructor(size)
    unknown = set(constructor) - set(KNOWN)
    assert not unknown, f"{options.case.name}: the student has options that the runner does not know: {unknown}"
    horizon = Horizon(total_steps=options.total_steps, steps_per_epoch=options.epoch_steps)
    return DINOv2(options.objective(), new_vit(constructor), horizon)


def run_steps(case: Case) -> None:
    case.only("batch", "steps", "first_iteration", "vit", "cfg")
    ranks = {key.split("/")[1] for key in case.tensors if key.startswith("input/rank")}
    results = run_ranks(case, train, max(1, len(ranks)))
    for rank, result in enumerate(results):
        for key, value in result.items():
            own = key.startswith("expect/step") and ranks
            name = key.replace("expect/", f"expect/rank{rank}/", 1) if own else key
            if name in case.tensors:
                case.check(name, value)
            if not own:  # what is not per rank must be the same on all
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"
    check_groups(case, new_objective(Options(case, case.config["cfg"]), case.config["vit"]))


def train(case: Case, world: World) -> dict[str, Tensor]:
    """All steps of one rank; everything it can say about the tensors of the case, by their keys without the rank."""
    options = Options(case, case.config["cfg"], processes=world.world_size)
    objective, chosen = new_objective(options, case.config["vit"]), options.optim()
    state, first = case.below("state"), case.config["first_iteration"]
    own = objective.state_dict()
    objective.load_state_dict({n: ours(state, official_name(n)).reshape(like.shape) for n, like in own.items()})
    objective.train()
    engine = RecordingEngine(objective, **chosen, world=world, seed=0)
    unread = {name: value for name, value in state.items() if is_unread(name, objective)}
    result: dict[str, Tensor] = {}
    for s in range(case.config["steps"]):
        step = first + s
        done = engine.train_step(iter([_batch(case, s, options, world)]), step)
        assert not done.skipped
        momentum = objective.momentum(step)
        objective.after_step(step + 1)
        token = objective.mask_token.detach()[0]
        for name in [name for name in unread if name.startswith("teacher.")]:
            student = token if name.endswith("mask_token") else state[name.replace("teacher.", "student.", 1)]
            unread[name] = momentum * unread[name] + (1 - momentum) * student
        result |= {f"expect/step{s}/{name}": value for name, value in _of_step(objective, engine, step).items()}
        result |= {f"expect/step{s}/{n}": torch.tensor(v) for n, v in scheduled(objective, chosen, step).items()}
        if s == 0:
            named = {official_name(n).removeprefix("student."): value for n, value in engine.gradients.items()}
            result |= {f"grad/step0/{n}": official(named, n, like) for n, like in case.below("grad/step0").items()}
    refreshed = options.refreshes(first + case.config["steps"])
    if objective.gram_teacher is not None and refreshed:
        objective.gram_teacher.become(objective.backbone)
    return result | _after(case, objective, unread, refreshed=refreshed)


def official_name(name: str) -> str:
    """The place in the official state of a tensor of the objective, up to what `ours` knows."""
    if name == "mask_token":
        return "student.backbone.mask_token"
    if name in ("center", "patch_center"):
        return {"center": "dino_loss.center", "patch_center": "ibot_patch_loss.center"}[name]
    name = name.replace("gram_teacher.network.average.", "gram_teacher.backbone.", 1)
    name = name.replace("teacher.average.", "teacher.", 1).replace(".local_norm.", ".backbone.local_cls_norm.")
    return name.replace("last_layer.weight_v", "last_layer.weight")


def is_unread(name: str, objective: DINOv2) -> bool:
    """Whether it is a tensor of the official code that never has an effect: the teacher's mask token, masked biases."""
    if name.endswith("mask_token"):
        return not name.startswith("student.")
    return name.endswith("attn.qkv.bias") and objective.backbone.qkv_bias == "no_key"  # pyright: ignore


def _of_step(objective: DINOv2, engine: RecordingEngine, step: int) -> dict[str, Tensor]:
    """The official dictionary of losses, and the norms before clipping."""
    config, found = objective.config, {name: value.detach() for name, value in engine.losses.items()}
    local, koleo = config.local_crops_number, config.koleo_weight
    pairs = 2 + 2 * local
    result = {
        "total_loss": found["loss"],
        "dino_global_crops_loss": found["loss_cls_global"] * pairs / 2,
        "ibot_loss": 2 * found["loss_patch"],
    }
    if local:
        result["dino_local_crops_loss"] = found["loss_cls_local"] * pairs / (2 * local)
        weight = objective._scheduled(config.local_weight_schedule, step)
        result["dino_local_loss_weight"] = torch.tensor(1.0 if weight is None else weight)
    if koleo:
        result["koleo_loss"] = found["loss_koleo"] / koleo
    if config.gram is not None:
        weight = objective._scheduled(config.gram.weight_schedule, step)
        result["gram_loss"] = found["loss_gram"]
        result["gram_loss_weight"] = torch.tensor(config.gram.weight if weight is None else weight)
    for head in HEADS:
        result[f"{head}_grad_norm"] = _norm(g for n, g in engine.gradients.items() if head in n)
    result["backbone_grad_norm"] = _norm(g for n, g in engine.gradients.items() if not any(h in n for h in HEADS))
    return result


def _norm(gradients: Any) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def _after(case: Case, objective: DINOv2, unread: dict[str, Tensor], *, refreshed: bool) -> dict[str, Tensor]:
    state = {official_name(name): value for name, value in objective.state_dict().items()}
    result = {}
    for name, like in case.below("expect/after").items():
        if name.endswith("mask_token") and not name.startswith("student."):
            of = name.replace("gram_teacher.", "teacher.", 1) if refreshed else name
            result[f"expect/after/{name}"] = unread[of]
        else:
            key = unread[name].chunk(3)[1] if name in unread else None
            result[f"expect/after/{name}"] = official(state, name, like, key=key)
    return {name: value.clone() for name, value in result.items()}


def _batch(case: Case, step: int, options: Options, world: World) -> dict[str, Tensor]:
    """The batch of the official collate function, which is crop after crop, with the recorded draws."""
    rank = f"rank{world.rank}/" if world.world_size > 1 else ""
    where, draws, images = f"input/{rank}step{step}/collated", f"draw/{rank}step{step}", case.config["batch"]
    depth, moves = case.config["vit"]["depth"], options.movement
    names = {"global": "global_crops", "mask": "masks", "local": "local_crops", "gram": "gram_teacher_crops"}
    crops = {name: case[f"{where}_{of}"] for name, of in names.items() if f"{where}_{of}" in case.tensors}
    drops = [drops_of_blocks(case, f"{draws}/drop_path", entry, depth) for entry in (0, 1)]
    if drops[0] is not None:
        crops["drop_path"] = torch.cat([drop for drop in drops if drop is not None])
    batch = {name: per_crop.unflatten(0, (-1, images)).transpose(0, 1) for name, per_crop in crops.items()}
    if any(moves.values()):
        drawn = [
            [drawn_uniforms(case, f"{draws}/rope/block{i}/entry{entry}", moves) for i in range(depth)]
            for entry in (0, 1)
        ]
        batch["rope"] = torch.stack([torch.stack(blocks) for blocks in drawn]).expand(images, -1, -1, -1)
    return batch


def check_groups(case: Case, objective: DINOv2) -> None:
    """Learning rate and weight decay of every parameter, as multiples, and which are frozen at first."""
    ((title, table),) = case.facts["tables"].items()
    assert title.startswith("parameter groups: name, lr multiplier, weight decay multiplier, is_last_layer"), title
    found = {
        official_name(name).removeprefix("student."): (group["lr_scale"], group["weight_decay_scale"])
        for group in objective.param_groups()
        for name in group["names"]
    }
    last = {n for g in objective.param_groups() for n in g["names"] if g["name"].partition("_last")[1]}
    last = {official_name(name).removeprefix("student.") for name in last}
    unused = dict(found)
    for name, rate, decay, is_last in table:
        at = name.replace("storage_tokens", "reg_token")
        if at.endswith("qkv.bias") and at not in found:
            at = at.replace("qkv.bias", "q_bias")
            unused.pop(at.replace("q_bias", "v_bias"), None)
        for part in ("w1", "w2"):
            at = at.replace(f"mlp.{part}.", "mlp.fc1.")
        at = at.replace("mlp.w3.", "mlp.fc2.") if f"mlp.w3.{at.rpartition('.')[2]}" in at else at
        got = found[at]
        unused.pop(at, None)
        assert abs(got[0] - rate) <= 1e-12 and got[1] == decay, f"{case.name}: {name} has {got}, not {(rate, decay)}"
        assert (at in last) == is_last, f"{case.name}: {name} is {'not ' if is_last else ''}frozen at first"
    assert not unused, f"{case.name}: parameters of ours that are not in the table: {sorted(unused)}"
