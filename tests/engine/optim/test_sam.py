"""Sharpness-aware steps inside the engine; that they equal the official code is in tests/golden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.core.distributed import World
from pretrain.engine.accelerate import AccelerateEngine
from pretrain.engine.optim.sam import gradient_norm, perturb
from pretrain.models.param_groups import split
from tests.engine.scenarios import build, run
from tests.engine.settings import settings
from tests.engine.toys import Plain, Toy

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_move_by_rho_and_come_back_bitwise(adaptive: bool):
    torch.manual_seed(0)
    weights, gradients = [torch.randn(5, 3), torch.randn(7)], [torch.randn(5, 3), torch.randn(7)]
    before = [w.clone() for w in weights]
    norm = gradient_norm(weights, gradients, adaptive=adaptive)
    restore = perturb(weights, gradients, rho=0.3, adaptive=adaptive, norm=norm)
    moved = [(w - b) / (b.abs() if adaptive else 1) for w, b in zip(weights, before, strict=True)]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(0.3, rel=1e-5)
    restore()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


class Noisy(nn.Module):
    """With a batch norm, noise of its own, and a record of both."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
        self.noise: list[Tensor] = []
        self.discarded = 0

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.noise.append(torch.rand(3))
        return {"loss": self.body(batch["x"]).square().mean()}

    def after_step(self, step: int) -> None: ...

    def discard_pending(self) -> None:
        self.discarded += 1

    def param_groups(self) -> list[Any]:
        return split(self)


def feed() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {"x": torch.randn(4, 6, generator=generator)}


def noisy_engine(**optim: Any) -> AccelerateEngine:
    torch.manual_seed(0)
    chosen = settings(lr=0.1, total_steps=4, micro_batch=4, engine={"accumulation_steps": 2}, name="sgd", **optim)
    return AccelerateEngine(Noisy(), **chosen, world=ALONE, seed=1)  # type: ignore[arg-type]


def test_both_passes_see_the_same_samples_and_random_numbers_and_the_batch_counts_once():
    sharp, plain = noisy_engine(sam={"rho": 0.05}), noisy_engine()
    batches, expected = feed(), feed()
    result, reference = sharp.train_step(batches, 0), plain.train_step(expected, 0)
    model: Any = sharp.trainable
    assert torch.equal(torch.stack(model.noise[:2]), torch.stack(model.noise[2:]))
    assert not torch.equal(model.noise[0], model.noise[1])
    assert result.losses["loss"] == reference.losses["loss"]
    assert result.losses["sharpness"] > 0
    for (name, found), value in zip(model.named_buffers(), plain.trainable.buffers(), strict=True):
        assert torch.equal(found, value), name
    assert torch.equal(next(batches)["x"], next(expected)["x"]), "two micro-batches were taken, not four"
    assert model.discarded == 1, "what the first pass left for after_step"


def test_a_pending_state_is_that_of_one_pass():
    centres = []
    for optim in ("sam", "global"):
        model = Toy()
        run(build(ALONE, model, "ddp", optim, accumulation=2), kind="toy", total_steps=1)
        centres.append(model.centre)
    torch.testing.assert_close(*centres)  # it depends on the samples only


def test_a_frozen_group_is_not_moved():
    model, seen = Plain(frozen_steps=4), []
    model.last.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    run(build(ALONE, model, "ddp", "sam"), kind="plain", total_steps=5)
    assert all(torch.equal(weight, seen[0]) for weight in seen[:8])
    assert not torch.equal(seen[8], seen[9])


def test_a_nan_skips_the_step_and_names_its_samples():
    model = Plain()
    before = [p.detach().clone() for p in model.parameters()]
    results = run(build(ALONE, model, "ddp", "sam", accumulation=2), kind="plain", poison={5}, total_steps=1)
    assert results[0].skipped
    assert results[0].bad_positions == (4, 5, 6, 7)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
