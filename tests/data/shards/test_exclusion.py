"""Samples that are left out of a data set without writing a shard again."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from pretrain.__main__ import check
from pretrain.core.configlib import ConfigError
from pretrain.data.sampling.order import Order
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from tests.runs import ROOT, SHARDS

TRAIN = str(SHARDS / "train")


def names(dataset: Dataset) -> list[str]:
    """SHARD/KEY of every sample, read from the shards."""
    reader = Reader(dataset)
    places = [dataset.locate(number) for number in range(dataset.num_samples)]
    found = [f"{dataset.names[shard][:-4]}/{reader.read(shard, sample)['__key__']}" for shard, sample in places]
    assert found == [f"{dataset.names[shard][:-4]}/{reader.key(shard, sample)}" for shard, sample in places]
    return found


def test_excluded_samples_are_never_read_and_the_others_once_an_epoch(tmp_path: Path):
    every = names(Dataset.open(TRAIN))
    out = {every[0], every[5], every[-1]}
    listed = tmp_path / "exclude.txt"
    listed.write_text("# duplicates\n\n" + "\n".join(out) + "\n")
    dataset = pickle.loads(pickle.dumps(Dataset.open(TRAIN, exclude=listed)))
    assert names(dataset) == [name for name in every if name not in out]
    located = Order(dataset.counts, seed=3, block_shards=2).at_many(np.arange(dataset.num_samples))
    reader = Reader(dataset)
    seen = {
        f"{dataset.names[shard][:-4]}/{reader.key(shard, sample)}"
        for shard, sample in zip(located.shard, located.sample, strict=True)
    }
    assert seen == set(every) - out
    with pytest.raises(IndexError, match="requested"):
        reader.read(0, int(dataset.counts[0]))


def test_a_shard_alone_keeps_its_exclusions(tmp_path: Path):
    every = Dataset.open(TRAIN)
    listed = tmp_path / "exclude.txt"
    listed.write_text(f"{every.names[1]}/{Reader(every).key(1, 2)}\n")
    assert names(Dataset.open(TRAIN, exclude=listed).only(1)) == [
        n for i, n in enumerate(names(every.only(1))) if i != 2
    ]


def test_other_exclusions_are_other_data(tmp_path: Path):
    every = names(Dataset.open(TRAIN))
    prints = {Dataset.open(TRAIN).fingerprint}
    for number, text in enumerate((every[0], every[1], f"{every[1]}\n{every[0]}", f"{every[0]}\n{every[1]}\n")):
        (tmp_path / f"{number}.txt").write_text(text)
        prints.add(Dataset.open(TRAIN, exclude=tmp_path / f"{number}.txt").fingerprint)
    assert len(prints) == 4, "the order of the lines does not matter"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("other-000000/a\nother-000000/b", "other-000000/a and 1 more lines name no sample of these shards"),
        ("FIRST/nothing", "FIRST/nothing names no sample of these shards; is the list of another data set?"),
        ("# a comment\nabc", "line 2: 'abc'; expected SHARD/KEY"),
        ("ALL", "excludes every sample of the data set"),
        (None, "No such file"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_before_training(tmp_path: Path, text: str | None, expected: str):
    every = names(Dataset.open(TRAIN))
    first = every[0].split("/")[0]
    listed = tmp_path / "exclude.txt"
    if text is not None:
        listed.write_text("\n".join(every) if text == "ALL" else text.replace("FIRST", first))
    overrides = [f"data.shards={TRAIN}", f"data.exclude={listed}"]
    with pytest.raises(ConfigError, match=r"data\.exclude: ") as raised:
        check(ROOT / "configs/debug/mae.yaml", overrides, world_size=1)
    assert expected.replace("FIRST", first) in str(raised.value)
