"""A run on several data sets with weights: as exact as one on a single set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pretrain.__main__ import check
from pretrain.config import DataConfig
from pretrain.core.configlib import ConfigError
from pretrain.data.loader.microbatch import MicroBatches
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views.specs import ViewSpec
from pretrain.datasets import open_data, shares
from tests.runs import SHARDS, check_resume, finish, losses, rows, write_config

SAMPLES = "samples/train"
TRAIN, VAL = str(SHARDS / "train"), str(SHARDS / "val")
SETS: list[dict[str, Any]] = [
    {"name": "train", "shards": TRAIN, "weight": {0: 1, 8: 3}},
    {"name": "val", "shards": VAL, "weight": 1},
]


def config_of(folder: Path, sets: list[dict[str, Any]] = SETS, **data: object) -> Path:
    path = write_config(folder, "mae")
    values = yaml.safe_load(path.read_text())
    del values["data"]["shards"]
    values["data"] |= {"mixture": sets, **data}
    path.write_text(yaml.safe_dump(values))
    return path


def opened(**data: Any) -> Dataset:
    return open_data(DataConfig.model_validate(data))


@pytest.mark.processes
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one_and_two_ranks_as_one(tmp_path: Path):
    config = config_of(tmp_path)
    check_resume(config, ["checkpoint.every_steps=2"], tmp_path, steps=24)
    counts = {row["step"]: (row[SAMPLES], row["samples/val"]) for row in rows(tmp_path / "killed") if SAMPLES in row}
    assert counts[8] == (64, 64) and counts[24] == (64 + 192, 64 + 64), (
        "16 images a step; train counts thrice from 8 on"
    )
    status, said = finish(config, f"run_dir={tmp_path / 'two'}", processes=2)
    assert status == 0, said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "killed"), abs=2e-5)
    moved = tmp_path / "moved"
    shutil.copytree(VAL, moved)
    sets = [SETS[0], {**SETS[1], "shards": str(moved)}]
    config_of(tmp_path, sets)
    status, said = finish(config, f"run_dir={tmp_path / 'killed'}")
    assert status == 0 and "are done" in said, "the same data in another place"
    config_of(tmp_path, [SETS[0], {**SETS[1], "weight": 2}])
    status, said = finish(config, f"run_dir={tmp_path / 'killed'}")
    assert status == 2 and "data.mixture: the data differ" in said


def test_the_batches_hold_samples_of_each_set_and_substitutes_come_from_the_same_set(tmp_path: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(VAL, damaged)
    tar = next(iter(sorted(damaged.glob("*.tar"))))
    content = bytearray(tar.read_bytes())
    content[: len(content) // 4] = bytes(len(content) // 4)  # these samples do not pass their crc
    tar.write_bytes(content)
    dataset = opened(mixture=[SETS[0], {"name": "val", "shards": str(damaged), "weight": 1}])
    view = ViewSpec("images", size=(16, 16), scale=(1.0, 1.0))
    spec = LoaderSpec(
        views=[view], in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, seed=0, block_shards=2, global_batch=64, micro_batch=64
    )
    bad = MicroBatches(dataset, spec)[0]["bad"]
    assert len(bad) > 3
    for record in bad:
        assert record["shard"].startswith("val/") or record["shard"] == tar.name
        assert record["substitute"].startswith("val/")


def test_check_says_the_shares_and_the_epochs_of_each_set(tmp_path: Path):
    config, dataset, steps = check(str(config_of(tmp_path, [{**one, "weight": None} for one in SETS])), world_size=1)
    train, val = Dataset.open(TRAIN).num_samples, Dataset.open(VAL).num_samples
    assert steps.num_samples == train + val
    first, second = shares(config, dataset, steps)
    taken = 24 * 16 * train // (train + val)
    of = f"{taken / (24 * 16):6.2%} of the samples, {taken / train:.2f} epochs of its {train}"
    assert first == f"mixture    train  {of}" and second.startswith("mixture    val   ")


def test_a_temperature_makes_shares_more_equal_and_the_order_of_the_list_does_not_matter():
    sets = [{"name": one["name"], "shards": one["shards"]} for one in SETS]
    plain, warm = opened(mixture=sets), opened(mixture=sets, temperature=2.0)
    assert plain.mixture is not None and warm.mixture is not None
    ratio = plain.mixture.shares[0][0] / plain.mixture.shares[0][1]
    assert warm.mixture.shares[0][0] / warm.mixture.shares[0][1] == pytest.approx(np.sqrt(ratio))
    assert opened(mixture=sets[::-1]).fingerprint == plain.fingerprint != warm.fingerprint
    assert plain.names[0].startswith("train/") and plain.num_samples == sum(map(int, plain.counts))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"shards": TRAIN, "mixture": SETS}, "give shards, or mixture"),
        ({}, "give shards, or mixture"),
        ({"mixture": [SETS[0], SETS[0]]}, "a name of its own"),
        ({"mixture": [{**SETS[1], "weight": 0}]}, "from step 0 on every weight is 0"),
        ({"mixture": [{**SETS[1], "weight": {5: 1}}]}, "give a weight from step 0 on"),
        ({"mixture": [{**SETS[1], "weight": -1}]}, "mixture"),
        ({"mixture": [{**SETS[1], "shards": "/no/such"}]}, "data.mixture val.shards: "),
        ({"mixture": SETS, "exclude": "list.txt"}, "give them to each of its sets"),
        ({"shards": TRAIN, "temperature": 2}, "temperature: only of a mixture"),
    ],
    ids=json.dumps,
)
def test_a_wrong_mixture_is_refused_before_training(tmp_path: Path, data: dict[str, Any], expected: str):
    path = config_of(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["data"] = data
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        check(str(path), world_size=1)
    assert expected in str(error.value)
