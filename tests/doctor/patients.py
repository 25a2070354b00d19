"""Small runs on real photos in this process, healthy or made ill on purpose, and what the doctor says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import PretrainConfig, plan
from pretrain.core.distributed import World
from pretrain.data.shards.dataset import Dataset
from pretrain.doctor.diagnosis import Diagnosis
from pretrain.engine.build import build_engine
from pretrain.engine.loop import fit
from pretrain.engine.protocol import StepResult
from pretrain.loader import PretrainLoader
from pretrain.models.losses.clustering import unit
from pretrain.objectives.base import Horizon, Objective, feature_std
from pretrain.objectives.capi import CAPI
from pretrain.objectives.dino import DINO
from pretrain.online.doctor import OnlineDoctor
from pretrain.start import build_objective
from tests.objectives.tiny import SMALL
from tests.runs import SHARDS

DINO_TINY = {"name": "dino", **SMALL["dino"], "out_dim": 512, "head_hidden_dim": 64, "head_bottleneck_dim": 32}
DINO_TINY |= {"teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, "drop_path_rate": 0.0, "momentum_teacher": 0.99}
DINO_TINY |= {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "solarize_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0)}
CAPI_TINY = {"name": "capi", **SMALL["capi"], "num_clusters": 64}
MAE_TINY = {"name": "mae", **SMALL["mae"]}
ALONE = World(0, 1, 0, torch.device("cpu"))
STEPS = 50


@dataclass
class Report:
    """What was said of a run, and the numbers: by step, of every step."""

    verdicts: list[Diagnosis]
    rows: dict[int, dict[str, float]]

    @property
    def rules(self) -> list[str]:
        return [verdict.rule for verdict in self.verdicts]


class _NamedError(Exception):
    """The doctor said something."""


def settings(objective: dict[str, Any], folder: Path, **changes: Any) -> PretrainConfig:
    """A run of 50 steps of 16 photos at 32 px."""
    name = objective["name"]
    model: dict[str, Any] = {"name": "vit_tiny", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
    model |= {"num_heads": 3, "pos_embed": "learned" if name in ("dino", "ibot", "dinov2") else "sincos"}
    model |= changes.pop("model", {})
    optim = {"lr": 1e-3, "global_batch_size": 16, "total_steps": STEPS, "warmup_steps": 5} | changes.pop("optim", {})
    return PretrainConfig.model_validate(
        {
            "run_dir": str(folder),
            "objective": objective,
            "model": model,
            "data": {"shards": str(SHARDS / "train"), "num_workers": 0, "block_shards": 4},
            "optim": optim,
            **changes,
        }
    )


def treat(config: PretrainConfig, infect: Callable[[Any], None] | None = None, *, until_named: bool = False) -> Report:
    """Train with the doctor beside; `infect` changes the objective before the first step.

    Args:
        until_named: end with the first step that has a verdict.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.open(config.data.shards)
    steps = plan(config, num_samples=dataset.num_samples, world_size=1)
    objective = build_objective(config, Horizon(steps.total_steps, steps.steps_per_epoch))
    if infect is not None:
        infect(objective)
    engine = build_engine(
        objective, optim=config.optim, config=config.engine, plan=steps, world=ALONE, seed=config.seed
    )
    feed = PretrainLoader(config, steps, dataset, ALONE, start_step=0, say=print)
    doctor = OnlineDoctor(config, steps, dataset, ALONE, objective, start_step=0)
    report = Report([], {})

    def examine(step: int, result: StepResult) -> None:
        report.verdicts += doctor(step, result)
        report.rows[step] = {**result.losses, "grad_norm": result.grad_norm, "lr": result.lr, **doctor.measured}
        if until_named and report.verdicts:
            raise _NamedError

    nothing: Any = lambda *_: None  # noqa: E731
    with suppress(_NamedError):
        fit(
            engine,
            objective,
            iter(feed),
            total_steps=steps.total_steps,
            log=nothing,
            save=nothing,
            requests=lambda: 0,
            probe=nothing,
            log_every=1000,
            save_every=0,
            examine=examine,
        )
    feed.close()
    return report


class Uncentred(DINO):
    """Collapses to one prototype (DINO, figure 7)."""

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.center.zero_()


class Unstopped(DINO):
    """The student is its own teacher, and the gradient reaches both sides."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        images = len(batch["global"])
        features, bottlenecks = self.student.project(*self.crops(batch))
        logits = self.student.head.last_layer(bottlenecks).unflatten(0, (-1, images)).float()
        teacher = ((logits[:2] - self.center) / self.config.teacher_temp).softmax(-1)
        student = (logits / self.config.student_temp).log_softmax(-1)
        pairs = [(i, j) for i in range(2) for j in range(len(logits)) if i != j]
        loss = -torch.stack([(teacher[i] * student[j]).sum(-1).mean() for i, j in pairs]).mean()
        self._pending.add(logits[:2].detach().flatten(0, 1).sum(0), rows=2 * images)
        given = teacher.detach().flatten(0, 1)
        return {
            "loss": loss,
            "teacher_entropy": _entropy(given).mean(),
            "teacher_kl_uniform": math.log(self.config.out_dim) - _entropy(given.mean(0)),
            "feature_std": feature_std(features[: 2 * images]),
            "center_norm": self.center.norm(),
        }


class OneImage(DINO):
    """From step 10 on sees the same picture in every place of a batch."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        same = {name: torch.ones_like(batch[name]) for name in ("global", "local")} if step >= 10 else {}
        return super().forward({**batch, **same}, step)


class PositionsAlone(CAPI):
    """From step 10 on the teacher's features of a patch depend on its position alone."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.blind = step >= 10
        return super().forward(batch, step)

    def features(self, images: Tensor) -> Tensor:
        found = super().features(images)
        return unit(found.mean(dim=0, keepdim=True)).expand_as(found) if self.blind else found


class Copied(DINO):
    """The teacher is the student of the step before."""

    def momentum(self, step: int) -> float:
        return 0.0


def become(kind: type[Objective]) -> Callable[[Any], None]:
    """An infection: the objective is of another class from now on."""

    def infect(objective: Any) -> None:
        objective.__class__ = kind

    return infect


def deaden(objective: Any) -> None:
    """Block 0 of the encoder gets gradients of 0."""
    for parameter in objective.encoder.blocks[0].parameters():
        parameter.register_hook(torch.zeros_like)


GENERAL = {"depth": 2, "attention": [{"kind": "general", "places": "blocks.*.attn", "branches": ["xca", "none"]}]}


def decide(objective: Any) -> None:
    """The routers prefer one branch from the start."""
    for block in objective.encoder.blocks:
        block.attn.router.bias.data[0] = 20.0


def hold_router(objective: Any) -> None:
    """The routers get gradients of 0."""
    for block in objective.encoder.blocks:
        for parameter in block.attn.router.parameters():
            parameter.register_hook(torch.zeros_like)


def hold_strength(objective: Any) -> None:
    """The strengths of the branches get gradients of 0."""
    for block in objective.encoder.blocks:
        block.attn.strength.register_hook(torch.zeros_like)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)
