"""Runs Fovea's engine and schedules on the golden cases of LARS and of the schedules of DINOv2, I-JEPA and MoCo v3."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.core.schedule import cosine, warmup_cosine
from pretrain.engine.accelerate import AccelerateEngine
from pretrain.models.layers.pos_embed import sincos_2d
from pretrain.models.param_groups import split
from tests.engine.settings import schedules_of, settings
from tests.golden.case import Case
from tests.golden.ranks import ALONE


class Fed(nn.Module):
    """A model whose gradient at each step is what the case feeds."""

    def __init__(self, parameters: dict[str, Tensor]):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return {"loss": torch.stack([(p * batch[name]).sum() for name, p in self.named_parameters()]).sum()}

    def after_step(self, step: int) -> None: ...

    def discard_pending(self) -> None: ...

    def param_groups(self) -> list[Any]:
        return split(self, decay_all=True)


def run_lars(case: Case) -> None:
    hyper = case.take("hyper", "lr", "weight_decay", "momentum", "trust_coefficient")
    case.only("seed", "steps", "hyper", "params")
    model: Any = Fed(case.below("state"))
    chosen = settings(
        name="lars",
        schedule="constant",
        total_steps=case.config["steps"],
        lr=hyper["lr"],
        weight_decay=hyper.get("weight_decay", 0.0),
        momentum=hyper.get("momentum", 0.9),
        trust_coefficient=hyper.get("trust_coefficient", 0.001),
    )
    engine = AccelerateEngine(model, **chosen, world=ALONE, seed=0)
    for step in range(case.config["steps"]):
        engine.train_step(iter([case.below(f"input/grad{step}")]), step)
        for name, parameter in model.named_parameters():
            case.check(f"expect/step{step}/{name}", parameter)
    for name, parameter in model.named_parameters():
        case.check(f"expect/mu/{name}", engine.optimizer.state[parameter]["momentum_buffer"])


def run_dinov2_schedules(case: Case) -> None:
    known = {"base_value", "final_value", "total_iters", "warmup_iters", "start_warmup_value", "freeze_iters"}
    for i, spec in enumerate(case.config["s"]):
        unknown = set(spec) - known
        assert not unknown, f"{case.name}: schedule options the runner does not know: {sorted(unknown)}"
        values = [
            warmup_cosine(
                step,
                peak=spec["base_value"],
                final=spec["final_value"],
                warmup_steps=spec.get("warmup_iters", 0),
                total_steps=spec["total_iters"],
                warmup_form="closed",
                start=spec.get("start_warmup_value", 0.0),
                frozen_steps=spec.get("freeze_iters", 0),
            )
            for step in range(len(case[f"expect/schedule{i}"]))
        ]
        case.check(f"expect/schedule{i}", torch.tensor(values, dtype=torch.float64))


def run_ijepa_schedules(case: Case) -> None:
    for i, spec in enumerate(case.config["lr"]):
        args = _known(case, spec["args"], "warmup_steps", "start_lr", "ref_lr", "T_max", "final_lr")
        chosen = settings(
            lr=args["ref_lr"],
            min_lr=args.get("final_lr", 0.0),
            total_steps=args["T_max"],
            warmup_steps=args["warmup_steps"],
            warmup_lr=args["start_lr"],
            first_step=1,
        )
        schedules = schedules_of(chosen)
        values = [schedules.lr_at(_mirrored(step, args["warmup_steps"], args["T_max"])) for step in range(spec["n"])]
        case.check(f"expect/lr{i}", torch.tensor(values, dtype=torch.float64))
    for i, spec in enumerate(case.config["wd"]):
        args = _known(case, spec["args"], "ref_wd", "final_wd", "T_max")
        chosen = settings(
            lr=1.0,
            weight_decay=args["ref_wd"],
            weight_decay_end=args.get("final_wd", 0.0),
            total_steps=args["T_max"],
            first_step=1,
        )
        schedules = schedules_of(chosen)
        values = [schedules.weight_decay_at(_mirrored(step, 0, args["T_max"])) for step in range(spec["n"])]
        case.check(f"expect/wd{i}", torch.tensor(values, dtype=torch.float64))


def run_mocov3_tables(case: Case) -> None:
    for key in case.below("expect"):
        found = re.fullmatch(r"pos_embed_d(\d+)_img(\d+)_p(\d+)", key)
        if found:
            dim, side, patch = (int(number) for number in found.groups())
            assert [dim, side, patch] in case.config["tables"]
            table = sincos_2d(dim, (side // patch, side // patch), rows_first=True)
            case.check(f"expect/{key}", table[None])
    args, per_epoch = case.take("args", "lr", "warmup_epochs", "epochs", "moco_m"), case.config["iters"]
    total = args["epochs"] * per_epoch
    warmup_steps = args["warmup_epochs"] * per_epoch
    schedules = schedules_of(settings(lr=args["lr"], total_steps=total, warmup_steps=warmup_steps))
    case.check("expect/lr", torch.tensor([schedules.lr_at(step) for step in range(total)], dtype=torch.float64))
    momentum = [cosine(step, args["moco_m"], 1.0, total) for step in range(total)]
    case.check("expect/momentum", torch.tensor(momentum, dtype=torch.float64))


def _mirrored(step: int, warmup_steps: int, total_steps: int) -> int:
    """The update with the same value within the run: the official cosine rises again after its end, ours is over."""
    length, at = total_steps - warmup_steps, step + 1 - warmup_steps
    if at <= length:
        return step
    at %= 2 * length
    return warmup_steps - 1 + min(at, 2 * length - at)


def _known(case: Case, args: dict[str, Any], *known: str) -> dict[str, Any]:
    unknown = set(args) - set(known)
    assert not unknown, f"{case.name}: schedule options the runner does not know: {sorted(unknown)}"
    return args
