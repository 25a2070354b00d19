"""Runs Fovea's own engine on the golden training steps of I-JEPA, in one process or in several over gloo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.core.distributed import World, all_reduce_sum
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs.ijepa import IJEPAConfig
from pretrain.objectives.ijepa import IJEPA
from tests.engine.settings import Settings, schedules_of, settings
from tests.golden.case import Case, key_third
from tests.golden.dino_steps import RecordingEngine
from tests.golden.ranks import run_ranks


def run_steps(case: Case) -> None:
    results = run_ranks(case, train, case.config["world"])
    for key in sorted(case.due):
        owner = int(key.rpartition("_rank")[2]) if "_rank" in key else 0
        if key in results[owner]:
            zero = key_third(key, case[key]) if key.startswith("grad/") else None
            case.check(key, results[owner][key], zero=zero)
    for rank, result in enumerate(results):
        for key, value in result.items():  # what is not per rank must be the same on all
            if "_rank" not in key and key != "expect/encoder_full_no_mask":
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"
    _check_query_and_value_biases(case, results[0])
    _check_groups(case)


def train(case: Case, world: World) -> dict[str, Tensor]:
    """All steps of one rank; everything it can say about the tensors of the case, by their keys."""
    objective, chosen = build(case)
    objective.load_state_dict({ours(name): value for name, value in case.below("state").items()})
    objective.train()
    engine = RecordingEngine(objective, **chosen, world=world, seed=0)
    engine.losses, engine.gradients = [], []
    steps = case.config["steps"]
    schedules = schedules_of(chosen)
    result: dict[str, Tensor] = {
        "expect/lr": torch.tensor([schedules.lr_at(step) for step in range(steps)], dtype=torch.float64),
        "expect/wd": torch.tensor([schedules.weight_decay_at(step) for step in range(steps)], dtype=torch.float64),
    }
    for step in range(steps):
        batch = _batch(case, step, world)
        if step == 0:
            result |= _predictions(objective, batch, world)
        done = engine.train_step(iter([batch]), step)
        assert not done.skipped
        objective.after_step(step + 1)
        loss = engine.losses[step]
        result[f"expect/step{step}/local_loss_rank{world.rank}"] = loss
        result[f"expect/step{step}/loss"] = all_reduce_sum(loss.clone()) / world.world_size
    result |= {f"grad/{theirs(name)}": value for name, value in engine.gradients[0].items()}
    result |= {f"expect/final/{theirs(name)}": value.clone() for name, value in objective.state_dict().items()}
    with torch.no_grad():
        images = _batch(case, 0, world)["image"][:, 0]
        result["expect/encoder_full_no_mask"] = objective.encoder(images)
    return result


def build(case: Case) -> tuple[IJEPA, Settings]:
    """Objective and optimizer from the options of the case, all of which must be known."""
    run = {"seed", "pos_scale", "world", "steps", "batch"}  # pos_scale has been applied to the state
    case.only(*run, "ctor", "pred_dim", "pred_depth", "pred_heads", "mask", "hyper")
    hyper = case.take(
        "hyper", "ema", "ipe_scale", "weight_decay", "final_weight_decay", "warmup", "start_lr", "lr", "final_lr",
        "epochs",
    )  # fmt: skip
    mask = case.take(
        "mask", "enc_mask_scale", "pred_mask_scale", "aspect_ratio", "nenc", "npred", "min_keep", "allow_overlap"
    )
    options = {
        "predictor_embed_dim": case.config["pred_dim"],
        "predictor_depth": case.config["pred_depth"],
        "predictor_num_heads": case.config["pred_heads"],
        "num_contexts": mask["nenc"],
        "context_scale": mask["enc_mask_scale"],
        "num_targets": mask["npred"],
        "target_scale": mask["pred_mask_scale"],
        "target_aspect": mask["aspect_ratio"],
        "min_keep": mask["min_keep"],
        "allow_overlap": mask.get("allow_overlap", False),
        "ema_start": hyper["ema"][0],
        "ema_end": hyper["ema"][1],
        "ema_length": hyper["ipe_scale"],
    }
    # An epoch of the case is all of its steps.
    per_epoch, epochs = case.config["steps"], hyper.get("epochs", 1)
    warmup_steps = int(hyper["warmup"] * per_epoch)
    chosen = settings(
        lr=hyper["lr"],
        min_lr=hyper["final_lr"],
        warmup_lr=hyper["start_lr"] if warmup_steps else 0.0,
        warmup_steps=warmup_steps,
        total_steps=int(hyper["ipe_scale"] * epochs * per_epoch),
        first_step=1,
        weight_decay=hyper["weight_decay"],
        weight_decay_end=hyper["final_weight_decay"],
    )
    return IJEPA(IJEPAConfig.model_validate(options), build_vit(case), Horizon(epochs * per_epoch, per_epoch)), chosen


def build_vit(case: Case) -> ViT:
    known = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    known += ("qk_scale",)
    neutral = {"drop_rate": 0, "attn_drop_rate": 0, "drop_path_rate": 0}
    ctor = case.take("ctor", *known, neutral=neutral)
    side = ctor["img_size"]
    side = side[0] if isinstance(side, list) else side
    return ViT(
        (side, side),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor["embed_dim"],
        ctor["depth"],
        ctor["num_heads"],
        ctor.get("mlp_ratio", 4),
        class_token=False,
        qkv_bias=ctor.get("qkv_bias", True),
        qk_scale=ctor.get("qk_scale") or None,
    )


def ours(name: str) -> str:
    """Our name of an entry of the official state dict."""
    name = name.replace("target_encoder.", "teacher.average.", 1)
    return name.replace("predictor.predictor_", "predictor.", 1)


def theirs(name: str) -> str:
    """The inverse of `ours`: only the mask token goes without the doubled prefix."""
    name = name.replace("teacher.average.", "target_encoder.", 1)
    if name.startswith("predictor.") and name != "predictor.mask_token":
        name = name.replace("predictor.", "predictor.predictor_", 1)
    return name


def _batch(case: Case, step: int, world: World) -> dict[str, Tensor]:
    where = f"input/step{step}" + (f"/rank{world.rank}" if world.world_size > 1 else "")
    context, targets = case[f"{where}/masks_enc"], case[f"{where}/masks_pred"]
    return {
        "image": case[f"{where}/images"][:, None],
        "mask_context": context.transpose(0, 1),
        "mask_targets": targets.transpose(0, 1),
    }


def _predictions(objective: IJEPA, batch: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """z and h as the official code lines them up: block after block, in it context after context, in it images."""
    images, keep, blocks = batch["image"][:, 0], batch["mask_context"], batch["mask_targets"]
    with torch.no_grad():
        _, pred = objective.predict(images, keep, blocks)
        target = objective.targets(images, blocks)[:, :, None].expand_as(pred)
    lines = [tensor.permute(1, 2, 0, 3, 4).flatten(0, 2) for tensor in (pred, target)]
    return {f"expect/step0/{key}_rank{world.rank}": value for key, value in zip(("z", "h"), lines, strict=True)}


def _check_groups(case: Case) -> None:
    """Weight decay of every parameter as in the table of the case; tables of positions stand still in both codes."""
    (table,) = (t for title, t in case.facts["tables"].items() if title.startswith("optimizer groups"))
    objective, _ = build(case)
    groups: dict[str, Any] = {
        theirs(name): bool(group["weight_decay_scale"]) for group in objective.param_groups() for name in group["names"]
    }
    fixed = {theirs(name) for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    expected = {name: group in (0, 1) for name, group in table.items() if name not in fixed}
    different = sorted(set(groups.items()) ^ set(expected.items()))
    assert not different, f"{case.name}: weight decay differs for {different}"


def _check_query_and_value_biases(case: Case, result: dict[str, Tensor]) -> None:
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
