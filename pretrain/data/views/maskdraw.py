"""Draws the masks of masks.py for the samples of one micro-batch, keyed by seed, position and step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.data.sampling import keyed
from pretrain.data.views.blockmask import fill_up, one_block, place_blocks
from pretrain.data.views.masks import (
    BlockMask,
    InverseBlockMask,
    MultiBlockMask,
    PartMask,
    RatioBlockMask,
    StratifiedBlockMask,
)
from pretrain.data.views.multiblock import multi_block
from pretrain.data.views.specs import Mask


@dataclass(frozen=True)
class BatchPosition:
    """The samples of a micro-batch and their step: all that masks may depend on.

    Attributes:
        positions: of the micro-batch's samples, int64 [b], within [first, first + global_batch).
        first: position of the first sample of the step. It identifies the step, and unlike a step number it keeps its
            meaning if the global batch size was different earlier in the run.
        epoch_length: samples of one epoch.
    """

    seed: int
    positions: np.ndarray
    first: int
    global_batch: int
    epoch_length: int

    @property
    def rows(self) -> np.ndarray:
        """Index of the samples in the global batch."""
        return self.positions - self.first


def draw(mask: Mask, at: BatchPosition) -> dict[str, np.ndarray]:
    """The batch entries of `mask`, see the classes of masks.py for shapes."""
    if isinstance(mask, MultiBlockMask):
        drawn = multi_block(mask, at.rows, seed=at.seed, first=at.first, global_batch=at.global_batch)
        return dict(zip(mask.entries, drawn, strict=True))
    if isinstance(mask, BlockMask):
        masks = np.stack([[_block(mask, at.seed, p, slot) for slot in range(mask.count)] for p in _list(at)])
        return {mask.name: masks if mask.count > 1 else masks[:, 0]}
    if isinstance(mask, RatioBlockMask):
        return {mask.name: np.stack([[_ratio(mask, at, p, slot) for slot in range(mask.count)] for p in _list(at)])}
    if isinstance(mask, StratifiedBlockMask):
        return {mask.name: _stratified(mask, at)}
    if isinstance(mask, InverseBlockMask):
        return {mask.name: np.stack([_inverse(mask, at.seed, position) for position in _list(at)])}
    if isinstance(mask, PartMask):
        parts = zip(*(_part(mask, at.seed, position) for position in _list(at)), strict=True)
        return {name: np.stack(part) for name, part in zip(mask.entries, parts, strict=True)}
    raise TypeError(f"mask {mask.name!r}: no rule draws a {type(mask).__name__}")


def _block(mask: BlockMask, seed: int, position: int, slot: int) -> np.ndarray:
    purpose = keyed.mask_purpose(mask.name)
    largest = mask.num_masked if mask.max_per_block is None else mask.max_per_block
    numbers = keyed.stream(seed, position, purpose, 2 * slot)
    placed, _ = place_blocks(mask.grid, mask.num_masked, mask.min_per_block, largest, mask.min_aspect, numbers)
    hidden = placed.reshape(-1)
    if not mask.exact:
        return hidden
    ranks = keyed.uniforms(seed, position, purpose, 2 * slot + 1, count=mask.num_patches)
    return fill_up(hidden, mask.num_masked, ranks)


def _ratio(mask: RatioBlockMask, at: BatchPosition, position: int, slot: int) -> np.ndarray:
    if position // at.epoch_length < mask.start_epoch:
        return np.zeros(mask.num_patches, bool)
    purpose = keyed.mask_purpose(mask.name)
    numbers = keyed.stream(at.seed, position, purpose, 2 * slot)
    pair = int(next(numbers) * len(mask.ratio))
    share = mask.ratio[pair] + mask.ratio_var[pair] * (2 * next(numbers) - 1)
    if mask.shape == "block":
        goal = share * mask.num_patches
        return place_blocks(mask.grid, goal, mask.smallest_block, goal, mask.min_aspect, numbers)[0].reshape(-1)
    ranks = keyed.uniforms(at.seed, position, purpose, 2 * slot + 1, count=mask.num_patches)
    return fill_up(np.zeros(mask.num_patches, bool), int(share * mask.num_patches), ranks)


def _stratified(mask: StratifiedBlockMask, at: BatchPosition) -> np.ndarray:
    purpose, views = keyed.mask_purpose(mask.name), mask.count * at.global_batch
    bins = int(views * mask.prob)
    edges = np.linspace(*mask.ratio, bins + 1)
    places = keyed.permutation(at.seed, at.first, purpose, mask.count, length=views).reshape(-1, mask.count)
    hidden = np.zeros((len(at.positions), mask.count, mask.num_patches), bool)
    for row, (position, index) in enumerate(zip(_list(at), at.rows.tolist(), strict=True)):
        for slot in range(mask.count):
            place = places[index, slot]
            if place >= bins:
                continue
            numbers = keyed.stream(at.seed, position, purpose, slot)
            share = edges[place] + (edges[place + 1] - edges[place]) * next(numbers)
            goal = int(mask.num_patches * (edges[place + 1] if mask.exact else share))
            placed, _ = place_blocks(mask.grid, goal, mask.min_patches, mask.max_patches, mask.min_aspect, numbers)
            if mask.exact:
                ranks = keyed.uniforms(at.seed, position, purpose, mask.count + 1 + slot, count=mask.num_patches)
                placed = fill_up(placed.reshape(-1), goal, ranks).reshape(mask.grid)
            if mask.roll:
                shift = keyed.uniforms(at.seed, position, purpose, 2 * mask.count + 1 + slot, count=2)
                placed = np.roll(placed, (shift * mask.grid).astype(np.int64), axis=(0, 1))
            hidden[row, slot] = placed.reshape(-1)
    return hidden


def _inverse(mask: InverseBlockMask, seed: int, position: int) -> np.ndarray:
    purpose, (rows, columns) = keyed.mask_purpose(mask.name), mask.grid
    numbers = keyed.uniforms(seed, position, purpose, 0, count=mask.count * (mask.num_blocks + mask.num_patches))
    starts, ranks = np.split(numbers, [mask.count * mask.num_blocks])
    centres = (starts * mask.num_patches).astype(np.int64).reshape(mask.count, mask.num_blocks, 1, 1)
    reach = np.arange(mask.block) - mask.block // 2
    at_row = np.clip(centres // columns + reach[:, None], 0, rows - 1)
    at_column = np.clip(centres % columns + reach, 0, columns - 1)
    visible = np.zeros((mask.count, mask.num_patches), bool)
    np.put_along_axis(visible, (at_row * columns + at_column).reshape(mask.count, -1), True, axis=1)
    return ~fill_up(visible, mask.num_visible, ranks.reshape(mask.count, -1))


def _part(mask: PartMask, seed: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Visible and predicted patches of one image."""
    purpose = keyed.mask_purpose(mask.name)
    ranks = keyed.uniforms(seed, position, purpose, 1, count=mask.num_patches)
    if mask.shape == "random":
        hidden = fill_up(np.zeros(mask.num_patches, bool), mask.num_hidden, ranks)
    else:
        inverse = mask.shape == "inverse_block"
        size = mask.num_patches - mask.num_hidden if inverse else mask.num_hidden
        numbers = keyed.stream(seed, position, purpose, 0)
        block = one_block(mask.grid, size, mask.aspect, numbers, roll=mask.roll)
        hidden = block.reshape(-1) != inverse
    ranks = keyed.uniforms(seed, position, purpose, 2, count=mask.num_patches)
    chosen = np.argsort(np.where(hidden, ranks, 1 + ranks), kind="stable")[: mask.num_predicted]
    return np.flatnonzero(~hidden), np.sort(chosen)


def _list(at: BatchPosition) -> list[int]:
    return at.positions.tolist()
