"""The batches of a run: from the step it is at, named when something is wrong with them."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import load_config
from pretrain.core.distributed import World
from pretrain.data.sampling.order import Order
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.loader import PretrainLoader
from tests.runs import write_config


def test_a_feed_goes_on_where_the_run_was_and_names_its_samples(tmp_path: Path):
    config = load_config(PretrainConfig, write_config(tmp_path, "mae"), ["data.num_workers=0"])
    Path(config.run_dir).mkdir()
    dataset = Dataset.open(config.data.shards)
    steps = plan(config, num_samples=dataset.num_samples, world_size=1)

    def batches(start: int) -> tuple[PretrainLoader, list[dict[str, torch.Tensor]]]:
        feed = PretrainLoader(config, steps, dataset, World(0, 1, 0, torch.device("cpu")), start_step=start, say=print)
        return feed, [batch for _, batch in zip(range(3), feed, strict=False)]

    feed, later = batches(5)
    _, from_start = batches(3)
    assert torch.equal(later[0]["image"], from_start[2]["image"])
    assert later[0]["position"].tolist() == list(range(80, 96))

    order, reader = Order(dataset.counts, config.seed, config.data.block_shards), Reader(dataset)
    _, shard, sample = order.at(83)
    assert feed.names([83]) == [f"{dataset.names[shard]}/{reader.read(shard, sample)['__key__']}"]
    assert feed.waited > 0
