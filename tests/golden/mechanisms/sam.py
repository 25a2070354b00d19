"""Sharpness-aware steps on their golden cases, by the engine where it has the base optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.engine.accelerate import AccelerateEngine
from pretrain.engine.optim.sam import gradient_norm
from pretrain.models.param_groups import split
from tests.engine.settings import settings
from tests.golden.case import Case
from tests.golden.ranks import ALONE

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
    base, hyper = config["base"], case.config["hyper"]
    assert base in HYPER, f"{case.name}: the engine has no optimizer {base}"
    unknown = set(hyper) - HYPER[base]
    assert not unknown, f"{case.name}: config.hyper has options the runner does not know: {sorted(unknown)}"
    given = {**DEFAULTS[base], **hyper}
    rho, adaptive = config.get("rho", 0.05), config.get("adaptive", False)
    model = Network(config["dims"])
    model.load_state_dict(case.below("state"))
    chosen = settings(
        name=base,
        schedule="constant",
        total_steps=config["steps"],
        micro_batch=config["batch"],
        sam={"rho": rho, "adaptive": adaptive},
        **given,
    )
    engine = AccelerateEngine(model, **chosen, world=ALONE, seed=0)  # type: ignore[arg-type]
    for step in range(config["steps"]):
        batch = {"x": case[f"input/x{step}"], "y": case[f"input/y{step}"]}
        case.check(f"expect/step{step}/grad_norm", _norm(model, batch, adaptive))
        model.passes.clear()
        engine.train_step(_endless(batch), step)
        (_, loss), (perturbed, loss_perturbed) = model.passes
        case.check(f"expect/step{step}/loss", loss)
        case.check(f"expect/step{step}/loss_perturbed", loss_perturbed)
        for name, parameter in model.named_parameters():
            case.check(f"expect/step{step}/perturbed/{name}", perturbed[name])
            case.check(f"expect/step{step}/{name}", parameter)


def _norm(model: Network, batch: dict[str, Tensor], adaptive: bool) -> Tensor:
    weights = list(model.parameters())
    return gradient_norm(weights, torch.autograd.grad(model(batch, 0)["loss"], weights), adaptive=adaptive)


def _endless(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    while True:
        yield batch
