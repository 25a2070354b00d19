"""Runs Fovea on the golden cases of LeJEPA."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.distributed import World
from pretrain.models.backbones.vit import ViT
from pretrain.models.losses.sigreg import draw_directions, quadrature, sigreg
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs.lejepa import LeJEPAConfig
from pretrain.objectives.lejepa import LeJEPA
from tests.golden.case import Case, key_third
from tests.golden.ranks import run_ranks

SLICES_OF_THE_EXAMPLE = 256


class GivenDirections(LeJEPA):
    """Takes the normal numbers of the case."""

    normal: Tensor

    def directions(self, step: int, device: torch.device) -> Tensor:
        return F.normalize(self.normal, dim=0)


def run_sigreg(case: Case) -> None:
    case.only("lead", "N", "D", "num_slices", "t_max", "n_points", "clip")
    options = {"t_max": case.config["t_max"], "num_points": case.config["n_points"]}
    for name, table in zip(("t", "phi", "weights"), quadrature(*options.values()), strict=True):
        case.check(f"expect/{name}", table)
    steps = sorted(int(name[1:]) for name in case.below("draw"))
    for step in steps:
        drawn = draw_directions(case.config["D"], case.config["num_slices"], step=step)
        torch.testing.assert_close(drawn, F.normalize(case[f"draw/A{step}"], dim=0))
        if f"expect/step{step}/per_slice" in case.tensors:
            case.check(f"expect/step{step}/per_slice", sigreg(case["input/x"], drawn, **options))
    case.check("expect/global_step", torch.tensor(len(steps)))
    clip = case.config["clip"]
    for key in [key for key in case.below("expect") if not re.search("/|^(t|phi|weights|global_step)$", key)]:
        rows = case["input/x"].clone().requires_grad_()
        first = F.normalize(case["draw/A0"], dim=0)
        each = sigreg(rows, first, **options, clip=clip if key.startswith("clipped") and clip is not None else 0.0)
        result = each.sum() if key.endswith("sum") else each.mean()
        result.backward()
        assert rows.grad is not None
        case.check(f"expect/{key}", result)
        case.check(f"grad/{key}/input/x", rows.grad)


def run_sigreg_on_ranks(case: Case) -> None:
    case.only("N", "F", "D", "num_slices", "t_max", "n_points", "world")
    world = sum(1 for name in case.below("input"))
    results = run_ranks(case, on_rank, world)
    for rank, result in enumerate(results):
        case.check(f"expect/rank{rank}/sigreg", result["sigreg"])
        case.check(f"grad/rank{rank}/z", result["z"])
    case.check("grad/mean_over_processes/W", torch.stack([result["W"] for result in results]).mean(0))
    alone = statistic(case, torch.cat([case[f"input/rank{rank}/x"] for rank in range(world)]))
    case.check("expect/one_process/sigreg", alone["sigreg"])
    case.check("grad/one_process/z", alone["z"])
    case.check("grad/one_process/W", alone["W"])


def on_rank(case: Case, world: World) -> dict[str, Tensor]:
    return statistic(case, case[f"input/rank{world.rank}/x"])


def statistic(case: Case, x: Tensor) -> dict[str, Tensor]:
    """The mean statistic of x @ W, and its gradients."""
    weight = case["state/W"].clone().requires_grad_()
    z = x @ weight
    z.retain_grad()
    options = {"t_max": case.config["t_max"], "num_points": case.config["n_points"]}
    result = sigreg(z, F.normalize(case["draw/A0"], dim=0), **options).mean()
    result.backward()
    assert z.grad is not None and weight.grad is not None
    return {"sigreg": result.detach(), "z": z.grad, "W": weight.grad}


def run_minimal(case: Case) -> None:
    case.only("batch", "V", "knots", "lamb", "classes", "vit")
    objective = build(
        case,
        form="minimal",
        global_crops_number=case.config["V"],
        local_crops_number=0,
        num_points=case.config["knots"],
        num_slices=SLICES_OF_THE_EXAMPLE,
    )
    state, renamed = case.below("state"), {"backbone.head.": "projector.0.", "backbone.": "encoder."}
    renamed["proj."] = "projector.1."
    ours = {n: _renamed(n.removeprefix("net."), renamed) for n in state if not n.startswith("probe.")}
    objective.load_state_dict({name: state[theirs] for theirs, name in ours.items()})
    probe = _probe(state)
    views = case["input/views"]
    losses = objective({"global": views}, 0)
    embedding = objective.projector[0](objective.encode({"global": views}))  # [V, N, E]
    rows = embedding.transpose(0, 1).flatten(0, 1)
    labels = case["input/labels"].repeat_interleave(views.shape[1])
    probe_loss = F.cross_entropy(probe(rows.detach()), labels)
    (losses["loss"] + probe_loss).backward()
    case.check("expect/embedding", rows)
    case.check("expect/projection", projections(objective, embedding))
    case.check("expect/invariance", losses["invariance"])
    case.check("expect/sigreg", losses["sigreg"])
    case.check("expect/lejepa", losses["loss"])
    case.check("expect/probe_loss", probe_loss)
    found = gradients(objective) | {f"probe.{name}": p.grad for name, p in probe.named_parameters()}
    check_gradients(case, {name: found[ours.get(name, name)] for name in case.below("grad")})


def run_multicrop(case: Case) -> None:
    case.only("batch", "globals", "locals", "local_size", "num_slices", "t_max", "n_points", "lamb", "vit")
    config = case.config
    objective = build(
        case,
        form="multicrop",
        global_crops_number=config["globals"],
        local_crops_number=config["locals"],
        local_crops_size=config["local_size"],
        num_slices=config["num_slices"],
        t_max=config["t_max"],
        num_points=config["n_points"],
    )
    state = {name: value for name, value in case.below("state").items() if not name.startswith("sigreg.")}
    ours = {name: _renamed(name, {"backbone.": "encoder."}) for name in state}
    objective.load_state_dict({ours[name]: value for name, value in state.items()})
    batch = {
        kind: torch.stack([case[f"input/{kind}{i}"] for i in range(config[f"{kind}s"])], dim=1)
        for kind in ("global", "local")
        if config[f"{kind}s"]
    }
    step = int(case["state/sigreg.global_step"])
    torch.testing.assert_close(
        draw_directions(config["vit"]["proj"][-1], config["num_slices"], step=step), F.normalize(case["draw/A"], dim=0)
    )
    losses = objective(batch, step)
    losses["loss"].backward()
    case.check("expect/loss", losses["loss"])
    case.check("expect/invariance", losses["invariance"])
    case.check("expect/sigreg", losses["sigreg"])
    case.check("expect/global_embedding", objective.encode(batch)[: config["globals"]].flatten(0, 1))
    case.check("expect/global_step", torch.tensor(step + 1))
    check_gradients(case, {name: gradients(objective)[ours[name]] for name in case.below("grad")})


def build(case: Case, **settings: Any) -> GivenDirections:
    vit = case.take("vit", "img", "patch", "dim", "depth", "heads", "mlp_ratio", "out", "proj")
    hidden = next(value for name, value in case.below("state").items() if name.endswith("mlp.fc1.bias"))
    backbone = ViT(
        (vit["img"], vit["img"]), vit["patch"], 3, vit["dim"], vit["depth"], vit["heads"], len(hidden) / vit["dim"],
        pos_embed="learned",
    )  # fmt: skip
    config = LeJEPAConfig(
        sigreg_weight=case.config["lamb"],
        embedding_dim=vit["out"],
        projector_dims=tuple(vit["proj"]),
        **settings,
    )
    objective = GivenDirections(config, backbone, Horizon(total_steps=1, steps_per_epoch=1)).train()
    objective.normal = case["draw/A"]
    return objective


def projections(objective: LeJEPA, embedding: Tensor) -> Tensor:
    """[V, N, E] -> [V, N, P]."""
    return objective.projector[1](embedding.flatten(0, 1)).unflatten(0, embedding.shape[:2])


def gradients(objective: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in objective.named_parameters()}


def check_gradients(case: Case, found: dict[str, Tensor | None]) -> None:
    """Those of the case, by its names; entries that are zero in exact arithmetic are compared as such."""
    for name, gradient in found.items():
        assert gradient is not None, f"{name}: no gradient reached it"
        nothing = case.facts["tolerance"][f"grad/{name}"].get("zero_in_exact_arithmetic", False)
        zero = torch.ones_like(gradient, dtype=torch.bool) if nothing else key_third(name, gradient)
        case.check(f"grad/{name}", gradient, zero=zero)


def _probe(state: dict[str, Tensor]) -> nn.Sequential:
    """The example's probe: LayerNorm and a linear layer."""
    classes, width = state["probe.1.weight"].shape
    probe = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
    probe.load_state_dict({name.removeprefix("probe."): v for name, v in state.items() if name.startswith("probe.")})
    return probe


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
