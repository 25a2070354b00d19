"""The page of a run while it trains: at most a hundredth of its time, and never its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pretrain.engine.session.film import add_frames, drop_frames
from pretrain.report.page import write_page

_SHARE = 0.01  # of the time of a run that its page may take


class OnlinePage:
    """Writes the page of the run in `folder`. On rank 0 only.

    Args:
        start_step: completed steps; pictures of later ones, which a resumed run draws again, are removed.
        say: told once that the page cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, start_step: int):
        self._folder, self._say = folder, say
        self._due, self._failed = 0.0, False
        self._try(lambda: drop_frames(folder, start_step))

    def add(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Keep uint8 [3, H, W] pictures of `step` for the page, and write it."""
        self._try(lambda: add_frames(self._folder, step, pictures))
        self.write()

    def write(self, *, last: bool = False) -> None:
        """Write it, unless it was written a short time ago. last: in any case."""
        begun = time.monotonic()
        if begun < self._due and not last:
            return
        self._try(lambda: write_page(self._folder))
        ended = time.monotonic()
        self._due = ended + (ended - begun) / _SHARE

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # no fault of a page is worth the end of a run
            if not self._failed:
                self._say(f"the page of the run could not be written: {type(error).__name__}: {error}")
            self._failed = True
