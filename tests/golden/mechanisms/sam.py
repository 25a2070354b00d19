"""Sharpness-aware steps on their golden cases, by the engine where it has the base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.engine.accelerate import AccelerateEngine
from pretrain.engine.optim.sam import gradient_norm, perturb
from pretrain.models.param_groups import split
from tests.engine.settings import settings
from tests.golden.case import Case
from tests.golden.ranks import ALONE

Step = Callable[[dict[str, Tensor], int], object]
HYPER = {"sgd": {"lr", "momentum", "weight_decay"}, "adamw": {"lr", "betas", "eps", "weight_decay"}}
DEFAULTS = {"sgd": {"momentum": 0.0, "weight_decay": 0.0}, "adamw": {"weight_decay": 0.01}}  # those of torch


class Network(nn.Sequential):
    """Linear layers with tanh between them, cross-entropy; keeps weights and loss of every forward pass."""

    def __init__(self, dims: list[int]):
        layers: list[nn.Module] = []
        for inner, outer in pairwise(dims):
            layers += [nn.Linear(inner, outer), nn.Tanh()]
        super().__init__(*layers[:-1])
        self.passes: list[tuple[dict[str, Tensor], Tensor]] = []

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:  # type: ignore[override]
        loss = F.cross_entropy(super().forward(batch["x"]), batch["y"])
        self.passes.append(({name: p.detach().clone() for name, p in self.named_parameters()}, loss.detach()))
        return {"loss": loss}

    def after_step(self, step: int) -> None: ...

    def discard_pending(self) -> None: ...

    def param_groups(self) -> list[Any]:
        return split(self)


def run_sam(case: Case) -> None:
    config = case.config
    model = Network(config["dims"])
    model.load_state_dict(case.below("state"))
    adaptive = config.get("adaptive", False)
    step_of = _engine(case, model) or _loop(case, model)
    for step in range(config["steps"]):
        batch = {"x": case[f"input/x{step}"], "y": case[f"input/y{step}"]}
        case.check(f"expect/step{step}/grad_norm", _norm(model, batch, adaptive))
        model.passes.clear()
        step_of(batch, step)
        (_, loss), (perturbed, loss_perturbed) = model.passes
        case.check(f"expect/step{step}/loss", loss)
        case.check(f"expect/step{step}/loss_perturbed", loss_perturbed)
        for name, parameter in model.named_parameters():
            case.check(f"expect/step{step}/perturbed/{name}", perturbed[name])
            case.check(f"expect/step{step}/{name}", parameter)


def _engine(case: Case, model: Network) -> Step | None:
    """The engine's step; None for a base optimizer, or an option of one, that it does not have."""
    base, hyper, sam = case.config["base"], case.config["hyper"], _sam(case)
    if base not in HYPER or not set(hyper) <= HYPER[base] or not sam["rho"]:
        return None
    chosen = settings(
        name=base,
        schedule="constant",
        total_steps=case.config["steps"],
        micro_batch=case.config["batch"],
        sam=sam,
        **{**DEFAULTS[base], **hyper},
    )
    engine = AccelerateEngine(model, **chosen, world=ALONE, seed=0)  # type: ignore[arg-type]
    return lambda batch, step: engine.train_step(repeat(batch), step)


def _loop(case: Case, model: Network) -> Step:
    """The two passes around any optimizer of torch."""
    sam, hyper = _sam(case), dict(case.config["hyper"])
    classes = {name.lower(): found for name, found in vars(torch.optim).items() if isinstance(found, type)}
    decay, groups = hyper.pop("weight_decay", None), []
    for group in model.param_groups():
        given = {} if decay is None and group["weight_decay_scale"] else {"weight_decay": 0.0}
        if decay is not None:
            given["weight_decay"] = decay * group["weight_decay_scale"]
        groups.append({"params": group["params"], **given})
    optimizer = classes[case.config["base"].lower()](groups, **hyper)
    weights = list(model.parameters())

    def step_of(batch: dict[str, Tensor], step: int) -> None:
        gradients = torch.autograd.grad(model(batch, step)["loss"], weights)
        norm = gradient_norm(weights, gradients, adaptive=sam["adaptive"])
        restore = perturb(weights, gradients, **sam, norm=norm)
        optimizer.zero_grad()
        model(batch, step)["loss"].backward()
        restore()
        optimizer.step()

    return step_of


def _sam(case: Case) -> dict[str, Any]:
    return {"rho": case.config.get("rho", 0.05), "adaptive": case.config.get("adaptive", False)}


def _norm(model: Network, batch: dict[str, Tensor], adaptive: bool) -> Tensor:
    weights = list(model.parameters())
    return gradient_norm(weights, torch.autograd.grad(model(batch, 0)["loss"], weights), adaptive=adaptive)
