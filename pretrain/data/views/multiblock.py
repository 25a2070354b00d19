"""Context and target blocks of I-JEPA for a complete step at once, so that every rank knows the shortest context."""

from __future__ import annotations

import numpy as np

from pretrain.data.sampling import keyed
from pretrain.data.views.masks import MultiBlockMask

_TRIES = 20
_SIZES, _TARGETS, _FIRST_CONTEXT = 0, 1, 2  # parts of the keyed stream


def multi_block(
    mask: MultiBlockMask, rows: np.ndarray, *, seed: int, first: int, global_batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """(context int64 [r, num_contexts, K], targets int64 [r, num_targets, K']) of `rows` of the global batch.

    `first` is the position of the step's first sample.
    """
    purpose = keyed.mask_purpose(mask.name)
    for_target, for_context = keyed.uniforms(seed, first, purpose, _SIZES, count=2).tolist()
    target_size, context_size = mask.target_size(for_target), mask.context_size(for_context)
    draws = keyed.uniforms(seed, first, purpose, _TARGETS, count=global_batch * mask.num_targets * 2)
    corners = _corners(draws.reshape(global_batch, mask.num_targets, 2), mask.grid, target_size)
    allowed = np.ones((global_batch, mask.num_patches), bool)
    if not mask.allow_overlap:
        for target in range(mask.num_targets):
            allowed &= ~_cells(corners[:, target], mask.grid, target_size)
    contexts = [
        _context(mask, context_size, corners, target_size, allowed, key=(seed, first, purpose), slot=slot)
        for slot in range(mask.num_contexts)
    ]
    length = min(int(context.sum(1).min()) for context in contexts)
    chosen = np.stack([context[rows] for context in contexts], axis=1)
    targets = np.stack([_cells(corners[rows, t], mask.grid, target_size) for t in range(mask.num_targets)], axis=1)
    return _first_indices(chosen, length), _first_indices(targets, target_size[0] * target_size[1])


def _context(
    mask: MultiBlockMask,
    size: tuple[int, int],
    corners: np.ndarray,
    target_size: tuple[int, int],
    allowed: np.ndarray,
    *,
    key: tuple[int, int, int],
    slot: int,
) -> np.ndarray:
    """One context per image of the step, bool [B, N]: drawn again if too few patches are outside the targets."""
    batch, found = len(allowed), np.zeros_like(allowed)
    pending, free = np.arange(batch), allowed
    for attempt in range(_TRIES * (mask.num_targets + 1)):
        draws = keyed.uniforms(*key, _FIRST_CONTEXT + slot + mask.num_contexts * attempt, count=2 * batch)
        place = _corners(draws.reshape(batch, 2)[pending], mask.grid, size)
        if attempt and attempt % _TRIES == 0:  # the last of the targets may be overlapped from here on
            free = np.ones_like(allowed)
            for target in range(mask.num_targets - attempt // _TRIES):
                free[pending] &= ~_cells(corners[pending, target], mask.grid, target_size)
        found[pending] = _cells(place, mask.grid, size) & free[pending]
        pending = pending[found[pending].sum(1) <= mask.min_keep]
        if not len(pending):
            return found
    raise AssertionError(f"mask {mask.name!r}: a full context block of {size} is not above min_keep {mask.min_keep}")


def _corners(draws: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """(top, left) int64 [..., 2]; the last row and column are never reached (see MultiBlockMask)."""
    return (draws * (grid[0] - size[0], grid[1] - size[1])).astype(np.int64)


def _cells(corners: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The patches of blocks with corners [k, 2]: bool [k, N]."""
    inside = [
        (np.arange(side) >= start[:, None]) & (np.arange(side) < start[:, None] + length)
        for side, length, start in zip(grid, size, corners.T, strict=True)
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :]).reshape(len(corners), -1)


def _first_indices(chosen: np.ndarray, length: int) -> np.ndarray:
    """The first `length` indices where `chosen` bool [r, n, N] is True: int64 [r, n, length]."""
    return np.argsort(~chosen, axis=-1, kind="stable")[..., :length]
