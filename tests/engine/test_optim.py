"""Updates equal what torch and the papers' code do by other means."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.distributed import World
from pretrain.engine.clip import clip_coefficients
from pretrain.engine.optim import OptimSettings, build_optimizer, trainable_groups

from .scenarios import build, run
from .toys import Plain, batches

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["global", "per_tensor"])
def test_a_step_equals_the_official_loop(mode):
    """Written as the official code of DINO is: clip, unset the frozen gradient, step."""
    ours, model = Plain(frozen_steps=4), Plain(frozen_steps=4)
    engine = build(ALONE, ours, "ddp", mode)
    settings = engine.optim
    run(engine, kind="plain", total_steps=9)

    groups = model.param_groups()
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups], betas=settings.betas, eps=1e-6)
    feed = batches("plain", start=0, accumulation=1, world=1, rank=0)
    for step in range(9):
        for target, group in zip(optimizer.param_groups, groups, strict=True):
            target["lr"] = settings.lr_at(step)
            target["weight_decay"] = settings.weight_decay_at(step) * group["weight_decay_scale"]
        model(next(feed), step)["loss"].backward()
        if mode == "global":
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for param in model.parameters():
            assert param.grad is not None
            factor = settings.clip_grad / (param.grad.norm() + 1e-6)
            if mode == "per_tensor" and factor < 1:
                param.grad.mul_(factor)
        if step < 4:
            model.last.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    for (name, found), expected in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_frozen_group_stays_exactly_as_it_is_and_then_moves():
    model = Plain(frozen_steps=4)
    start = model.last.weight.detach().clone()
    engine = build(ALONE, model, "ddp")
    run(engine, kind="plain", total_steps=4)
    assert torch.equal(model.last.weight, start)
    state = engine.optimizer.state[model.last.weight]
    assert all(not value.any() for value in state.values())
    run(engine, kind="plain", total_steps=5)
    assert not torch.equal(model.last.weight, start)


def test_accumulation_equals_the_whole_batch():
    whole, parts = Plain(), Plain()
    losses = [
        [result.losses["loss"] for result in run(build(ALONE, model, "ddp", accumulation=micro), kind="plain")]
        for model, micro in ((whole, 1), (parts, 4))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_clipping_multiplies_by_at_most_one():
    norms = {"a": 3.0, "b": 4.0, "c": 0.0}
    assert clip_coefficients(norms, mode="none", limit=0.0) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert clip_coefficients(norms, mode="global", limit=10.0) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert clip_coefficients(norms, mode="global", limit=1.0) == pytest.approx(dict.fromkeys("abc", 0.2))
    assert clip_coefficients(norms, mode="per_tensor", limit=2.0) == pytest.approx({"a": 2 / 3, "b": 0.5, "c": 1.0})
    with pytest.raises(ValueError, match="'both'"):
        clip_coefficients(norms, mode="both", limit=1.0)


def test_learning_rates_are_those_of_the_step_and_the_group():
    model = Plain()
    groups = model.param_groups()
    groups[1]["lr_scale"] = 0.5
    model.param_groups = lambda: groups  # type: ignore[method-assign]
    engine = build(ALONE, model, "ddp")
    result = run(engine, kind="plain", total_steps=2)[-1]
    assert result.lr == engine.optim.lr_at(1)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [result.lr, result.lr * 0.5, 0.0]
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [
        result.weight_decay,
        0.0,
        result.weight_decay,
    ]


def test_every_parameter_must_be_in_one_group_under_its_name():
    model = nn.Linear(2, 3)

    def groups(*names: str) -> list[dict]:
        named = dict(model.named_parameters())
        return [{"name": "all", "names": list(names), "params": [named.get(n, model.bias) for n in names]}]

    assert trainable_groups(model, groups("weight", "bias"))
    with pytest.raises(ValueError, match=r"no group has bias \(1 parameters\)"):
        trainable_groups(model, groups("weight"))
    with pytest.raises(ValueError, match="'bias' is in two groups"):
        trainable_groups(model, groups("weight", "bias") + groups("bias"))
    with pytest.raises(ValueError, match="'head' of group 'all' is not the model's parameter"):
        trainable_groups(model, groups("weight", "head"))
    model.bias.requires_grad_(False)
    assert trainable_groups(model, groups("weight"))
    with pytest.raises(ValueError, match="'bias' does not require a gradient"):
        trainable_groups(model, groups("weight", "bias"))


def test_settings_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="clip_mode 'global' with clip_grad 0"):
        build_optimizer(OptimSettings(lr=1.0, total_steps=1, clip_mode="global"), [])
    with pytest.raises(ValueError, match="optimizer 'adam'"):
        build_optimizer(OptimSettings(lr=1.0, total_steps=1, name="adam"), [])  # type: ignore[arg-type]
