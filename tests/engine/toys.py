"""A small Trainable with what engines can get wrong: a teacher and a centre in buffers, a group frozen at first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pretrain.core import distributed
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.ffn import FFN
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import DINOConfig, MAEConfig
from pretrain.objectives.dino import DINO
from pretrain.objectives.mae import MAE

GLOBAL_BATCH = 8


class Toy(nn.Module):
    """A student that follows a centred teacher (as DINO does), with a last layer frozen at first."""

    def __init__(self, *, width: int = 12, frozen_steps: int = 4, momentum: float = 0.9, bias: bool = True):
        super().__init__()
        torch.manual_seed(7)
        self.frozen_steps, self.momentum = frozen_steps, momentum
        self.body = nn.Sequential(nn.Linear(6, width, bias=bias), nn.GELU(), nn.Linear(width, 7, bias=bias))
        self.last = nn.Linear(7, 5, bias=False)
        self.teacher = nn.Module()
        for name, param in self.named_parameters():
            self.register_buffer("teacher_" + name.replace(".", "_"), param.detach().clone() * 0.5)
        self.register_buffer("centre", torch.zeros(1, 5))
        self.register_buffer("pending", torch.zeros(1, 5), persistent=False)
        self.pending_count = 0

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        x = batch["x"]
        out = self.last(self.body(x))
        with torch.no_grad():
            hidden = nn.functional.linear(x, self.teacher_body_0_weight)
            target = nn.functional.linear(hidden[:, :7], self.teacher_last_weight) - self.centre
            self.pending += target.sum(0, keepdim=True)
            self.pending_count += len(x)
        loss = (out.float() - target.float() - x[:, :5].float()).square().mean()
        return {"loss": loss, "spread": out.detach().float().std()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, param in self.named_parameters():
            self.get_buffer("teacher_" + name.replace(".", "_")).lerp_(param, 1 - self.momentum)
        total = torch.cat([self.pending.view(-1), torch.tensor([float(self.pending_count)])])
        distributed.all_reduce_sum(total)
        self.centre.lerp_(total[None, :-1] / total[-1], 0.1)
        self.discard_pending()

    def discard_pending(self) -> None:
        self.pending.zero_()
        self.pending_count = 0

    def param_groups(self) -> list[dict]:
        named = dict(self.named_parameters())
        decay = {n: p for n, p in named.items() if p.ndim > 1 and not n.startswith("last")}
        bias = {n: p for n, p in named.items() if p.ndim == 1}
        last = {n: p for n, p in named.items() if n.startswith("last")}
        return [
            _group("decay", decay, 1.0, 0),
            _group("bias", bias, 0.0, 0),
            _group("last", last, 1.0, self.frozen_steps),
        ]


class Plain(Toy):
    """Without a teacher: what every stage of ZeRO can train."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name in [name for name, _ in self.named_buffers()]:
            delattr(self, name)

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        out = self.last(self.body(batch["x"]))
        return {"loss": (out.float() - batch["x"][:, :5].float()).square().mean()}

    def after_step(self, step: int) -> None: ...

    def discard_pending(self) -> None: ...


def _group(name: str, named: dict[str, nn.Parameter], decay: float, frozen_steps: int) -> dict:
    return {
        "name": name,
        "names": list(named),
        "params": list(named.values()),
        "lr_scale": 1.0,
        "weight_decay_scale": decay,
        "frozen_steps": frozen_steps,
        "clip_group": name,
    }


def tiny_mae() -> MAE:
    torch.manual_seed(3)
    config = MAEConfig(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    return MAE(config, _tiny_vit(), Horizon(total_steps=20, steps_per_epoch=5))


def tiny_sparse() -> MAE:
    """With a penalty on the activations of its encoder."""
    torch.manual_seed(3)
    config = MAEConfig(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    objective = MAE(config, _tiny_vit(ffn="relu2"), Horizon(total_steps=20, steps_per_epoch=5))
    objective.penalize_activations("hoyer", 2.0)
    return objective


def tiny_dino() -> DINO:
    """The last layer is frozen for 5 steps."""
    torch.manual_seed(3)
    config = DINOConfig(
        out_dim=24,
        head_hidden_dim=32,
        head_bottleneck_dim=16,
        norm_last_layer=False,
        momentum_teacher=0.9,
        local_crops_number=2,
        local_crops_size=16,
    )
    return DINO(config, _tiny_vit(), Horizon(total_steps=20, steps_per_epoch=5))


def _tiny_vit(ffn: FFN = "mlp") -> ViT:
    return ViT((32, 32), 8, embed_dim=48, depth=2, num_heads=3, ffn=ffn)


def batches(
    kind: str,
    *,
    start: int,
    accumulation: int,
    world: int,
    rank: int,
    poison: set[int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches for ever; a sample is a function of its position. `poison`: positions that are nan."""
    micro, step = GLOBAL_BATCH // world // accumulation, start
    while True:
        for index in range(accumulation):
            first = step * GLOBAL_BATCH + rank * (GLOBAL_BATCH // world) + index * micro
            samples = [_sample(kind, position, position in (poison or ())) for position in range(first, first + micro)]
            batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
            yield {**batch, "position": torch.arange(first, first + micro)}
        step += 1


def _sample(kind: str, position: int, poisoned: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + position)
    if kind in ("mae", "sparse"):
        sample = {"image": torch.randn(1, 3, 32, 32, generator=generator)}
        return {**sample, "mask_noise": torch.rand(16, generator=generator)}
    if kind == "dino":
        sample = {"global": torch.randn(2, 3, 32, 32, generator=generator)}
        sample["local"] = torch.randn(2, 3, 16, 16, generator=generator)
        return {**sample, "drop_path": torch.rand(4, 2, 2, generator=generator)}
    x = torch.randn(6, generator=generator)
    return {"x": torch.full_like(x, float("nan")) if poisoned else x}
