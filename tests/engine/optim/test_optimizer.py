"""Updates equal what torch and the papers' code do by other means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pretrain.core.distributed import World
from pretrain.engine.optim import lars
from pretrain.engine.optim.clip import clip_coefficients
from pretrain.engine.optim.fragments import Fragment
from pretrain.engine.optim.optimizer import trainable_groups
from tests.engine.scenarios import build, run
from tests.engine.settings import schedules_of, settings
from tests.engine.toys import Plain, batches

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["global", "per_tensor"])
def test_a_step_equals_the_official_loop(mode):
    """Written as the official code of DINO is: clip, unset the frozen gradient, step."""
    ours, model = Plain(frozen_steps=4), Plain(frozen_steps=4)
    engine = build(ALONE, ours, "ddp", mode)
    optim, schedules = engine.optim, engine.schedules
    run(engine, kind="plain", total_steps=9)

    groups = model.param_groups()
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups], betas=optim.betas, eps=1e-6)
    feed = batches("plain", start=0, accumulation=1, world=1, rank=0)
    for step in range(9):
        for target, group in zip(optimizer.param_groups, groups, strict=True):
            target["lr"] = schedules.lr_at(step)
            target["weight_decay"] = schedules.weight_decay_at(step) * group["weight_decay_scale"]
        model(next(feed), step)["loss"].backward()
        if mode == "global":
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for param in model.parameters():
            assert param.grad is not None
            factor = optim.clip_grad / (param.grad.norm() + 1e-6)
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


def test_a_frozen_group_may_keep_its_moments_as_with_a_learning_rate_of_zero():
    model = Plain(frozen_steps=4)
    groups = model.param_groups()
    groups[2]["keeps_moments"] = True
    model.param_groups = lambda: groups  # type: ignore[method-assign]
    start = model.last.weight.detach().clone()
    engine = build(ALONE, model, "ddp")
    run(engine, kind="plain", total_steps=4)
    assert torch.equal(model.last.weight, start)
    state = engine.optimizer.state[model.last.weight]
    assert state["exp_avg"].any() and state["step"] == 4


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
    assert clip_coefficients(norms, mode="global", limit=None) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert clip_coefficients(norms, mode="global", limit=10.0) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert clip_coefficients(norms, mode="global", limit=1.0) == pytest.approx(dict.fromkeys("abc", 0.2))
    assert clip_coefficients(norms, mode="per_tensor", limit=2.0) == pytest.approx({"a": 2 / 3, "b": 0.5, "c": 1.0})
    together = {"a": "head", "b": "body", "c": "head"}
    found = clip_coefficients(norms, mode="per_module", limit=2.0, modules=together)
    assert found == pytest.approx({"a": 2 / 3, "b": 0.5, "c": 2 / 3})


def test_learning_rates_are_those_of_the_step_and_the_group():
    model = Plain()
    groups = model.param_groups()
    groups[1]["lr_scale"] = 0.5
    model.param_groups = lambda: groups  # type: ignore[method-assign]
    engine = build(ALONE, model, "ddp")
    result = run(engine, kind="plain", total_steps=2)[-1]
    assert result.lr == engine.schedules.lr_at(1)
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
    with pytest.raises(ValueError, match=r"no group contains bias \(1 parameters\)"):
        trainable_groups(model, groups("weight"))
    with pytest.raises(ValueError, match="'bias' is in two groups"):
        trainable_groups(model, groups("weight", "bias") + groups("bias"))
    with pytest.raises(ValueError, match="'head' of group 'all' is not the model's parameter"):
        trainable_groups(model, groups("weight", "head"))
    model.bias.requires_grad_(False)
    assert trainable_groups(model, groups("weight"))
    with pytest.raises(ValueError, match="'bias' does not require a gradient"):
        trainable_groups(model, groups("weight", "bias"))


def test_clipping_per_module_needs_groups_that_name_theirs():
    model = Plain()
    groups = model.param_groups()
    del groups[1]["clip_group"]
    model.param_groups = lambda: groups  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="clip_mode 'per_module': param groups bias have no clip_group"):
        build(ALONE, model, "ddp", "per_module")


def test_lars_equals_its_definition():
    """As the papers' code: decay, trust ratio, momentum, in that order; vectors get neither decay nor ratio."""
    ours, model = Plain(frozen_steps=0), Plain(frozen_steps=0)
    engine = build(ALONE, ours, "ddp", "lars")
    optim, schedules = engine.optim, engine.schedules
    run(engine, kind="plain", total_steps=6)

    feed = batches("plain", start=0, accumulation=1, world=1, rank=0)
    buffers = [torch.zeros_like(param) for param in model.parameters()]
    for step in range(6):
        model(next(feed), step)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        for param, buffer in zip(model.parameters(), buffers, strict=True):
            assert param.grad is not None
            update = param.grad
            if param.ndim > 1:
                update = update + schedules.weight_decay_at(step) * param.detach()
                update = update * (optim.trust_coefficient * param.detach().norm() / update.norm())
            buffer.mul_(optim.momentum).add_(update)
            param.data.sub_(schedules.lr_at(step) * buffer)
            param.grad = None
    for (name, found), expected in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_lars_leaves_a_zero_weight_and_a_zero_update_without_a_ratio():
    zero, frozen = torch.zeros(2, 2), torch.ones(2, 2)
    gradients = [torch.ones(2, 2), torch.zeros(2, 2)]
    fragments = [Fragment(n, 0, 4, 0, 4, p, 0) for n, p in (("zero", zero), ("frozen", frozen))]
    pairs = list(zip(fragments, gradients, strict=True))
    options = {"names": ["zero", "frozen"], "vectors": (), "partitioned": False, "device": torch.device("cpu")}
    lars.adapt(pairs, weight_decays=[0.0], coefficient=0.02, **options)
    assert torch.equal(gradients[0], torch.ones(2, 2)) and not gradients[1].any()


SHAPES = {"lr": 2.0, "total_steps": 40, "warmup_steps": 10, "warmup_lr": 0.5}


def test_a_constant_schedule_holds_the_peak_and_steps_divide_it():
    constant = schedules_of(settings(**SHAPES, schedule="constant"))
    assert [constant.lr_at(step) for step in (0, 5, 10, 39, 100)] == [0.5, 1.25, 2.0, 2.0, 2.0]
    steps = schedules_of(settings(**SHAPES, schedule="multistep", milestones=(20, 30), gamma=0.5))
    assert [steps.lr_at(step) for step in (0, 5, 10, 19, 20, 29, 30)] == [0.5, 1.25, 2.0, 2.0, 1.0, 1.0, 0.5]


@given(st.integers(0, 60), st.sampled_from(["cosine", "cosine_whole", "multistep", "constant"]))
def test_starting_at_step_one_shifts_every_schedule_by_one(step, schedule):
    milestones = (20,) if schedule == "multistep" else ()
    shape = {**SHAPES, "schedule": schedule, "milestones": milestones, "weight_decay": 0.1, "weight_decay_end": 0.4}
    ahead, plain = schedules_of(settings(**shape, first_step=1)), schedules_of(settings(**shape))
    assert ahead.lr_at(step) == plain.lr_at(step + 1)
    assert ahead.weight_decay_at(step) == plain.weight_decay_at(step + 1)
