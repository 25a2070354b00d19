"""Recomputes the micro-batches of a captured step in one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pretrain.config import PretrainConfig
from pretrain.core.configlib import Precision
from pretrain.core.text import shown
from pretrain.data.loader.microbatch import MicroBatches
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views import augment
from pretrain.engine.step import keyed_seed
from pretrain.loader import loader_spec
from pretrain.nonfinite.capture import Capture, Part
from pretrain.nonfinite.culprits import Outcome, evaluate, find_culprits, rows_of
from pretrain.objectives.base import Objective


class Recompute:
    """The micro-batches of a captured step on one device."""

    def __init__(
        self, captured: Capture, config: PretrainConfig, dataset: Dataset, objective: Objective, *, device: str
    ):
        use_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.captured, self.config, self.dataset = captured, config, dataset
        self.objective = objective.to(self.device).train()

    def run(self) -> int:
        """Print the findings. Returns 0: non-finite again; 1: finite this time."""
        broken = [name for name, value in self.objective.state_dict().items() if not bool(value.isfinite().all())]
        if broken:
            print(f"the weights themselves are not finite: {', '.join(broken[:8])} ({len(broken)} in total)")
        found = [self._part(part) for part in self.captured.suspects]
        if any(found):
            print("reproduced")
            return 0
        alone = " in a single process" if self.captured.world_size > 1 else ""
        print(f"not reproduced: every suspected micro-batch is finite when recomputed{alone}")
        return 1

    def _part(self, part: Part) -> bool:
        """Recompute one micro-batch as in the run; if it is non-finite, print the cause."""

        batch, precision = self._batch(part), self.captured.precision
        outcome = self._evaluate(part, batch, precision)
        where = f"rank {part.rank}, micro-batch {part.micro_batch} ({len(part.positions)} samples)"
        print(f"{where}: {outcome} in {precision}")
        if not outcome.broken:
            return False
        rows = find_culprits(
            lambda rows: self._evaluate(part, rows_of(batch, rows), precision).broken, len(part.positions)
        )
        if rows is None:
            print("  samples    no small subset of them reproduces it")
        for row in rows or []:
            print(f"  sample     {shown(part.samples[row])} at position {part.positions[row]}")
        if rows:
            batch = rows_of(batch, [rows[at % len(rows)] for at in range(len(part.positions))])
        print(f"  module     {self._first_module(part, batch)}")
        if outcome.bad_gradients and not outcome.bad_losses:
            listed = ", ".join(outcome.bad_gradients[-3:])
            print(f"  gradient   not finite in {len(outcome.bad_gradients)} parameters, nearest the loss: {listed}")
        others: tuple[Precision, ...] = ("fp32", "bf16", "fp16") if self.device.type == "cuda" else ("fp32", "bf16")
        for other in others:
            result = self._evaluate(part, batch, other)
            print(f"  in {other}    {result}" + ("" if result.broken else ": not reproduced"))
        return True

    def _batch(self, part: Part) -> dict[str, Tensor]:
        captured, config = self.captured, self.config
        engine = config.engine.model_copy(update={"accumulation_steps": captured.accumulation_steps})
        spec = loader_spec(
            config.model_copy(update={"engine": engine}),
            rank=part.rank,
            world_size=captured.world_size,
            skipped_positions=captured.passed_over,
        )
        host_batch = MicroBatches(self.dataset, spec)[captured.step * captured.accumulation_steps + part.micro_batch]
        if host_batch["position"].tolist() != list(part.positions):
            raise ValueError(f"rank {part.rank} has other positions than captured; optim.global_batch_size has changed")
        return augment.apply(spec.views, host_batch, config.mean, config.std, self.device)

    def _evaluate(self, part: Part, batch: Mapping[str, Tensor], precision: Precision) -> Outcome:
        captured = self.captured
        scale = captured.loss_scale if precision == captured.precision else 1.0
        return evaluate(self.objective, batch, captured.step, seed=self._seed(part), precision=precision, scale=scale)

    def _seed(self, part: Part) -> int:
        return keyed_seed(self.captured.seed, self.captured.step, part.micro_batch, part.rank)

    def _first_module(self, part: Part, batch: Mapping[str, Tensor]) -> str:
        """The first module, in order of completion, with a non-finite output."""
        bad_entries = [name for name, value in batch.items() if not _is_finite(value)]
        if bad_entries:
            return f"none: the batch itself is not finite in {', '.join(bad_entries)}"
        first: list[str] = []
        with ExitStack() as stack:
            for name, module in self.objective.named_modules():

                def look(module: Any, inputs: Any, output: Any, name: str = name) -> None:
                    if not first and not _is_finite(output):
                        origin = "" if _is_finite(inputs) else ", whose input was not finite either"
                        first.append(f"{name or 'the objective'} ({type(module).__name__}){origin}")

                stack.callback(module.register_forward_hook(look).remove)
            self._evaluate(part, batch, self.captured.precision)
        if not first:
            return "none: every output is finite, only the gradient is not"
        return first[0]


def _is_finite(value: Any) -> bool:
    """Are all floating-point tensors in nested tuples, lists and mappings finite?"""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, Mapping):
        return all(_is_finite(part) for part in value.values())
    return all(_is_finite(part) for part in value) if isinstance(value, tuple | list) else True
