"""Numbers of blocks: which of them give maps, and which attend to the complete image."""

from __future__ import annotations

from collections.abc import Sequence


def four_blocks(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of `depth` blocks (ViTDet: 2, 5, 8, 11 of 12)."""
    return tuple(sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)}))


def global_blocks(depth: int, window: int | None, given: Sequence[int] | None) -> tuple[int, ...]:
    """The blocks that attend to the complete image: all without windows, else the `given` ones, by default four.

    Raises:
        ValueError: `given` does not fit, or the window is not positive.
    """
    if window is None:
        if given is not None:
            raise ValueError("global_blocks without a window: every block is global already; give window too")
        return tuple(range(depth))
    if window < 1:
        raise ValueError(f"window {window}: expected at least 1 token")
    return ascending("global_blocks", four_blocks(depth) if given is None else given, depth)


def ascending(what: str, indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """`indices` of blocks as a tuple.

    Raises:
        ValueError: they do not ascend within the `depth`, or there are none; the message calls them `what`.
    """
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth:
        raise ValueError(f"{what} must ascend within 0 to {depth - 1}, got {list(indices)}")
    return tuple(indices)
