"""The data set of a configuration: shards, or a mixture of several sets. No torch here."""

from __future__ import annotations

from pathlib import Path

from pretrain.config import DataConfig, Plan, PretrainConfig
from pretrain.data.sampling.mixture import MixedOrder
from pretrain.data.shards.dataset import Dataset, mix, order_of


def open_data(data: DataConfig) -> Dataset:
    """The images of a run.

    Raises:
        ValueError: a line for each problem, which begins with its key.
    """
    if data.mixture is None:
        assert data.shards is not None
        return _opened("data", data.shards, data.index, data.exclude)
    sets = {one.name: _opened(f"data.mixture {one.name}", one.shards, one.index, one.exclude) for one in data.mixture}
    shares = []
    for step in data.mixture_steps:
        weights = [one.weight_at(step, sets[one.name].num_samples) for one in data.mixture]
        parts = [(weight / max(weights)) ** (1 / data.temperature) for weight in weights]
        shares.append([part / sum(parts) for part in parts])
    return mix(sets, data.mixture_steps, shares)


def _opened(key: str, shards: str | list[str], index: str | None, exclude: str | None) -> Dataset:
    part = "shards"
    try:
        dataset = Dataset.open(shards, index)
        part = "exclude"
        return dataset if exclude is None else dataset.without(Path(exclude))
    except ValueError as error:
        raise ValueError("\n".join(f"{key}.{part}: {line}" for line in str(error).splitlines())) from error


def shares(config: PretrainConfig, dataset: Dataset, steps: Plan) -> list[str]:
    """A line for each set of a mixture: its part of the samples that the run reads."""
    order = order_of(dataset, config.seed, config.data.block_shards, config.optim.global_batch_size)
    return order.described(steps.total_steps * order.global_batch) if isinstance(order, MixedOrder) else []
