from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pretrain.data.views.maskdraw import BatchPosition, draw
from pretrain.data.views.masks import (
    BlockMask,
    InverseBlockMask,
    MultiBlockMask,
    PartMask,
    RatioBlockMask,
    StratifiedBlockMask,
)
from pretrain.data.views.specs import Mask

GRID = (7, 9)
EXAMPLES: list[Mask] = [
    BlockMask("m", GRID, 24, min_per_block=4),
    BlockMask("m", GRID, 24, min_per_block=4, exact=True, count=2),
    RatioBlockMask("m", GRID, 3, (0.0, 0.3), (0.0, 0.2)),
    RatioBlockMask("m", GRID, shape="rand"),
    StratifiedBlockMask("m", GRID),
    StratifiedBlockMask("m", GRID, exact=True, roll=True),
    MultiBlockMask("m", GRID, min_keep=2),
    InverseBlockMask("m", GRID, 0.8, count=4),
    PartMask("m", GRID, predicted=0.3),
    PartMask("m", GRID, predicted=0.3, shape="block", roll=False),
    PartMask("m", GRID, predicted=0.3, shape="random"),
]
names = [f"{type(mask).__name__}{index}" for index, mask in enumerate(EXAMPLES)]
grids = st.tuples(st.integers(3, 16), st.integers(3, 16))
seeds = st.integers(0, 2**63)


def place(positions: np.ndarray, first: int, batch: int, *, seed: int = 0, epoch: int = 10**9) -> BatchPosition:
    return BatchPosition(seed=seed, positions=positions, first=first, global_batch=batch, epoch_length=epoch)


def whole(mask: Mask, batch: int = 8, first: int = 0, **more: int) -> dict[str, np.ndarray]:
    """The masks of all samples of a step."""
    return draw(mask, place(np.arange(first, first + batch), first, batch, **more))


@pytest.mark.parametrize("mask", EXAMPLES, ids=names)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, step=st.integers(0, 1000), cuts=st.sets(st.integers(1, 11)))
def test_masks_are_the_same_however_the_global_batch_is_divided(mask, seed, step, cuts):
    batch, first = 12, 12 * step
    expected = whole(mask, batch, first, seed=seed)
    parts = np.split(np.arange(first, first + batch), sorted(cuts))
    drawn = [draw(mask, place(part, first, batch, seed=seed)) for part in parts]
    for name in mask.entries:
        assert (np.concatenate([entry[name] for entry in drawn]) == expected[name]).all()


@pytest.mark.parametrize("mask", EXAMPLES, ids=names)
def test_another_seed_step_or_name_gives_other_masks(mask):
    def of(other: Mask, first: int = 0, seed: int = 0) -> bytes:
        return b"".join(array.tobytes() for array in whole(other, 64, first, seed=seed).values())

    renamed = type(mask)(**{**vars(mask), "name": "n"})
    assert len({of(mask), of(mask, first=64), of(mask, seed=1), of(renamed)}) == 4


@pytest.mark.parametrize("mask", EXAMPLES, ids=names)
def test_every_instance_and_image_has_a_mask_of_its_own(mask):
    for array in whole(mask, 16).values():
        assert len({row.tobytes() for row in array}) > 8
        if array.ndim == 3 and array.shape[1] > 1:
            assert len({one.tobytes() for row in array for one in row}) > 8


@settings(max_examples=60, deadline=None)
@given(grids, seeds, st.data())
def test_block_masks_never_hide_more_than_num_masked_and_exact_ones_equal_it(grid, seed, data):
    total = grid[0] * grid[1]
    wanted = data.draw(st.integers(1, total - 1))
    smallest = data.draw(st.integers(1, 16))
    try:
        loose, exact = (BlockMask("m", grid, wanted, min_per_block=smallest, exact=e) for e in (False, True))
    except ValueError:
        assume(False)
        raise
    hidden = whole(loose, 4, seed=seed)["m"]
    filled = whole(exact, 4, seed=seed)["m"]
    assert hidden.shape == filled.shape == (4, total) and hidden.dtype == bool
    assert hidden.sum(1).max() <= wanted
    assert (filled.sum(1) == wanted).all()
    assert (filled | ~hidden).all()  # exact only adds to the blocks


@settings(max_examples=40, deadline=None)
@given(grids, seeds, st.floats(0, 0.6), st.floats(0, 1), st.sampled_from(["block", "rand"]))
def test_a_ratio_mask_hides_at_most_its_largest_share(grid, seed, ratio, var, shape):
    var, total = min(ratio, 0.9 - ratio) * var, grid[0] * grid[1]
    assume(np.ceil((ratio + var) * total) < total)
    hidden = whole(RatioBlockMask("m", grid, 2, (ratio,), (var,), shape=shape), 4, seed=seed)["m"]
    assert hidden.sum(2).max() <= (ratio + var) * total + 1e-9
    if shape == "rand":
        assert hidden.sum(2).min() >= int((ratio - var) * total) - 1


def test_a_ratio_of_zero_and_the_epochs_before_the_start_hide_nothing():
    assert not whole(RatioBlockMask("m", GRID, ratio=(0.0,), ratio_var=(0.0,)))["m"].any()
    later = RatioBlockMask("m", GRID, ratio=(0.4,), ratio_var=(0.1,), start_epoch=2)
    assert not whole(later, 8, first=8, epoch=8)["m"].any()
    assert whole(later, 8, first=16, epoch=8)["m"].any()


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 20), st.floats(0.1, 1), st.integers(1, 3))
def test_a_step_has_one_masked_view_for_each_bin_of_the_ratio(seed, batch, prob, count):
    mask = StratifiedBlockMask("m", (14, 14), count, (0.1, 0.5), prob)
    counts = np.sort(whole(mask, batch, seed=seed)["m"].sum(2).reshape(-1))
    bins = int(count * batch * prob)
    assert not counts[: len(counts) - bins].any()
    largest = np.linspace(0.1, 0.5, bins + 1)[1:] * 196
    assert (counts[len(counts) - bins :] <= largest + 1e-9).all()
    assert (counts[len(counts) - bins :] >= 1).all()


@pytest.mark.parametrize("roll", [False, True])
def test_exact_masks_hide_the_upper_end_of_their_bins(roll: bool):
    mask = StratifiedBlockMask("m", (14, 14), ratio=(0.1, 0.5), exact=True, roll=roll)
    counts = np.sort(whole(mask, 8)["m"].sum(2).reshape(-1))
    assert counts.tolist() == [0] * 8 + [int(196 * share) for share in np.linspace(0.1, 0.5, 9)[1:]]


def test_a_rolled_mask_is_the_same_mask_shifted_around_the_edges():
    plain, rolled = (StratifiedBlockMask("m", GRID, prob=1.0, roll=roll) for roll in (False, True))
    moved = 0
    for before, after in zip(*(whole(mask)["m"].reshape(-1, *GRID) for mask in (plain, rolled)), strict=True):
        shifts = [np.roll(before, (y, x), (0, 1)) for y in range(GRID[0]) for x in range(GRID[1])]
        assert any(np.array_equal(after, shifted) for shifted in shifts)
        moved += not np.array_equal(after, before)
    assert moved > 8


@settings(max_examples=40, deadline=None)
@given(grids, seeds, st.integers(1, 12), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_a_context_shares_no_patch_with_the_targets(grid, seed, batch, targets, contexts, overlap):
    try:
        mask = MultiBlockMask(
            "m", grid, num_targets=targets, num_contexts=contexts, min_keep=0, allow_overlap=overlap,
            target_scale=(0.1, 0.2),
        )  # fmt: skip
    except ValueError:
        assume(False)
        raise
    context, target = whole(mask, batch, seed=seed).values()
    assert context.shape[:2] == (batch, contexts) and target.shape[:2] == (batch, targets)
    assert context.dtype == target.dtype == np.int64
    for indices in (context, target):
        rows, columns = indices // grid[1], indices % grid[1]
        assert rows.max() < grid[0] - 1 and columns.max() < grid[1] - 1  # the last ones are never reached
        assert (np.diff(indices, axis=2) > 0).all()
    height = np.ptp(target // grid[1], axis=2) + 1
    width = np.ptp(target % grid[1], axis=2) + 1
    assert (height * width == target.shape[2]).all()  # targets are whole rectangles
    if not overlap:
        # Three targets of a fifth each cannot cover a context of at least 0.85 on any of these grids but small ones.
        shared = [set(c.reshape(-1)) & set(t.reshape(-1)) for c, t in zip(context, target, strict=True)]
        assert not any(shared) or 0.2 * targets * grid[0] * grid[1] >= 0.5 * (grid[0] - 1) * (grid[1] - 1)


def test_the_context_is_as_long_as_the_shortest_of_the_global_batch():
    mask = MultiBlockMask("m", (16, 16))
    lengths = {first: whole(mask, 64, first)["m_context"].shape[2] for first in range(0, 640, 64)}
    alone = [draw(mask, place(np.arange(f, f + 1), f, 64))["m_context"].shape[2] for f in lengths]
    assert alone == list(lengths.values())
    assert min(lengths.values()) > mask.min_keep


def test_a_context_that_finds_no_room_may_overlap_the_last_targets():
    covering = MultiBlockMask("m", (8, 8), target_scale=(0.8, 0.8), aspect=(1.0, 1.0), num_targets=4, min_keep=10)
    context, target = whole(covering, 8).values()
    assert context.shape[2] > 10
    assert set(context[0].reshape(-1)) & set(target[0].reshape(-1))


@settings(max_examples=40, deadline=None)
@given(grids, seeds, st.floats(0.3, 0.9), st.integers(1, 4), st.integers(1, 5))
def test_inverse_blocks_hide_one_number_of_patches_in_every_clone(grid, seed, ratio, block, count):
    total = grid[0] * grid[1]
    assume(int(total * (1 - ratio)) >= 1)
    hidden = whole(InverseBlockMask("m", grid, ratio, block, count=count), 3, seed=seed)["m"]
    assert hidden.shape == (3, count, total)
    assert (hidden.sum(2) == total - int(total * (1 - ratio))).all()


def test_inverse_blocks_leave_blocks_visible_rather_than_single_patches():
    visible = ~whole(InverseBlockMask("m", (14, 14), 0.8), 400)["m"].reshape(-1, 14, 14)
    neighbours = (visible[:, :-1] & visible[:, 1:]).mean()
    assert neighbours > 3 * 0.2 * 0.2  # of single patches both would be visible in 4 % of the pairs


@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=seeds, ratio=st.floats(0.1, 0.9), roll=st.booleans(), inverse=st.booleans())
def test_the_visible_or_the_hidden_patches_are_one_block_of_an_exact_number(grid, seed, ratio, roll, inverse):
    shape = "inverse_block" if inverse else "block"
    assume(int(grid[0] * grid[1] * ratio) > 0)
    mask = PartMask("m", grid, ratio, predicted=1.0, shape=shape, roll=roll)
    visible, predicted = whole(mask, 4, seed=seed).values()
    assert visible.shape == (4, mask.num_patches - mask.num_hidden) and predicted.shape == (4, mask.num_hidden)
    assert (np.sort(np.concatenate([visible, predicted], axis=1)) == np.arange(mask.num_patches)).all()
    for patches in visible if inverse else predicted:
        rows, columns = np.unravel_index(patches, grid)
        if not roll:  # a rectangle, of which at most the end is missing
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            whole_rows = [np.count_nonzero(rows == row) for row in range(rows.min(), rows.max())]
            assert whole_rows == [width] * (height - 1)
        for lines, side in ((rows, grid[0]), (columns, grid[1])):
            taken = np.isin(np.arange(side), lines)
            assert np.count_nonzero(taken & ~np.roll(taken, 1)) <= 1


def test_a_part_of_the_hidden_patches_is_predicted_at_random():
    mask = PartMask("m", (16, 16), 0.65, predicted=0.05)
    visible, predicted = whole(mask, 500).values()
    assert visible.shape[1] == 90 and predicted.shape[1] == 8
    assert not any(np.isin(few, seen).any() for few, seen in zip(predicted, visible, strict=True))
    counts = np.bincount(predicted.reshape(-1), minlength=256)
    assert abs(counts - 500 * 8 / 256).max() < 6 * np.sqrt(500 * 8 / 256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMask("m", (4, 4), 16), "16 of 16 patches hidden; .* one visible"),
        (lambda: BlockMask("m", (4, 4), 0), "0 of 16"),
        (lambda: BlockMask("m", (1, 16), 4), "grid 1 x 16, of which it may not fill"),
        (lambda: BlockMask("m", (3, 3), 8, min_per_block=8), "no block of 8 patches"),
        (lambda: BlockMask("m", (14, 14), 75, max_per_block=8), "max_per_block 8 is below"),
        (lambda: BlockMask("m", (14, 14), 75, min_aspect=0.0), "min_aspect"),
        (lambda: BlockMask("m", (0, 4), 1), "grid"),
        (lambda: BlockMask("bad", (4, 4), 1), "bad"),
        (lambda: BlockMask("m", (14, 14), 75, count=0), "count"),
        (lambda: RatioBlockMask("m", GRID, ratio=(0.9,), ratio_var=(0.2,)), "leave one visible"),
        (lambda: RatioBlockMask("m", GRID, ratio=(0.1,), ratio_var=(0.2,)), "0.1 .* 0.2"),
        (lambda: RatioBlockMask("m", GRID, ratio=(0.1,)), "one length"),
        (lambda: RatioBlockMask("m", GRID, shape="round"), "round"),  # pyright: ignore[reportArgumentType]
        (lambda: StratifiedBlockMask("m", GRID, ratio=(0.5, 1.0)), "visible"),
        (lambda: StratifiedBlockMask("m", GRID, prob=1.5), "prob"),
        (lambda: MultiBlockMask("m", (3, 4)), "not more than min_keep 10; lower min_keep or raise target_scale"),
        (lambda: MultiBlockMask("m", (16, 16), context_scale=(0.01, 0.1)), "raise context_scale"),
        (lambda: MultiBlockMask("m", (16, 16), aspect=(2.0, 1.0)), "aspect"),
        (lambda: MultiBlockMask("m", (16, 16), num_targets=0), "num_targets"),
        (lambda: InverseBlockMask("m", (3, 3), 0.95), "leave one visible"),
        (lambda: InverseBlockMask("m", (3, 3), 0.0), "hide one"),
        (lambda: InverseBlockMask("m", GRID, 0.8, block=0), "block"),
        (lambda: PartMask("m", (3, 3), 0.65, predicted=0.1), "hide 5 of 9 patches and predict 0"),
        (lambda: PartMask("m", GRID, shape="round"), "round"),  # pyright: ignore[reportArgumentType]
        (lambda: PartMask("m", GRID, aspect=(2.0, 1.0)), "aspect"),
    ],
)
def test_impossible_masks_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.processes
def test_mask_specifications_do_not_import_torch():
    code = "import sys, pretrain.data.views.masks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
