"""The penalty of hidden activations: a part of the loss of any objective, whatever way a batch is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.objectives import OBJECTIVES
from tests.doctor.patients import MAE_TINY, settings
from tests.objectives import tiny

WITH_BLOCKS = [name for name in OBJECTIVES if name != "dvae"]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_it_is_logged_as_its_own_part_and_added_to_the_loss(name: str):
    plain, penalized = tiny.objective(name), tiny.objective(name)
    penalized.penalize_activations("l1", 0.5)
    for objective in (plain, penalized):
        objective.train().begin()
    batch = tiny.batch(plain)
    torch.manual_seed(1)
    alone = plain(batch, 0)
    torch.manual_seed(1)
    found = penalized(batch, 0)
    assert set(found) == {*alone, "activation_penalty"} and found["activation_penalty"] > 0
    torch.testing.assert_close(found["loss"], alone["loss"] + found["activation_penalty"])
    found["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in penalized.parameters())
    penalized.eval()
    assert "activation_penalty" not in penalized(batch, 0)


def gradients(objective: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    objective.zero_grad()
    for batch in batches:
        (objective(batch, 0)["loss"] / len(batches)).backward()
    return [p.grad for p in objective.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["l1", "hoyer"])
def test_two_micro_batches_give_the_gradient_of_the_whole_batch(kind: Any):
    objective = tiny.objective("mae").train()
    objective.penalize_activations(kind, 3.0)
    batch = tiny.batch(objective)
    whole = gradients(objective, [batch])
    halves = gradients(objective, [tiny.part(batch, slice(0, 2)), tiny.part(batch, slice(2, 4))])
    torch.testing.assert_close(halves, whole)


def test_training_with_it_makes_activations_smaller():
    values = []
    for weight in (0.0, 30.0):
        torch.manual_seed(0)
        objective = tiny.objective("mae").train()
        objective.penalize_activations("hoyer", weight)
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
        probe = tiny.objective("mae").train()
        for step in range(12):
            optimizer.zero_grad()
            objective(tiny.batch(objective, seed=step), step)["loss"].backward()
            optimizer.step()
        probe.load_state_dict(objective.state_dict())
        probe.penalize_activations("hoyer", 1.0)
        values.append(float(probe(tiny.batch(probe), 0)["activation_penalty"]))
    assert values[1] < values[0] - 0.01


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"ffn": "identity"}}, "the blocks have no feed-forward network"),
        ({"engine": {"compile": True}}, "is not possible in a compiled model; set engine.compile=false"),
        ({"model": {"activation_penalty": {"kind": "l0", "weight": 1}}}, "Input should be 'l1' or 'hoyer'"),
        ({"model": {"activation_penalty": {"kind": "l1", "weight": 0}}}, "greater than 0"),
        ({"model": {"ffn_topk": 0.2}}, "is read with model.ffn=topk only"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes: dict[str, Any], says: str, tmp_path: Any):
    model = {"activation_penalty": {"kind": "l1", "weight": 1.0}} | changes.pop("model", {})
    with pytest.raises(ValueError, match=says):
        settings(MAE_TINY, tmp_path, model=model, **changes)
