"""One optimizer step, the same in every engine; an engine implements forward, backward, gradients and update."""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import tee
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.core import distributed, heartbeat
from pretrain.core.distributed import World
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.manifest import FileRecord, write_file
from pretrain.core.tensorfile import open_tensors, read_tensors, write_tensors
from pretrain.core.trainable import Batch, Surveying, Trainable
from pretrain.engine import statistics
from pretrain.engine.checkpoint.same_model import check_same_model
from pretrain.engine.config import EngineConfig, OptimConfig, SAMConfig
from pretrain.engine.feed import Feed
from pretrain.engine.optim import lars, sam
from pretrain.engine.optim.clip import ClipDecision, clip_coefficients, decide, scale_gradients
from pretrain.engine.optim.fragments import TRAINED, Fragment, SavedState, restore_state, state_ranges, state_tensors
from pretrain.engine.optim.head_warmup import HeadWarmup, freeze_backbone
from pretrain.engine.optim.muon import hidden_apart
from pretrain.engine.optim.optimizer import apply_schedules, forget, trainable_groups
from pretrain.engine.optim.scaler import LossScaler
from pretrain.engine.optim.schedule_free import ScheduleFreeAdamW, averaged, check_no_statistics
from pretrain.engine.optim.schedules import Schedules
from pretrain.engine.plan import Plan
from pretrain.engine.protocol import StepResult
from pretrain.engine.session.pace import ForwardClock
from pretrain.engine.session.preempt import ABANDON
from pretrain.engine.watchdog.replicas import check_replicas

Part = tuple[Tensor, Tensor | None]  # of a micro-batch: is its loss finite? positions of its samples
MODEL_FILE, ENGINE_FILE = "model.safetensors", "engine.json"


class StepEngine(ABC):
    """Base class of the engines.

    Args:
        trainable: an nn.Module that is a `Trainable`; its parameters and buffers are taken from rank 0.
        optim: optimizer and schedules. config: precision, accumulation. plan: durations in steps.
        seed: of the random numbers drawn on the device (drop path).
    """

    optimizer: torch.optim.Optimizer
    fragments: list[Fragment]
    owns_fragments: bool  # this rank's fragments are saved and counted
    partitioned = False  # fragments are partitions (ZeRO), not complete parameters
    replicated = True  # each rank holds all of the model's parameters (not under ZeRO-3)

    def __init__(
        self,
        trainable: Trainable,
        *,
        optim: OptimConfig,
        config: EngineConfig,
        plan: Plan,
        world: World,
        seed: int,
        head_warmup: HeadWarmup | None = None,
    ):
        assert isinstance(trainable, nn.Module)
        self.trainable: nn.Module = trainable.to(world.device)
        self.optim, self.config, self.world, self.seed = optim, config, world, seed
        self.schedules = Schedules(optim, plan)
        self.accumulation_steps = config.accumulation_steps
        self.step_count = 0
        self._clock, self._feed = ForwardClock(world.device), Feed()
        self.scaler = LossScaler(enabled=config.precision == "fp16")
        groups = freeze_backbone(trainable.param_groups(), head_warmup or HeadWarmup())
        self.groups = trainable_groups(self.trainable, groups)
        if optim.name == "muon":
            self.groups = hidden_apart(self.trainable, self.groups)
        elif optim.name == "schedule_free_adamw":
            check_no_statistics(self.trainable)
        self.names = [name for group in self.groups for name in group["names"]]
        pairs = [pair for group in self.groups for pair in zip(group["names"], group["params"], strict=True)]
        self._vectors = {name for name, param in pairs if param.ndim <= 1}  # ZeRO-3 flattens the rest later
        self._clip_groups = {name: group.get("clip_group", "") for group in self.groups for name in group["names"]}
        self._batch_norms = statistics.batch_norms(self.trainable)
        for tensor in self.trainable.state_dict().values():
            distributed.broadcast(tensor)
        if config.compile:
            cast(Any, self.trainable).compile()

    @abstractmethod
    def _forward(self, batch: Batch, step: int) -> dict[str, Tensor]: ...

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Backpropagate `loss`; gradients are summed over the micro-batches of a step, then averaged over ranks."""

    @abstractmethod
    def _gradients(self) -> list[tuple[Fragment, Tensor]]:
        """The averaged gradients of this rank, which the caller may change in place."""

    @abstractmethod
    def _update(self) -> None:
        """The optimizer's step; it clears the gradients."""

    @abstractmethod
    def _discard(self) -> None:
        """Discard the gradients."""

    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of forward and backward of a micro-batch; gradients need an all-reduce only in the last one."""
        del last
        return nullcontext()

    def train_step(self, micro_batches: Iterator[Batch], step: int, *, requests: int = 0) -> StepResult:
        """One optimizer step from the next `accumulation_steps` micro-batches.

        Before anything is updated, all ranks take the same decision: a non-finite loss on any rank, or a non-finite
        gradient norm, skips the step on all ranks.

        Args:
            micro_batches: on the device; a StoppedWaitingError of them abandons the step. step: completed steps so far.
            requests: bits to share with the other ranks.

        Raises:
            StoppedWaitingError: on every rank, a rank stopped waiting for its batches; nothing was updated.
            ValueError: the batches ran out.
        """
        started = time.perf_counter()
        lr, weight_decay = apply_schedules(self.optimizer, self.groups, self.schedules, step)
        restore_statistics = statistics.kept(self._batch_norms)
        try:
            parts, gradients, decision = self._agree(micro_batches, step, requests)
        except StoppedWaitingError:
            self._discard()
            restore_statistics()
            raise
        heartbeat.mark("update", step + 1)
        skipped = bool(decision.bad_ranks) or not math.isfinite(decision.grad_norm)
        overflow = skipped and not decision.bad_ranks and self.scaler.enabled and not self.scaler.at_floor
        scale = self.scaler.scale
        bad_parts, bad_positions = _gather_bad(parts) if decision.bad_ranks else ((), ())
        if skipped:
            self._discard()
            restore_statistics()
            if overflow:
                self.scaler.overflow()
        else:
            optim = self.optim
            factors = clip_coefficients(
                decision.norms, mode=optim.clip_mode, limit=optim.clip_grad, modules=self._clip_groups
            )
            scale_gradients(gradients, {name: factor / scale for name, factor in factors.items()})
            if optim.trust_coefficient is not None:
                self._adapt(gradients, weight_decay, optim.trust_coefficient)
            self._update()
            self._keep_frozen(step)
            self.scaler.good()
        self.step_count = step + 1
        seconds = time.perf_counter() - started
        return StepResult(
            losses=decision.losses,
            grad_norm=decision.grad_norm,
            norms=decision.norms,
            lr=lr,
            weight_decay=weight_decay,
            skipped=skipped,
            overflow=overflow,
            bad_ranks=decision.bad_ranks,
            bad_positions=bad_positions,
            bad_parts=bad_parts,
            first_bad=decision.first_bad if skipped else "",
            requests=decision.requests,
            loss_scale=scale,
            data_wait=min(1.0, max(decision.waits) / seconds),
            seconds=seconds,
            waits=decision.waits,
            works=decision.works,
        )

    def _agree(
        self, micro_batches: Iterator[Batch], step: int, requests: int
    ) -> tuple[list[Part], list[tuple[Fragment, Tensor]], ClipDecision]:
        """The micro-batches' parts, this rank's gradients, and what all ranks do with theirs."""
        sharpness = self.optim.sam
        first, again = tee(micro_batches) if sharpness else (micro_batches, micro_batches)
        losses, parts, wait = self._accumulate(first, step)
        if sharpness:
            losses, parts = self._at_worst_point(sharpness, again, step, losses, parts)
        heartbeat.mark("agree", step + 1)
        gradients = self._gradients()
        decision = decide(
            losses,
            torch.stack([finite for finite, _ in parts]).all(),
            gradients,
            names=self.names,
            owned=self.owns_fragments,
            scale=self.scaler.scale,
            requests=requests | (ABANDON if self._feed.gave_up else 0),
            wait=wait,
            work=self._clock.seconds,
            device=self.world.device,
        )
        if decision.requests & ABANDON:
            raise StoppedWaitingError("a rank was requested to stop while its next data did not come")
        return parts, gradients, decision

    def _accumulate(self, micro_batches: Iterator[Batch], step: int) -> tuple[dict[str, Tensor], list[Part], float]:
        """Forward and backward of all micro-batches: mean losses, a `Part` of each, seconds waited for data."""
        total: dict[str, Tensor] = {}
        parts: list[Part] = []
        micro_batches, wait = self._surveyed(micro_batches, step)
        for micro in range(self.accumulation_steps):
            batch, waited = self._next(micro_batches, step, micro)
            wait += waited
            with self._micro_step(last=micro == self.accumulation_steps - 1):
                with self._clock.of(micro):
                    losses = self._forward(batch, step)
                heartbeat.mark("backward", step + 1, micro)
                self._backward(losses["loss"] * (self.scaler.scale / self.accumulation_steps))
            parts.append((losses["loss"].detach().isfinite(), batch.get("position")))
            for name, value in losses.items():
                value = value.detach().double() / self.accumulation_steps
                total[name] = total[name] + value if name in total else value
        return total, parts, wait

    def _surveyed(self, micro_batches: Iterator[Batch], step: int) -> tuple[Iterator[Batch], float]:
        """The micro-batches of the step, after the passes that a `Surveying` model needs; seconds waited for data."""
        if self.accumulation_steps == 1 or not isinstance(self.trainable, Surveying):
            return micro_batches, 0.0
        batches: list[Batch] = []
        wait = 0.0
        with self.trainable.surveying(), torch.no_grad():
            for micro in range(self.accumulation_steps):
                batch, waited = self._next(micro_batches, step, micro)
                wait += waited
                self._forward(batch, step)
                batches.append(batch)
        return iter(batches), wait

    def _next(self, micro_batches: Iterator[Batch], step: int, micro: int) -> tuple[Batch, float]:
        """The next micro-batch, and the seconds waited for it; torch's random numbers are then those of its pass."""
        heartbeat.mark("data", step + 1, micro)
        asked = time.perf_counter()
        batch = self._feed.take(micro_batches)
        waited = time.perf_counter() - asked
        if batch is None:
            raise ValueError(f"step {step}: the data ended at micro-batch {micro} of {self.accumulation_steps}")
        cast(Any, torch).manual_seed(keyed_seed(self.seed, step, micro, self.world.rank))
        heartbeat.mark("forward", step + 1, micro)
        return batch, waited

    def _at_worst_point(
        self, config: SAMConfig, again: Iterator[Batch], step: int, losses: dict[str, Tensor], parts: list[Part]
    ) -> tuple[dict[str, Tensor], list[Part]]:
        """Replace the gradients at the weights by those close to them where the loss is higher (see `sam`).

        The random numbers of the second pass are those of the first, as they are keyed; what the first one left for
        `after_step` is discarded. Frozen groups do not move. Adds "sharpness" to the losses: how much higher it is.
        """
        frozen = {index for index, group in enumerate(self.groups) if step < group["frozen_steps"]}
        pairs = [(fragment.owner, g) for fragment, g in self._gradients() if fragment.group not in frozen]
        weights, gradients = [weight for weight, _ in pairs], [gradient for _, gradient in pairs]
        norm = sam.gradient_norm(weights, gradients, adaptive=config.adaptive)
        if not bool(norm.isfinite()):  # on all ranks alike, as gradients are averaged; the step will be skipped
            return {**losses, "sharpness": torch.zeros_like(losses["loss"])}, parts
        restore = sam.perturb(weights, gradients, rho=config.rho, adaptive=config.adaptive, norm=norm)
        del pairs, gradients
        self._discard()
        cast(Trainable, self.trainable).discard_pending()
        restore_statistics = statistics.kept(self._batch_norms)  # one batch counts once
        worse, worse_parts, _ = self._accumulate(again, step)
        restore_statistics()
        restore()
        both = [(one & two, place) for (one, place), (two, _) in zip(parts, worse_parts, strict=True)]
        return {**losses, "sharpness": worse["loss"] - losses["loss"]}, both

    def _adapt(self, gradients: list[tuple[Fragment, Tensor]], weight_decay: float, coefficient: float) -> None:
        lars.adapt(
            gradients,
            weight_decays=[weight_decay * group["weight_decay_scale"] for group in self.groups],
            names=self.names,
            vectors=self._vectors,
            coefficient=coefficient,
            partitioned=self.partitioned,
            device=self.world.device,
        )

    def _keep_frozen(self, step: int) -> None:
        for index, group in enumerate(self.groups):
            if step < group["frozen_steps"] and not group.get("keeps_moments", False):
                owners = {id(f.owner): f.owner for f in self.fragments if f.group == index}
                forget(self.optimizer, list(owners.values()))

    # Evaluation and checkpoints

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the parameters are those that are evaluated and released; then the trained ones again. Collective."""
        if not isinstance(self.optimizer, ScheduleFreeAdamW):
            return nullcontext()
        params = {name: p for group in self.groups for name, p in zip(group["names"], group["params"], strict=True)}
        return averaged(params, self.optimizer, self.fragments, partitioned=self.partitioned)

    def save(self, folder: Path) -> list[FileRecord]:
        """Write this rank's files into `folder`: model and counters on rank 0, optimizer fragments on their ranks.

        The model is as `evaluating` has it; the weights that are trained are then part of the optimizer's file.
        """
        with self.evaluating():
            records = self.save_model(folder)
        if self.world.rank == 0:
            state = {"step_count": self.step_count, "scaler": self.scaler.state()}
            records.append(write_file(folder / ENGINE_FILE, json.dumps(state).encode()))
        if self.owns_fragments:
            name = f"optim-rank{self.world.rank:05d}.safetensors"
            tensors = state_tensors(self.optimizer, self.fragments)
            if isinstance(self.optimizer, ScheduleFreeAdamW):
                tensors |= {f"{TRAINED}/{f.name}": f.of(f.owner) for f in self.fragments}
            records.append(write_tensors(folder / name, tensors, state_ranges(self.fragments)))
        return records

    def save_model(self, folder: Path) -> list[FileRecord]:
        """Rank 0 writes the model's parameters and buffers into `folder`, as they are trained; collective."""
        model = self._model_state()
        return [write_tensors(folder / MODEL_FILE, model)] if self.world.rank == 0 else []

    def load(self, folder: Path) -> None:
        """Resume from `folder`, written by any engine at any world size.

        Raises:
            CheckpointError: the model differs; the message lists names and shapes that differ.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self._model_shapes().items()}
        with open_tensors(folder / MODEL_FILE) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_same_model(folder, expected, found)
        saved = SavedState(sorted(folder.glob("optim-rank*.safetensors")))
        needed = {fragment.name: (fragment.numel,) for fragment in self.fragments}
        there = {name: (numel,) for name, numel in saved.numels.items() if name in needed}
        check_same_model(folder, needed, there)
        model = read_tensors(folder / MODEL_FILE)
        for name in self.names:
            if TRAINED in saved.keys_of(name):
                model[name] = saved.whole(TRAINED, name).view_as(model[name])
        self._set_model_state(model)
        with torch.no_grad():
            restore_state(self.optimizer, self.fragments, saved)
        state = json.loads((folder / ENGINE_FILE).read_bytes())
        self.step_count = state["step_count"]
        self.scaler.restore(state["scaler"])

    def check_replicas(self, step: int) -> None:
        """Raise ReplicasDifferError, on every rank, where the weights of two ranks differ."""
        if self.replicated:
            check_replicas(self.trainable, step, self.world.device)

    def close(self) -> None:
        """Engines override this if other objects hold references to the model and the optimizer."""
        return

    def _model_shapes(self) -> dict[str, Tensor]:
        return self.trainable.state_dict()

    def _model_state(self) -> dict[str, Tensor]:
        """The complete model; only rank 0's is used."""
        return self.trainable.state_dict()

    def _set_model_state(self, state: dict[str, Tensor]) -> None:
        self.trainable.load_state_dict(state)


def _gather_bad(parts: Sequence[Part]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """(rank, micro-batch) of all losses that are not finite, and the sample positions of those micro-batches."""
    mine: list[tuple[int, list[int]]] = [
        (micro, [] if position is None else cast(Any, position).tolist())
        for micro, (finite, position) in enumerate(parts)
        if not finite
    ]
    found = [(rank, *part) for rank, bad in enumerate(distributed.all_gather_object(mine)) for part in bad]
    places = tuple((rank, micro) for rank, micro, _ in found)
    return places, tuple(sample for _, _, positions in found for sample in positions)


def keyed_seed(*key: int) -> int:
    """63 bits that depend on all numbers in `key`, so that random numbers need no saved state."""
    text = ",".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
