"""Handling of non-finite steps: each is captured, and after too many the run rewinds to a healthy checkpoint.

An alarm of the doctor rewinds in the same way (`doctor.reaction: rewind`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pretrain.config import PretrainConfig
from pretrain.core import distributed
from pretrain.core.distributed import World
from pretrain.data.sampling.order import rank_positions
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.checkpoint.commit import step_of
from pretrain.engine.nonfinite import NonFiniteError, NonFiniteSteps
from pretrain.engine.protocol import Engine, StepResult
from pretrain.engine.session.preempt import STOP
from pretrain.engine.step import MODEL_FILE, keyed_seed
from pretrain.loader import PretrainLoader
from pretrain.nonfinite import capture
from pretrain.nonfinite.capture import Capture, Part, may_hold_weights
from pretrain.nonfinite.culprits import evaluate, find_culprits, rows_of
from pretrain.nonfinite.rewinds import SkippedPositions
from pretrain.objectives.base import Objective


class RewindError(Exception):
    """The run rewinds to an earlier checkpoint; the positions to skip from there on have been recorded."""


class Recovery:
    """Called by `fit` on every rank after each non-finite step.

    Args:
        known: the value of `about` in the checkpoint from which the run resumed.
        say: prints and logs on rank 0.
    """

    def __init__(
        self,
        config: PretrainConfig,
        objective: Objective,
        engine: Engine,
        loader: PretrainLoader,
        skipped: SkippedPositions,
        checkpoints: Checkpoints,
        *,
        world: World,
        fingerprint: str,
        start_step: int,
        known: dict[str, Any],
        say: Callable[[str], None],
    ):
        self._config, self._objective, self._engine, self._loader = config, objective, engine, loader
        self._skipped, self._world, self._fingerprint, self._say = skipped, world, fingerprint, say
        self._checkpoints, self._folder = checkpoints, Path(config.run_dir)
        self._last_saved = start_step
        self._culprits: dict[int, list[int]] = {int(s): p for s, p in known.get("non_finite_steps", {}).items()}
        settings = config.engine
        self._steps = NonFiniteSteps(
            most=settings.max_nonfinite_steps, window=settings.nonfinite_window, steps=sorted(self._culprits)
        )

    def about(self, step: int, *, alarms: Collection[str] = ()) -> dict[str, Any]:
        """For the checkpoint of `step`: whether the run may rewind to it, the non-finite steps so far, and the doctor's
        active alarms. It may if every step since the previous checkpoint was finite and no alarm is active.
        """
        healthy = not self._steps.after(self._last_saved) and not alarms
        self._last_saved = step
        broken = {str(s): p for s, p in self._culprits.items()}
        return {"healthy": healthy, "non_finite_steps": broken, "alarms": sorted(alarms)}

    def __call__(self, step: int, result: StepResult) -> None:
        """Capture the step that is now the `step`-th completed one.

        Raises:
            RewindError, NonFiniteError: too many non-finite steps; see `go_back`.
        """
        captured = self._capture(step - 1, result)
        self._culprits[step] = list(captured.culprits)
        if not self._steps.add(step) or result.requests & STOP:
            return
        positions = sorted({p for broken in self._steps.recent for p in self._culprits[broken]})
        self.go_back(step, positions, why=self._steps.why(step, result))

    def go_back(self, step: int, positions: list[int], *, why: str, until: int | None = None) -> None:
        """Rewind to the last healthy checkpoint (of step `until` or before) and skip `positions` from there on.

        Raises:
            RewindError: the rewind is recorded. NonFiniteError: too many rewinds already.
        """
        rewinds = len(self._skipped.rewinds)
        if rewinds >= self._config.engine.max_rewinds:
            captured = f"; captures are in {self._folder / 'captures'}" if self._culprits else ""
            raise NonFiniteError(f"{why}\nno more rewinds after {rewinds} (engine.max_rewinds){captured}")
        to = self._checkpoints.newest_healthy(until=until) or 0
        self._skipped.decide(step, to, positions)
        if self._world.rank == 0:
            names = ", ".join(self._loader.names(positions[:16])) + (" ..." if len(positions) > 16 else "")
            passed = f", skipping {len(positions)} samples: {names}" if positions else ""
            self._say(why)
            self._say(f"rewinding from step {step} to step {to}{passed}")
        raise RewindError

    def _capture(self, step: int, result: StepResult) -> Capture:
        folder = capture.folder_of(self._folder, step, len(self._skipped.rewinds))
        parts = self._parts(step, result)
        temporary = capture.begin(folder) if self._world.rank == 0 else Path()
        distributed.barrier()
        weights, size = None, 0
        if self._config.engine.capture_weights and distributed.broadcast_object(may_hold_weights(self._folder)):
            records = self._engine.save_model(temporary)
            weights, size = MODEL_FILE, sum(record.size for record in records)
        newest = self._checkpoints.newest_until(step)
        captured = Capture(
            step=step,
            seed=self._config.seed,
            world_size=self._world.world_size,
            micro_batch=len(parts[0].positions),
            accumulation_steps=self._engine.accumulation_steps,
            precision=self._config.engine.precision,
            loss_scale=result.loss_scale,
            first_bad=result.first_bad,
            losses={name: value if math.isfinite(value) else None for name, value in result.losses.items()},
            parts=parts,
            config_sha256=hashlib.sha256((self._folder / "config.yaml").read_bytes()).hexdigest(),
            fingerprint=self._fingerprint,
            checkpoint=None if newest is None else {"folder": str(newest), "step": step_of(newest)},
            weights=weights,
            weights_bytes=size,
            passed_over=self._skipped.counts,
        )
        if self._world.rank == 0:
            capture.seal(temporary, folder, captured)
            found = [position for part in parts for position in part.culprits]
            named = f"; to blame: {', '.join(self._loader.names(found))}" if found else ""
            self._say(f"captured{named}; recompute it with: fovea replay {folder}")
        return captured

    def _parts(self, step: int, result: StepResult) -> list[Part]:
        """All micro-batches of the step, in the same order on every rank, with their culprits."""
        mine = self._search(step, result)
        found = {key: rows for rank in distributed.all_gather_object(mine) for key, rows in rank.items()}
        world, micros = self._world.world_size, self._engine.accumulation_steps
        batch = self._config.optim.global_batch_size
        size, parts = batch // world // micros, []
        for rank in range(world):
            share = rank_positions(step, batch, rank, world)
            names = self._loader.names(share) if self._world.rank == 0 else [""] * len(share)
            for micro in range(micros):
                cut = slice(micro * size, (micro + 1) * size)
                parts.append(
                    Part(
                        rank=rank,
                        micro_batch=micro,
                        loss_finite=(rank, micro) not in result.bad_parts,
                        positions=tuple(share[cut]),
                        samples=tuple(names[cut]),
                        culprits=tuple(found.get((rank, micro), ())),
                    )
                )
        return parts

    def _search(self, step: int, result: StepResult) -> dict[tuple[int, int], list[int]]:
        """Positions that make micro-batches of this rank non-finite, if they do so without the other ranks."""
        settings, rank = self._config.engine, self._world.rank
        if settings.is_zero3:
            return {}  # no rank has all the weights
        micros = [micro for at, micro in result.bad_parts if at == rank]
        if not result.bad_parts:
            micros = list(range(self._engine.accumulation_steps))
        found = {}
        for micro in micros:
            batch = self._loader.again(step, micro)
            seed = keyed_seed(self._config.seed, step, micro, rank)

            def is_broken(rows: Any, batch: Any = batch, seed: int = seed) -> bool:
                return evaluate(
                    self._objective,
                    rows_of(batch, rows),
                    step,
                    seed=seed,
                    precision=settings.precision,
                    scale=result.loss_scale,
                ).broken

            rows = find_culprits(is_broken, len(batch["position"]))
            if rows:
                found[rank, micro] = [int(batch["position"][row]) for row in rows]
        return found
