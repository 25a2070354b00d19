"""`fovea` with steps made longer by SLOW_SECONDS: something can happen to the run, and its numbers stay the same."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any


def main() -> int:
    if sys.argv[1:3] == ["-m", "launch.cli"]:
        del sys.argv[1:3]
    if sys.argv[1] == "pretrain":
        from pretrain.feed import Feed

        batches = Feed.__iter__

        def slowly(self: Feed) -> Iterator[Any]:
            for batch in batches(self):
                time.sleep(float(os.environ["SLOW_SECONDS"]))
                yield batch

        Feed.__iter__ = slowly
    from launch.cli import main as fovea

    return fovea(sys.argv[1:])


if __name__ == "__main__":  # data workers import this file
    sys.exit(main())
