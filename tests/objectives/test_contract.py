"""What every objective of the table must keep, asked or unasked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pretrain.core import distributed
from pretrain.engine.optim.optimizer import trainable_groups
from pretrain.models.release.folder import read_release, write_release
from pretrain.objectives import OBJECTIVES, build
from pretrain.objectives.base import mean_over_ranks
from pretrain.objectives.configs.self_distillation import SelfDistillationConfig
from tests.objectives.tiny import HORIZON, Shape, backbone, batch, objective, part

pytestmark = pytest.mark.slow

names = pytest.mark.parametrize("name", OBJECTIVES)
# Samples of a micro-batch meet each other, and only each other: in a batch norm, as negatives, as neighbours. Those
# excluded depend on the batch by settings alone.
COUPLED = {name for name, config in OBJECTIVES.items() if config.batch_coupled} - {"dino", "ibot", "ijepa"}
DISTILLED = {name for name, config in OBJECTIVES.items() if issubclass(config, SelfDistillationConfig)}


@names
@pytest.mark.parametrize("shape", [Shape(), Shape(size=(16, 16), in_chans=1), Shape(size=(32, 16), in_chans=6)])
@pytest.mark.parametrize("registers", [0, 2])
def test_losses_are_finite_scalars_and_only_the_loss_is_differentiated(name: str, shape: Shape, registers: int):
    of = objective(name, shape, registers=registers)
    losses = of(batch(of, shape), 0)
    assert {"loss", "feature_std"} <= losses.keys()
    for key, value in losses.items():
        assert value.shape == () and value.isfinite() and value.requires_grad == (key == "loss"), key


@names
def test_every_trainable_parameter_gets_a_gradient_and_a_group(name: str):
    of = objective(name)
    of(batch(of), 0)["loss"].backward()
    without = [n for n, p in of.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "DDP would wait for these for ever"
    trainable_groups(of, of.param_groups())  # raises when one is missing, twice or misnamed


@names
def test_the_loss_falls_when_trained_on_one_batch(name: str):
    of = objective(name, **({"drop_path_rate": 0.0} if name in DISTILLED else {}))
    given = batch(of)
    optimizer = torch.optim.AdamW([p for p in of.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(40):
        loss = of(given, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if name not in DISTILLED:  # against a teacher that follows, the loss need not fall
            of.after_step(step + 1)
    assert losses[-1] < 0.9 * losses[0]


@names
def test_state_round_trip_is_exact(name: str):
    of = objective(name)
    for step in range(2):
        of(batch(of, seed=step), step)["loss"].backward()
        of.after_step(step + 1)
    torch.manual_seed(1)
    other = build(name)(of.config, backbone(name), HORIZON)
    other.load_state_dict(of.state_dict())
    of.eval(), other.eval()
    assert torch.equal(of(batch(of), 2)["loss"], other(batch(of), 2)["loss"])


@names
def test_a_release_continues_with_equal_loss(name: str, tmp_path):
    of = objective(name, registers=2).eval()
    write_release(tmp_path / "r", of.backbone, objective=name, extra_state=of.heads_state(), record={})
    torch.manual_seed(5)
    other = objective(name, registers=2).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    report = other.load_weights(read_release(tmp_path / "r"))
    assert not report.missing
    torch.testing.assert_close(other(batch(of), 0)["loss"], of(batch(of), 0)["loss"])


@names
def test_a_release_of_another_objective_gives_the_backbone_only(name: str, tmp_path):
    of = objective(name)
    torch.manual_seed(7)
    released = backbone(name)
    write_release(tmp_path / "r", released, objective="other", extra_state={}, record={})
    report = of.load_weights(read_release(tmp_path / "r"))
    assert report.missing and all(n.startswith(of.head_prefixes) for n in report.missing)
    loaded = of.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in released.state_dict().items())


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - COUPLED))
def test_micro_batches_together_have_the_gradient_of_the_batch(name: str):
    gradients = []
    for pieces in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        of = objective(name)
        for piece in pieces:
            (of(part(batch(of), piece), 0)["loss"] / len(pieces)).backward()
        gradients.append({n: p.grad for n, p in of.named_parameters() if p.grad is not None})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-5, rtol=1e-4, msg=key)


@names
@pytest.mark.parametrize("shape", [Shape(), Shape(in_chans=1), Shape(in_chans=6)])
def test_pictures_are_rgb_bytes_and_leave_the_objective_as_it_was(name: str, shape: Shape):
    of = objective(name, shape, registers=1)
    before = {key: value.clone() for key, value in of.state_dict().items()}
    stats = (0.5,) * shape.in_chans
    shown = of.pictures(batch(of, shape), 3, mean=stats, std=stats)
    assert shown
    for picture in shown.values():
        assert picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] == 3
    assert all(torch.equal(value, before[key]) for key, value in of.state_dict().items())
    assert not any(parameter.grad is not None for parameter in of.parameters())


@names
def test_bf16_autocast_gives_a_loss_in_fp32_near_the_exact_one(name: str):
    of = objective(name).eval()
    exact = of(batch(of), 0)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        low = of(batch(of), 0)["loss"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.05)


@names
def test_casting_the_parameters_to_bf16_leaves_averages_and_centres_alone(name: str):
    of = objective(name)
    for parameter in of.parameters():  # as DeepSpeed's bf16 mode does
        parameter.data = parameter.data.bfloat16()
    assert {buffer.dtype for buffer in of.buffers() if buffer.is_floating_point()} <= {torch.float32}


@names
def test_the_class_of_an_objective_is_named_as_its_configuration(name: str):
    assert f"{build(name).__name__}Config" == OBJECTIVES[name].__name__


@pytest.mark.processes
def test_the_table_does_not_import_torch():
    code = "import sys, pretrain.objectives; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="unknown objective 'maee'; one of mae, dino"):
        build("maee")


@pytest.mark.parametrize("world", [1, 4, 64])
def test_a_mean_over_ranks_that_count_nothing_is_zero(world: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda counts: counts)
    assert mean_over_ranks(torch.zeros(()), torch.tensor(0)) == 0
