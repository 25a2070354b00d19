"""The micro-batches of a rank: where the next one does not come and the run was asked to stop, no rank waits for it."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.core import distributed
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.trainable import Batch


class Feed:
    """Takes the micro-batches of steps.

    A rank whose next one does not come, in a run that was asked to stop, cannot leave the step: the other ranks wait
    for it in a collective. It takes its latest micro-batch again, so that the step ends, and `gave_up` says that the
    step is to be discarded.
    """

    def __init__(self) -> None:
        self._latest: Batch | None = None
        self.gave_up = False

    def take(self, micro_batches: Iterator[Batch]) -> Batch | None:
        """The next one; None where they ran out. Collective the first time, before which there is no latest one.

        Raises:
            StoppedWaitingError: the next one does not come and there is no other rank, or, on every rank, it is the
                first of this process.
        """
        if self.gave_up:
            return self._latest
        first, batch = self._latest is None, self._latest
        try:
            batch = next(micro_batches, None)
        except StoppedWaitingError:
            if distributed.is_alone():
                raise
            self.gave_up = True
        if first and distributed.agree(self.gave_up):
            raise StoppedWaitingError("requested to stop while the first data did not come")
        if not distributed.is_alone():
            self._latest = batch
        return batch
