"""Every objective of the table: two ranks under DDP and ZeRO 0 to 2 train as one process with the whole batch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.objectives import OBJECTIVES
from tests.engine import objectives
from tests.engine.ranks import launch

pytestmark = pytest.mark.processes

ENGINES = ("ddp", "zero0", "zero1", "zero2")
CASES = [[name, engine] for name in OBJECTIVES for engine in ENGINES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objectives")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return launch(objectives.train, world=2, out=folder / "two", cases=CASES)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return launch(objectives.train, world=1, out=folder / "one", cases=[[name, "ddp"] for name in OBJECTIVES])[0]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_train_as_one_process_with_the_whole_batch(case, folder, one, two):
    name = "-".join(case)
    expected, found = one[f"{case[0]}-ddp"], two[0][name]
    assert len(set(expected)) == objectives.STEPS, "the loss moves"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    weights = load_file(folder / "one" / f"{case[0]}-ddp.safetensors")
    for key, value in load_file(folder / "two" / f"{name}.safetensors").items():
        torch.testing.assert_close(
            value, weights[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_both_ranks_report_the_same_losses(case, two):
    assert two[0]["-".join(case)] == two[1]["-".join(case)]
