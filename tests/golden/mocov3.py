"""Runs Fovea's own engine on the golden training steps of MoCo v3, in one process or in several over gloo."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs.mocov3 import MoCoV3Config
from pretrain.objectives.mocov3 import MoCoV3
from tests.engine.settings import Settings, settings
from tests.golden.case import Case, key_third
from tests.golden.dino_steps import RecordingEngine
from tests.golden.ranks import run_ranks


class GivenMomenta(MoCoV3):
    """Takes the momenta of the case; after its last step, where the official code has none, nothing moves."""

    momenta: list[float]

    def momentum(self, step: int) -> float:
        return self.momenta[step] if step < len(self.momenta) else 1.0


def run_steps(case: Case) -> None:
    results = run_ranks(case, train, case.config["world"])
    for key in sorted(case.due):
        owner = int(key.rpartition("_rank")[2].partition("/")[0]) if "_rank" in key else 0
        if key in results[owner]:
            case.check(key, results[owner][key], zero=zero_gradients(key, case[key]))
    for rank, result in enumerate(results):
        for key, value in result.items():  # what is not per rank must be the same on all
            if "_rank" not in key:
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"
    names = {theirs(name) for name, parameter in build(case)[0].named_parameters() if parameter.requires_grad}
    table = set(case.facts["tables"]["trainable"])
    assert names == table, f"{case.name}: trained or frozen against the table: {sorted(names ^ table)}"


def zero_gradients(key: str, tensor: Tensor) -> Tensor | None:
    """Marks gradients that are zero in exact arithmetic: before a linear layer and batch norm a shift does nothing."""
    if not key.startswith("grad/"):
        return None
    return torch.ones_like(tensor, dtype=torch.bool) if key.endswith("encoder.norm.bias") else key_third(key, tensor)


def train(case: Case, world: World) -> dict[str, Tensor]:
    """All steps of one rank; everything it can say about the tensors of the case, by their keys."""
    objective, chosen = build(case)
    objective.load_state_dict({ours(name): value for name, value in case.below("state").items()})
    objective.train()
    engine = RecordingEngine(objective, **chosen, world=world, seed=0)
    engine.losses, engine.gradients = [], []
    objective.begin()  # the case starts with a momentum encoder unlike the base encoder

    rank, result = f"_rank{world.rank}", {}
    for step in range(case.config["steps"]):
        where = f"input/step{step}" + (f"/rank{world.rank}" if world.world_size > 1 else "")
        batch = {"views": torch.stack([case[f"{where}/x1"], case[f"{where}/x2"]], dim=1)}
        before = {theirs(name): value.clone() for name, value in objective.state_dict().items()}
        result |= {
            f"expect/step{step}/momentum_encoder/{name.removeprefix('momentum_encoder.')}": value
            for name, value in before.items()
            if name.startswith("momentum_encoder.") and name.removeprefix("momentum_") in _parameters(objective)
        }
        result |= {f"expect/step{step}/{name}{rank}": value for name, value in _vectors(objective, batch).items()}
        done = engine.train_step(iter([batch]), step)
        assert not done.skipped
        statistics = {name: value for name, value in objective.state_dict().items() if _is_statistic(name)}
        result |= {f"expect/step{step}/buffer{rank}/{theirs(name)}": v.clone() for name, v in statistics.items()}
        result[f"expect/step{step}/loss{rank}"] = engine.losses[step]
        objective.after_step(step + 1)
    result |= {f"grad/{theirs(name)}": gradient for name, gradient in engine.gradients[0].items()}
    result |= {f"expect/final/{theirs(name)}": value.detach().clone() for name, value in objective.named_parameters()}
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    return result | {"expect/n_trainable": torch.tensor([len(trained)])}


def build(case: Case) -> tuple[GivenMomenta, Settings]:
    """Objective and optimizer from the options of the case, all of which must be known."""
    run = {"seed", "pos_scale", "world", "steps", "batch"}  # pos_scale has been applied to the state
    case.only(*run, "ctor", "dim", "mlp_dim", "T", "m", "opt", "lr", "wd")
    config = MoCoV3Config(
        projection_dim=case.config["dim"],
        hidden_dim=case.config["mlp_dim"],
        temperature=case.config["T"],
        sync_bn=False,
        freeze_patch_embed=case.config["ctor"].get("stop_grad_conv1", False),
    )
    horizon = Horizon(total_steps=case.config["steps"], steps_per_epoch=case.config["steps"])
    objective = GivenMomenta(config, build_vit(case), horizon)
    momenta = case.config["m"]
    objective.momenta = momenta if isinstance(momenta, list) else [momenta] * case.config["steps"]
    chosen = settings(
        name=case.config["opt"],
        lr=case.config["lr"],
        weight_decay=case.config["wd"],
        schedule="constant",
        total_steps=case.config["steps"],
    )
    return objective, chosen


def build_vit(case: Case) -> ViT:
    known = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    known += ("qk_scale",)
    neutral = {"drop_rate": 0, "attn_drop_rate": 0, "drop_path_rate": 0, "num_classes": 0}
    ctor = case.take("ctor", *known, "stop_grad_conv1", neutral=neutral)
    side = ctor["img_size"]
    return ViT(
        tuple(side) if isinstance(side, list) else (side, side),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor["embed_dim"],
        ctor["depth"],
        ctor["num_heads"],
        ctor.get("mlp_ratio", 4.0),
        pos_embed="sincos_rows_first",
        qkv_bias=ctor.get("qkv_bias", True),
        qk_scale=ctor.get("qk_scale") or None,
    )


def ours(name: str) -> str:
    """An official name in our state."""
    encoder, _, rest = name.partition(".")
    if encoder not in ("base_encoder", "momentum_encoder"):
        return name
    place = "base" if encoder == "base_encoder" else "momentum_encoder.average"
    part, _, below = rest.partition(".")
    return f"{place}.projector.{below}" if part == "head" else f"{place}.backbone.{rest}"


def theirs(name: str) -> str:
    """The inverse of `ours`."""
    name = name.replace("momentum_encoder.average.", "momentum_encoder.", 1)
    name = "base_encoder." + name.removeprefix("base.") if name.startswith("base.") else name
    return name.replace(".backbone.", ".", 1).replace(".projector.", ".head.", 1)


def _parameters(objective: MoCoV3) -> set[str]:
    return {theirs(name).removeprefix("base_") for name, _ in objective.named_parameters()}


def _vectors(objective: MoCoV3, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys of both views before normalization; a copy computes them, batch norm counts every pass."""
    twin, found = copy.deepcopy(objective), {}
    with torch.no_grad():
        for index, images in enumerate(twin.views(batch), start=1):
            found[f"q{index}"] = twin.predictor(twin.base(images)[1])
            found[f"k{index}"] = twin.momentum_encoder(images)[1]
    return found


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))
