"""The engine interface that `fit` uses. No engine is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pretrain.core.trainable import Batch

if TYPE_CHECKING:
    from pretrain.core.manifest import FileRecord


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        losses: means of the returned losses over micro-batches and ranks.
        grad_norm: before clipping; nan when the step was skipped for a non-finite loss.
        norms: of each parameter's gradient, by name, before clipping.
        skipped: nothing was updated: weights, optimizer, teacher.
        overflow: skipped because the fp16 loss scale was too high, which is expected occasionally.
        bad_ranks: ranks with a non-finite loss.
        bad_positions: sample positions of those micro-batches.
        bad_parts: (rank, micro-batch of the step) of those micro-batches.
        first_bad: of a skipped step, the first non-finite loss, or the first parameter with a non-finite gradient.
        requests: requests of any rank (bits of `preempt.STOP`, `preempt.SAVE`).
        data_wait: fraction of the step time that the slowest rank waited for batches, 0 to 1.
        seconds: duration of the step, of the slowest rank.
        waits: seconds each rank waited for batches. works: seconds each rank's forward passes took (on a GPU: those of
            the step before, which are known without waiting for it).
    """

    losses: dict[str, float]
    grad_norm: float
    lr: float
    weight_decay: float
    skipped: bool = False
    overflow: bool = False
    bad_ranks: tuple[int, ...] = ()
    bad_positions: tuple[int, ...] = ()
    bad_parts: tuple[tuple[int, int], ...] = ()
    first_bad: str = ""
    requests: int = 0
    loss_scale: float = 1.0
    data_wait: float = 0.0
    seconds: float = 0.0
    waits: tuple[float, ...] = ()
    works: tuple[float, ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict[str, float])


class Engine(Protocol):
    step_count: int
    accumulation_steps: int

    def train_step(self, micro_batches: Iterator[Batch], step: int, *, requests: int = 0) -> StepResult:
        """One optimizer step from the next `accumulation_steps` micro-batches.

        Raises:
            StoppedWaitingError: on every rank, a rank stopped waiting for its batches; nothing was updated.
        """
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the parameters are those that are evaluated and released. Collective."""
        ...

    def save(self, folder: Path) -> list[FileRecord]:
        """Write this rank's files of a checkpoint."""
        ...

    def save_model(self, folder: Path) -> list[FileRecord]:
        """Write parameters and buffers alone."""
        ...

    def load(self, folder: Path) -> None: ...

    def check_replicas(self, step: int) -> None:
        """Raise ReplicasDifferError, on every rank, where the weights of two ranks differ."""
        ...

    def close(self) -> None:
        """Release the model and the optimizer, so that another engine can be built; the last call."""
        ...


Requests = Callable[[], int]
