"""docs/optimizers.md: every "yes" is a case that trains on two processes, every option one that a configuration has."""

from __future__ import annotations

import pytest

from launch.pages import optimizers
from launch.pages.__main__ import DOCS
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim.table import KINDS, OPTIONS
from tests.engine.scenarios import OPTIMS
from tests.engine.test_engines import CASES

ENGINE = {"accelerate": "ddp", **{f"ZeRO-{stage}": f"zero{stage}" for stage in range(4)}}


@pytest.mark.parametrize("name", KINDS)
def test_every_engine_that_runs_an_optimizer_is_tested(name: str):
    tested = {engine for _, engine, optim in CASES if OPTIMS[optim].get("name", "adamw") == name}
    possible = {ENGINE[engine] for engine, runs in optimizers.runs(KINDS[name]).items() if runs}
    assert possible == tested & set(ENGINE.values())


@pytest.mark.parametrize("name", KINDS)
def test_the_options_of_the_table_are_those_of_a_configuration(name: str):
    schedule = "constant" if KINDS[name].averages else "cosine"
    config = OptimConfig(name=name, schedule=schedule, lr=1.0, total_steps=1, global_batch_size=1)
    assert {key: getattr(config, key) for key in OPTIONS if getattr(config, key) is not None} == KINDS[name].options


def test_the_page_describes_every_optimizer():
    text = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    described = [
        line
        for line in text.splitlines()
        if line.count("|") == 6 and line.startswith("| `") and "optim.name" not in line
    ]
    assert [line.split("`")[1] for line in described] == list(KINDS)
