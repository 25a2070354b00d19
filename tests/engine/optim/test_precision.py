from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.core.distributed import World
from pretrain.engine.build import build_engine
from pretrain.engine.optim.scaler import LossScaler
from pretrain.engine.step import keyed_seed
from tests.engine.scenarios import build, run
from tests.engine.settings import settings
from tests.engine.toys import Plain, batches

ALONE = World(0, 1, 0, torch.device("cpu"))


def engine_of(precision: str, model=None):
    chosen = settings(lr=3e-3, total_steps=20, eps=1e-6, clip_grad=1.0, micro_batch=8, engine={"precision": precision})
    return build_engine(model or Plain(), **chosen, world=ALONE, seed=5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32_with_fp32_weights(precision):
    reference, engine = engine_of("fp32"), engine_of(precision)
    expected = [result.losses["loss"] for result in run(reference, kind="plain")]
    found = [result.losses["loss"] for result in run(engine, kind="plain")]
    assert found == pytest.approx(expected, abs=2e-2)
    assert found != expected, "the precision took part"
    assert all(param.dtype == torch.float32 for param in engine.trainable.parameters())


def test_an_fp16_overflow_lowers_the_scale_and_neither_updates_nor_stops():
    engine = engine_of("fp16")
    engine.scaler.scale = 2.0**40
    before = engine.trainable.last.weight.detach().clone()
    results = run(engine, kind="plain", total_steps=12)
    assert [result.overflow for result in results] == [True] * 12, "more than three in a row"
    assert torch.equal(engine.trainable.last.weight, before)
    assert engine.scaler.scale == 2.0**28
    engine.scaler.scale = 2.0**14
    assert not run(engine, kind="plain", total_steps=13)[0].skipped
    assert not torch.equal(engine.trainable.last.weight, before)


def test_the_scale_of_fp16_is_taken_out_again_before_the_update():
    """With SGD, since Adam's step hardly depends on the scale of a gradient."""
    weights = []
    for precision in ("fp32", "fp16"):
        chosen = settings(name="sgd", lr=0.1, total_steps=20, micro_batch=8, engine={"precision": precision})
        engine = build_engine(Plain(), **chosen, world=ALONE, seed=5)
        run(engine, kind="plain", total_steps=4)
        weights.append(engine.trainable.last.weight.detach().clone())
    assert torch.allclose(*weights, atol=5e-3)


def test_a_gradient_that_is_not_finite_at_the_lowest_scale_is_no_overflow():
    class Broken(Plain):
        def forward(self, batch, step):
            losses = super().forward(batch, step)
            return {**losses, "loss": losses["loss"] + (self.last.weight.float() * 0.0).sum().sqrt()}

    engine = engine_of("fp16", Broken())
    engine.scaler.scale = 2.0
    feed = batches("plain", start=0, accumulation=1, world=1, rank=0)
    results = [engine.train_step(feed, step) for step in range(2)]
    assert [result.skipped for result in results] == [True, True]
    assert [result.overflow for result in results] == [True, False], "then it is a broken step, and is captured"


def test_the_scale_grows_after_good_steps_and_survives_a_checkpoint():
    scaler = LossScaler(enabled=True, scale=4.0)
    for _ in range(2000):
        scaler.good()
    assert scaler.scale == 8.0
    again = LossScaler(enabled=True)
    again.restore(scaler.state())
    assert (again.scale, again.good_steps) == (8.0, 2000)
    for _ in range(9):
        again.overflow()
    assert again.at_floor
    other = LossScaler(enabled=False)
    other.restore(scaler.state())
    other.overflow()
    assert other.scale == 1.0


def test_a_scale_at_its_floor_survives_a_checkpoint_and_that_of_fp32_does_not():
    floor = LossScaler(enabled=True, scale=2.0)
    floor.overflow()
    again, fresh = LossScaler(enabled=True), LossScaler(enabled=True)
    again.restore(floor.state())
    assert again.scale == 1.0 and again.at_floor
    fresh.restore(LossScaler(enabled=False).state())
    assert fresh.scale == 65536.0


def test_random_numbers_depend_on_seed_step_micro_batch_and_rank_alone():
    class Noisy(Plain):
        def forward(self, batch, step):
            losses = super().forward(batch, step)
            return {**losses, "noise": torch.rand(())}

    one = run(build(ALONE, Noisy(), "ddp", accumulation=2), kind="plain", total_steps=3)
    torch.rand(100)
    other = run(build(ALONE, Noisy(), "ddp", accumulation=2), kind="plain", total_steps=3)
    noises = [result.losses["noise"] for result in one]
    assert noises == [result.losses["noise"] for result in other]
    assert len(set(noises)) == 3
    keys = {keyed_seed(*key) for key in ((1, 2, 3, 4), (4, 3, 2, 1), (1, 23, 4, 0), (12, 3, 4, 0))}
    assert len(keys) == 4
    assert all(0 <= key < 2**63 for key in keys)


def test_a_compiled_model_has_the_same_names_and_losses(monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))  # no C++ compiler
    losses = []
    for compiled in (False, True):
        chosen = settings(lr=3e-3, total_steps=20, eps=1e-6, micro_batch=8, engine={"compile": compiled})
        engine = build_engine(Plain(), **chosen, world=ALONE, seed=5)
        losses.append([result.losses["loss"] for result in run(engine, kind="plain", total_steps=4)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert engine.trainable.state_dict().keys() == Plain().state_dict().keys()


def test_the_wait_for_data_is_a_share_of_the_step():
    result = engine_of("fp32").train_step(batches("plain", start=0, accumulation=1, world=1, rank=0), 0)
    assert 0 < result.data_wait < 1
    assert result.seconds > 0


def test_data_that_ends_is_an_error_that_says_where():
    feed = batches("plain", start=0, accumulation=2, world=1, rank=0)
    engine = build(ALONE, Plain(), "ddp", accumulation=2)
    with pytest.raises(ValueError, match="step 0: the data ended at micro-batch 1 of 2"):
        engine.train_step(iter([next(feed)]), 0)
