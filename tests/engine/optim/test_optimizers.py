"""Each optimizer of the table against its paper's formula in fp64, inside the engine: groups, freezing, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.core.configlib import ConfigError
from pretrain.core.distributed import World
from pretrain.core.tensorfile import read_tensors
from pretrain.engine.optim.muon import hidden_matrices
from pretrain.engine.optim.optimizer import state_bytes
from pretrain.engine.optim.table import KINDS
from tests.engine.scenarios import OPTIMS, build, run
from tests.engine.toys import Plain, batches, tiny_mae

ALONE = World(0, 1, 0, torch.device("cpu"))
STEPS, FROZEN = 9, 4
NAMES = {OPTIMS[key].get("name", "adamw"): key for key in reversed(OPTIMS)}  # of optimizer -> of scenario


class Reference:
    """One fp64 parameter under the update rule of a paper. It never sees a gradient while it is frozen."""

    def __init__(self, name: str, optim: Any, weight: Tensor):
        self.name, self.optim, self.w = name, optim, weight.detach().double().clone()
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros_like(self.w), 0
        self.x, self.z, self.total = self.w.clone(), self.w.clone(), 0.0

    def step(self, g: Tensor, lr: float, decay: float) -> None:
        self.t += 1
        getattr(self, self.name)(g.double(), lr, decay)

    def sgd(self, g: Tensor, lr: float, decay: float) -> None:
        """Sutskever et al. 2013 in torch's form: the decay is part of the gradient."""
        g = g + decay * self.w
        self.m = self.optim.momentum * self.m + g
        self.w = self.w - lr * (g + self.optim.momentum * self.m if self.optim.nesterov else self.m)

    def adam(self, g: Tensor, lr: float, decay: float) -> None:
        """Kingma and Ba 2015, algorithm 1; the decay is part of the gradient."""
        self.w = self.w - lr * self._adam(g + decay * self.w)

    def adamw(self, g: Tensor, lr: float, decay: float) -> None:
        """Loshchilov and Hutter 2019, algorithm 2."""
        self.w = self.w - lr * (self._adam(g) + decay * self.w)

    def _adam(self, g: Tensor) -> Tensor:
        b1, b2 = self.optim.betas
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        return self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.optim.eps)

    def lamb(self, g: Tensor, lr: float, decay: float) -> None:
        """You et al. 2020, algorithm 2; vectors have no trust ratio."""
        update = self._adam(g) + decay * self.w
        ratio = self.w.norm() / update.norm() if self.w.ndim > 1 else 1.0
        self.w = self.w - lr * ratio * update

    def lion(self, g: Tensor, lr: float, decay: float) -> None:
        """Chen et al. 2023, algorithm 2."""
        b1, b2 = self.optim.betas
        update = (b1 * self.m + (1 - b1) * g).sign()
        self.w = self.w - lr * (update + decay * self.w)
        self.m = b2 * self.m + (1 - b2) * g

    def schedule_free_adamw(self, g: Tensor, lr: float, decay: float) -> None:
        """Defazio et al. 2024, algorithm 1: `w` is y, where the gradient is taken."""
        b1, b2 = self.optim.betas
        self.v = b2 * self.v + (1 - b2) * g * g
        rate = lr * (1 - b2**self.t) ** 0.5
        self.z = self.z - rate * g / (self.v.sqrt() + self.optim.eps) - rate * decay * self.w
        self.total += rate**2
        share = rate**2 / self.total if self.total else 0.0  # the first step of a warm-up from 0
        self.x = (1 - share) * self.x + share * self.z
        self.w = (1 - b1) * self.z + b1 * self.x


@pytest.mark.parametrize("scenario", ["none", "adam", "nesterov", "lamb", "lion", "schedule_free"])
def test_a_run_equals_the_formula_of_the_paper(scenario: str):
    ours, model = Plain(frozen_steps=FROZEN), Plain(frozen_steps=FROZEN)
    for one in (ours, model):
        groups = one.param_groups()
        groups[1]["lr_scale"] = 0.5
        one.param_groups = lambda groups=groups: groups  # type: ignore[method-assign]
    engine = build(ALONE, ours, "ddp", scenario)
    optim, schedules = engine.optim, engine.schedules
    run(engine, kind="plain", total_steps=STEPS)

    expected = {name: Reference(optim.name, optim, p) for name, p in model.named_parameters()}
    feed = batches("plain", start=0, accumulation=1, world=1, rank=0)
    for step in range(STEPS):
        model(next(feed), step)["loss"].backward()
        if optim.clip_grad is not None:
            parts = [[p] for p in model.parameters()] if optim.clip_mode == "per_tensor" else [list(model.parameters())]
            for part in parts:
                nn.utils.clip_grad_norm_(part, optim.clip_grad)
        lr, decay = schedules.lr_at(step), schedules.weight_decay_at(step)
        for group in model.param_groups():
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if step >= group["frozen_steps"]:
                    expected[name].step(parameter.grad, lr * group["lr_scale"], decay * group["weight_decay_scale"])
                parameter.data.copy_(expected[name].w)
                parameter.grad = None
    for name, found in ours.named_parameters():
        torch.testing.assert_close(
            found.double(), expected[name].w, atol=2e-6, rtol=0, msg=lambda t, n=name: f"{n}: {t}"
        )
    if scenario == "schedule_free":
        with engine.evaluating():
            for name, found in ours.named_parameters():
                torch.testing.assert_close(found.double(), expected[name].x, atol=2e-6, rtol=0)


def test_muon_is_torch_s_for_hidden_matrices_and_adamw_for_the_rest():
    ours, model = tiny_mae(), tiny_mae()
    engine = build(ALONE, ours, "ddp", "muon")
    optim, schedules = engine.optim, engine.schedules
    run(engine, kind="mae", total_steps=STEPS)

    hidden = hidden_matrices(model)
    groups = [(group, dict(zip(group["names"], group["params"], strict=True))) for group in model.param_groups()]
    pairs: list[tuple[Any, torch.optim.Optimizer]] = []
    for group, named in groups:
        for matrices in (True, False):
            part = [p for name, p in named.items() if (name in hidden) is matrices]
            if part and matrices:
                pairs.append((group, torch.optim.Muon(part, adjust_lr_fn="match_rms_adamw")))
            elif part:
                pairs.append((group, torch.optim.AdamW(part, betas=optim.betas, eps=optim.eps, fused=True)))
    assert len(pairs) == 3, "no group of hidden matrices without weight decay"
    feed = batches("mae", start=0, accumulation=1, world=1, rank=0)
    for step in range(STEPS):
        model(next(feed), step)["loss"].backward()
        for group, optimizer in pairs:
            optimizer.param_groups[0]["lr"] = schedules.lr_at(step)
            optimizer.param_groups[0]["weight_decay"] = schedules.weight_decay_at(step) * group["weight_decay_scale"]
            optimizer.step()
            optimizer.zero_grad()
    moved = dict(ours.named_parameters())
    for name, expected in model.named_parameters():
        assert torch.equal(moved[name], expected), name


def test_hidden_matrices_are_the_linear_weights_inside_blocks():
    mae = tiny_mae()
    linear = {f"{n}.weight" for n, layer in mae.named_modules() if isinstance(layer, nn.Linear)}
    found = hidden_matrices(mae)
    assert linear - found == {"decoder.embed.weight", "decoder.pred.weight"}
    assert "encoder.blocks.0.attn.qkv.weight" in found and "encoder.patch_embed.proj.weight" not in found


@pytest.mark.parametrize("name", KINDS)
def test_the_counted_state_is_what_the_optimizer_keeps(name: str):
    engine = build(ALONE, tiny_mae(), "ddp", NAMES[name])
    run(engine, kind="mae", total_steps=1)
    state = [value for entry in engine.optimizer.state.values() for value in entry.values() if value is not None]
    assert state_bytes(engine.optim, engine.trainable) == sum(4 * v.numel() for v in state if v.numel() > 1)


def test_schedule_free_evaluates_and_saves_the_average_and_trains_on_bitwise(tmp_path: Path):
    model = Plain()
    engine = build(ALONE, model, "ddp", "schedule_free")
    run(engine, kind="plain", total_steps=6)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    with engine.evaluating():
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(not torch.equal(average[name], value) for name, value in trained.items())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    engine.save(tmp_path)
    saved = read_tensors(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in average.items())
    again = build(ALONE, Plain(), "ddp", "schedule_free")
    again.load(tmp_path)
    assert all(torch.equal(p, trained[name]) for name, p in again.trainable.named_parameters())


def test_before_its_first_step_the_average_is_the_weights():
    engine = build(ALONE, Plain(), "ddp", "schedule_free")
    before = [p.detach().clone() for p in engine.trainable.parameters()]
    with engine.evaluating():
        assert all(torch.equal(p, b) for p, b in zip(engine.trainable.parameters(), before, strict=True))


def test_weights_of_a_capture_are_those_that_are_trained(tmp_path: Path):
    engine = build(ALONE, Plain(), "ddp", "schedule_free")
    run(engine, kind="plain", total_steps=6)
    engine.save_model(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in engine.trainable.named_parameters())


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.body.append(nn.BatchNorm1d(7, affine=False))


def test_networks_that_an_optimizer_cannot_train_are_named():
    with pytest.raises(ConfigError, match=r"schedule_free_adamw: body.3 \(1 in all\) keep statistics"):
        build(ALONE, Normed(), "ddp", "schedule_free")
    with pytest.raises(ConfigError, match="muon: Plain trains no matrix of a hidden layer"):
        build(ALONE, Plain(), "ddp", "muon")
