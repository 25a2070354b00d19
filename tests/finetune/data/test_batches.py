"""What a batch is made of: positions, keyed numbers, substitutes; and which rank evaluates what."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import EvalBatches, TrainBatches, collate, move
from finetune.data.examples import BadExample, Example
from tests.finetune.planted import Planted


def with_noise(example: Example, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "image": torch.from_numpy(example.image.copy()),
        "id": torch.tensor(example.id),
        "u": torch.tensor(rng.random()),
    }


def plain(example: Example) -> dict[str, Any]:
    return {"id": torch.tensor(example.id)}


def make(examples: Planted, *, micro: int = 4, rank: int = 0, world_size: int = 1, first: int = 0) -> TrainBatches:
    return TrainBatches(
        examples,
        with_noise,
        collate,
        seed=3,
        global_batch=8,
        micro_batch=micro,
        rank=rank,
        world_size=world_size,
        noises={"drop": (2, 2)},
        first=first,
    )


def joined(parts: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.cat([part[key] for part in parts])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 4), (4, 2), (2, 1), (1, 8)])
def test_a_step_is_the_same_however_it_is_divided(world_size: int, micro: int):
    examples = Planted(20)
    whole = make(examples, micro=8)[3]
    accumulation = 8 // world_size // micro
    parts = [
        make(examples, micro=micro, rank=rank, world_size=world_size)[3 * accumulation + i]
        for rank in range(world_size)
        for i in range(accumulation)
    ]
    for key in ("id", "u", "image", "position", "drop"):
        assert joined(parts, key).equal(whole[key]), key
    assert all(part["rng_step"].equal(whole["rng_step"]) for part in parts)


def test_a_resumed_run_sees_the_batches_of_an_undisturbed_one():
    batches, resumed = make(Planted(20)), pickle.loads(pickle.dumps(make(Planted(20), first=5)))
    for index in range(4):
        for key in ("id", "u", "position", "drop", "rng_step"):
            assert resumed[index][key].equal(batches[5 + index][key])


def test_every_epoch_has_every_example_once_in_another_order():
    batches = make(Planted(16), micro=8)
    epochs = [joined([batches[2 * epoch], batches[2 * epoch + 1]], "id").tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_numbers_of_a_step_and_of_a_position_differ_from_the_next_ones():
    batches = make(Planted(16), micro=8)
    assert not batches[0]["rng_step"].equal(batches[1]["rng_step"])
    assert len(torch.unique(torch.cat([batches[0]["u"], batches[1]["u"]]))) == 16


def test_a_broken_example_is_replaced_equally_on_any_rank_and_listed():
    whole, good = make(Planted(20, broken=(4, 9)), micro=8), make(Planted(20), micro=8)
    for index in range(5):
        batch, twin = whole[index], good[index]
        changed = (batch["id"] != twin["id"]).nonzero().flatten().tolist()
        assert sorted(record["position"] for record in batch["bad"]) == batch["position"][changed].tolist()
        assert {record["key"] for record in batch["bad"]} <= {"4.jpg", "9.jpg"}
        assert all(record["substitute"].startswith("folder/") for record in batch["bad"])
        parts = [make(Planted(20, broken=(4, 9)), rank=rank, world_size=2)[index] for rank in range(2)]
        assert joined(parts, "id").equal(batch["id"])


def test_a_set_of_only_broken_examples_is_an_error_that_names_the_first():
    with pytest.raises(ValueError, match=r"folder/\d.jpg cannot be used \(planted damage\), nor can its 8 substitutes"):
        make(Planted(8, broken=tuple(range(8))))[0]


def test_a_transform_may_refuse_an_example_too():
    def refusing(example: Example, rng: np.random.Generator) -> dict[str, Any]:
        if example.id == 3:
            raise BadExample(example.name, "nothing in it")
        return with_noise(example, rng)

    batches = make(Planted(8), micro=8)
    batches.transform = refusing
    batch = batches[0]
    assert 3 not in batch["id"] and [record["reason"] for record in batch["bad"]] == ["nothing in it"]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_ranks_evaluate_every_example_once_in_the_batches_of_one_rank(count: int, batch_size: int, world_size: int):
    def cut(rank: int, world_size: int) -> list[tuple[int, ...]]:
        batches = EvalBatches(
            Planted(count, size=1), plain, collate, batch_size=batch_size, rank=rank, world_size=world_size
        )
        items = [batches[i][0] for i in range(len(batches))]
        return [tuple(item["index"].tolist()) for item in items if item is not None]

    alone = cut(0, 1)
    assert [index for batch in alone for index in batch] == list(range(count))
    assert sorted(batch for rank in range(world_size) for batch in cut(rank, world_size)) == sorted(alone)


def test_undecodable_examples_are_left_out_of_evaluation_and_named():
    batches = EvalBatches(Planted(4, broken=(0, 1, 3)), plain, collate, batch_size=2)
    assert batches[0] == (None, [], [(0, "folder/0.jpg", "planted damage"), (1, "folder/1.jpg", "planted damage")])
    batch, held, failed = batches[1]
    assert batch is not None and batch["index"].tolist() == [2]
    assert held[0].target == 0 and held[0].image.shape == (32, 32, 0)
    assert failed == [(3, "folder/3.jpg", "planted damage")]


def test_tensors_of_one_shape_are_stacked_and_anything_else_is_a_list():
    batch = collate([{"a": torch.zeros(2), "b": torch.zeros(1), "t": {"x": torch.ones(1)}}] * 2 + [
        {"a": torch.ones(2), "b": torch.zeros(3), "t": {"x": torch.ones(4)}}
    ])  # fmt: skip
    assert batch["a"].shape == (3, 2)
    assert [len(b) for b in batch["b"]] == [1, 1, 3] and [len(t["x"]) for t in batch["t"]] == [1, 1, 4]
    moved = move(batch, "meta")
    assert moved["a"].is_meta and moved["b"][2].is_meta and moved["t"][0]["x"].is_meta
