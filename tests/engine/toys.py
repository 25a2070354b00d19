"""A small Trainable with what engines can get wrong: a teacher and a centre in buffers, a group frozen at first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain import distributed


class Toy(nn.Module):
    """A student that follows a centred teacher (as DINO does), with a last layer frozen at first."""

    def __init__(self, *, width: int = 12, frozen_steps: int = 0, momentum: float = 0.9, bias: bool = True):
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
    }


def batches(*, start: int, accumulation: int, world: int, rank: int, global_batch: int = 8, poison=None):
    """This rank's micro-batches for ever; sample p is a function of p. `poison`: positions whose pixels are nan."""
    micro = global_batch // world // accumulation
    step = start
    while True:
        for index in range(accumulation):
            first = step * global_batch + rank * (global_batch // world) + index * micro
            positions = range(first, first + micro)
            rows = [torch.randn(6, generator=torch.Generator().manual_seed(1000 + p)) for p in positions]
            for row, position in zip(rows, positions, strict=True):
                if poison and position in poison:
                    row.fill_(float("nan"))
            yield {"x": torch.stack(rows), "position": torch.tensor(list(positions))}
        step += 1
