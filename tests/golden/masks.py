"""Compares the masks with statistics of the official mask generators.

Theirs come from other random numbers, so frequencies and means are compared within 5 standard errors of the difference
of two samples, theirs and ours. What is certain is compared exactly: counts that never vary, cells never covered, the
largest and smallest possible. The first masks of the official generators (`expect/first*`) cannot be met by another
generator of random numbers; it is checked that they are masks ours could have drawn: their shape, and their counts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.data.sampling import keyed
from pretrain.data.views.blockmask import Block, place_blocks
from pretrain.data.views.maskdraw import BatchPosition, draw
from pretrain.data.views.masks import BlockMask, MultiBlockMask, PartMask, RatioBlockMask, StratifiedBlockMask
from pretrain.data.views.specs import Mask
from tests.golden.capi import mask_options
from tests.golden.case import Case

_SIGMAS = 5.0
_DRAWS = 4000


def run_beit(case: Case) -> None:
    config = case.config
    if "num_masking_patches" in config:
        keys, exact = ("num_masking_patches", "min_num_patches", "max_num_patches"), False
    else:
        keys, exact = ("n", "min", "max"), True
    _only(case, "input_size", *keys)
    grid = _pair(config["input_size"])
    goal, smallest, largest = (config[key] for key in keys)
    mask = BlockMask("m", grid, goal, min_per_block=smallest, max_per_block=largest, exact=exact)
    masks = _draw(mask, _DRAWS)[:, None].reshape(_DRAWS, *grid)
    _compare_masks(case, masks, goal=goal)
    if exact:
        return
    blocks = [_blocks(mask, position) for position in range(_DRAWS)]
    _near(case, "expect/blocks_per_mask", torch.tensor([float(len(placed)) for placed in blocks]))
    heights, widths = torch.tensor([block[2:] for placed in blocks for block in placed]).double().unbind(1)
    counts = masks.flatten(1).sum(1).double()
    theirs = float(case["expect/blocks_per_mask"].sum())  # accepted blocks are their sample
    draws = len(case["expect/masked_count"])
    aspects, areas = heights / widths, heights * widths
    _near_mean(case, "expect/mean_masked_count", counts, draws)
    _near_deviation(case, "expect/std_masked_count", counts, draws)
    _near_mean(case, "expect/mean_block_aspect_h_over_w", aspects, theirs)
    _near_mean(case, "expect/mean_log_block_aspect", aspects.log(), theirs)
    _near_deviation(case, "expect/std_log_block_aspect", aspects.log(), theirs)
    _near_mean(case, "expect/mean_block_area", areas, theirs)
    _near_shares(case, "expect/block_area_hist", torch.bincount(areas.long(), minlength=grid[0] * grid[1] + 1))


def run_ibot(case: Case) -> None:
    config = case.config
    _only(case, "size", "psz", "pred_ratio", "pred_ratio_var", "pred_shape", "pred_aspect_ratio", "pred_start_epoch")
    side = config["size"] // config["psz"]
    ratio, var = (_tuple(config[key]) for key in ("pred_ratio", "pred_ratio_var"))
    low, high = config.get("pred_aspect_ratio", (0.3, 1 / 0.3))
    assert abs(low * high - 1) < 1e-9, f"{case.name}: the range of aspects {low} to {high} is not symmetric"
    assert config.get("pred_start_epoch", 0) == 0, f"{case.name}: statistics of whole epochs without masks"
    mask = RatioBlockMask(
        "m", (side, side), 1, ratio, var * len(ratio) if len(var) == 1 else var, low, shape=config["pred_shape"]
    )
    masks = _draw(mask, _DRAWS).reshape(_DRAWS, side, side)
    most = max(a + b for a, b in zip(mask.ratio, mask.ratio_var, strict=True)) * side * side
    _compare_masks(case, masks, goal=int(most))


def run_dinov2(case: Case) -> None:
    config = case.config
    _only(case, "batch", "g", "ratio", "prob", "min_num_patches")
    side, batch = config["g"], config["batch"]
    mask = StratifiedBlockMask(
        "m", (side, side), 2, _pair(config["ratio"]), config["prob"], config.get("min_num_patches", 4)
    )
    steps = _DRAWS // batch
    masks = torch.cat([_batch(mask, step, batch)[0] for step in range(steps)])  # [steps * batch, 2, N]
    counts = masks.view(steps, 2 * batch, -1).sum(2)
    expect = case["expect/masked_count"]
    bins = int(2 * batch * config["prob"])
    low, high = config["ratio"]
    most = (torch.linspace(low, high, bins + 1)[1:] * (side * side)).floor()  # hidden patches of each bin
    for sample in (counts, expect):  # each bin was drawn once, whichever view has it
        ordered = sample.sort(dim=1).values
        assert bool((ordered[:, : 2 * batch - bins] == 0).all())
        assert bool((ordered[:, 2 * batch - bins :] <= most).all())
    case.check("expect/upperbound", most.sum().long().expand(len(expect)))
    _near(case, "expect/masked_count", counts.double().flatten(), expect.double().flatten())
    _near(case, "expect/n_masked_patches", counts.sum(1).double())
    _near_frequencies(case, "expect/cell_frequency", masks.view(steps, 2 * batch, side, side).double().mean(1))


def run_dinov3(case: Case) -> None:
    config = case.config
    case.only("grid", "batch", "ratio", "probability", "circular_shift", "iterations")
    grid, batch, steps = _pair(config["grid"]), config["batch"], config["iterations"]
    roll = config["circular_shift"]
    mask = StratifiedBlockMask("m", grid, 2, _pair(config["ratio"]), config["probability"], exact=True, roll=roll)
    draws = torch.cat([_batch(mask, step, batch)[0] for step in range(steps)]).flatten(0, 1)  # [steps * 2 * batch, N]
    counts = draws.sum(1)
    case.check("expect/histogram_of_counts", torch.bincount(counts, minlength=mask.num_patches + 1))
    each = counts.view(steps, -1).sum(1)
    case.check("expect/upperbound", each[:1].expand(len(case["expect/upperbound"])))
    first = case["expect/first"]
    assert first.shape[1:] == (2 * batch, mask.num_patches)
    assert torch.equal(first.sum(2).sort(1).values, counts.view(steps, -1)[: len(first)].sort(1).values)
    case.due.discard("expect/first")
    case.due.discard("expect/masked_per_position")
    ours, theirs = draws.double().mean(0), case["expect/masked_per_position"].double() / len(draws)
    _within(case, "masked per position", ours, theirs, (draws.double().var(0) * (2 / len(draws))).sqrt())


def run_capi(case: Case) -> None:
    config = case.config
    case.only(
        "grid", "batch", "iterations", "mask_ratio", "prediction_subsampling", "masking", "masking_kwargs", "draws"
    )
    grid, batch, steps = _pair(config["grid"]), config["batch"], config["iterations"]
    options = mask_options(case)
    mask = PartMask(
        "m", grid, options["mask_ratio"], options["predicted_ratio"], options["mask_shape"], options["mask_aspect"],
        options["mask_roll"],
    )  # fmt: skip
    drawn = zip(*(_batch(mask, step, batch) for step in range(steps)), strict=True)
    for kind, first, indices in zip(("visible", "predicted"), ("visible", "predict"), drawn, strict=True):
        each = torch.stack(indices)  # [steps, b, count]
        case.check(f"expect/{kind}_per_image", torch.tensor(each.shape[2]))
        cells = torch.zeros(steps * batch, mask.num_patches).scatter_(1, each.flatten(0, 1), 1).double()
        theirs = case[f"expect/{kind}_per_position"].double() / len(cells)
        case.due.discard(f"expect/{kind}_per_position")
        error = (cells.var(0) * (2 / len(cells))).sqrt().clamp(min=1 / len(cells))
        _within(case, f"{kind} per position", cells.mean(0), theirs, error)
        official = case[f"expect/first/{first}_indices"].view(batch, -1)
        case.due.discard(f"expect/first/{first}_indices")
        assert official.shape == each.shape[1:], f"{case.name}: {first} {official.shape}, ours {each.shape[1:]}"
        assert torch.equal(official // mask.num_patches, torch.arange(batch)[:, None].expand_as(official))
        if kind == "visible":
            visible, own = official % mask.num_patches, each[:batch].flatten(0, 1)
            for sample in (visible, own):
                seen = torch.zeros(len(sample), mask.num_patches, dtype=torch.bool).scatter_(1, sample, True)
                assert all(_is_one_block(one.view(grid), mask) for one in seen), f"{case.name}: more than one block"


def _is_one_block(visible: Tensor, mask: PartMask) -> bool:
    """Whether the patches of the block lie, but for a missing end, in one rectangle of a possible shape, perhaps rolled
    around the edges."""
    if mask.shape == "random":
        return True
    block = visible if mask.shape == "inverse_block" else ~visible
    sides = []
    for axis in (1, 0):
        line = block.any(axis)
        starts = int((line & ~line.roll(1)).sum())
        if starts > 1 or (not mask.roll and bool(line[0] and line[-1]) and not bool(line.all())):
            return False
        sides.append(int(line.sum()))
    return sides[0] * sides[1] - int(block.sum()) < max(2 * sides[1], sides[0] + sides[1])


def run_ijepa(case: Case) -> None:
    config = case.config
    _only(case, "size", "patch", "batch", "mask")
    options = case.take(
        "mask", "enc_mask_scale", "pred_mask_scale", "aspect_ratio", "nenc", "npred", "min_keep", "allow_overlap"
    )
    side, batch = config["size"] // config["patch"], config["batch"]
    mask = MultiBlockMask(
        "m", (side, side), _pair(options["enc_mask_scale"]), _pair(options["pred_mask_scale"]),
        _pair(options["aspect_ratio"]), options["npred"], options["nenc"], options["min_keep"],
        options.get("allow_overlap", False),
    )  # fmt: skip
    contexts, targets, overlap = [], [], 0
    steps = config["draws"]
    for step in range(steps):
        context, target = _batch(mask, step, batch)
        contexts.append(context)
        targets.append(target)
        hidden = _cells(target, side).any(1, keepdim=True)
        overlap += int((_cells(context, side) & hidden).sum())
    _sizes(case, mask)
    for key, sample in (("enc", contexts), ("pred", targets)):
        _near(case, f"expect/{key}_len", torch.tensor([float(indices.shape[2]) for indices in sample]))
        _near_mean(case, f"expect/mean_{key}_len", torch.tensor([float(i.shape[2]) for i in sample]), config["draws"])
        cells = torch.stack([_cells(indices, side).double().mean((0, 1)) for indices in sample])
        never = case[f"expect/{key}_cell_frequency"].view(side, side)
        assert not bool(cells.view(-1, side, side)[:, -1].any() or cells.view(-1, side, side)[:, :, -1].any())
        assert not bool(never[-1].any() or never[:, -1].any()), f"{case.name}: {key} reaches the last row or column"
        _near_frequencies(case, f"expect/{key}_cell_frequency", cells)
    # None, or some: where targets leave too little room, or overlap is allowed.
    assert (overlap > 0) == (int(case["expect/overlapping_indices"]) > 0)
    case.due.discard("expect/overlapping_indices")
    for key in [key for key in case.due if key.startswith("expect/first/")]:
        count = mask.num_contexts if key.endswith("/enc") else mask.num_targets
        assert case[key].shape[:2] == (count, batch) and int(case[key].max()) < side * (side - 1)
        case.due.discard(key)


def _sizes(case: Case, mask: MultiBlockMask) -> None:
    """Theirs are drawn by torch from a generator seeded with the number of the step: the rule is compared exactly."""
    generators = [torch.Generator().manual_seed(step) for step in range(len(case["expect/pred_block_hw"]))]
    numbers = [(torch.rand(1, generator=g).item(), torch.rand(1, generator=g).item()) for g in generators]
    case.check("expect/pred_block_hw", torch.tensor([mask.target_size(number) for number, _ in numbers]))
    case.check("expect/enc_block_hw", torch.tensor([mask.context_size(number) for _, number in numbers]))


def _compare_masks(case: Case, masks: Tensor, *, goal: int) -> None:
    """Counts and frequencies of masks bool [draws, rows, columns], of which none hides more than `goal` patches."""
    counts, expect = masks.flatten(1).sum(1), case["expect/masked_count"]
    assert int(counts.max()) <= goal and int(expect.max()) <= goal
    if bool((expect == goal).all()):
        assert bool((counts == goal).all()), f"{case.name}: {goal} patches are hidden in every official mask"
    _near(case, "expect/masked_count", counts.double())
    _share(case, "no patch", counts == 0, expect == 0)
    _share(case, "all patches", counts == goal, expect == goal)
    _near_frequencies(case, "expect/cell_frequency", masks.double())
    first = case["expect/first8"]
    assert first.shape[1:] == masks.shape[1:] and bool((first.flatten(1).sum(1) <= goal).all())
    case.due.discard("expect/first8")


def _near(case: Case, key: str, ours: Tensor, theirs: Tensor | None = None) -> None:
    """Two samples of one number: their means, and their standard deviations."""
    theirs = case[key].double() if theirs is None else theirs
    ours = ours.double()
    case.due.discard(key)
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    _within(case, f"{key} (mean)", ours.mean(), theirs.mean(), error)
    error = (_variance_of_deviation(ours) / len(ours) + _variance_of_deviation(theirs) / len(theirs)).sqrt()
    _within(case, f"{key} (deviation)", ours.std(), theirs.std(), error)


def _near_mean(case: Case, key: str, ours: Tensor, theirs: float) -> None:
    """A mean of `theirs` draws. Their deviation is not given: ours stands for it."""
    case.due.discard(key)
    ours = ours.double()
    _within(case, key, ours.mean(), case[key], (ours.var() * (1 / len(ours) + 1 / theirs)).sqrt())


def _near_deviation(case: Case, key: str, ours: Tensor, theirs: float) -> None:
    case.due.discard(key)
    error = (_variance_of_deviation(ours) * (1 / len(ours) + 1 / theirs)).sqrt()
    _within(case, key, ours.std(), case[key], error)


def _near_frequencies(case: Case, key: str, ours: Tensor) -> None:
    """Frequency per cell from our draws [draws, *cells]; theirs are means of as many draws as the case states."""
    case.due.discard(key)
    expect = case[key].double().reshape(ours.shape[1:])
    draws = case.config.get("draws", len(case["expect/masked_count"]) if "expect/masked_count" in case.tensors else 0)
    error = (ours.var(0) * (1 / len(ours) + 1 / draws)).sqrt()
    error = error.clamp(min=1 / len(ours) / _SIGMAS)  # a cell met never or always by one side, once by the other
    _within(case, key, ours.mean(0), expect, error)


def _near_shares(case: Case, key: str, ours: Tensor) -> None:
    """Histograms of two sample sizes, bin by bin."""
    case.due.discard(key)
    theirs = case[key].double()
    totals = ours.sum(), theirs.sum()
    share = (ours + theirs) / sum(totals)
    error = (share * (1 - share) * (1 / totals[0] + 1 / totals[1])).sqrt()
    _within(case, key, ours / totals[0], theirs / totals[1], error.clamp(min=0.6 / min(totals)))


def _share(case: Case, what: str, ours: Tensor, theirs: Tensor) -> None:
    share = torch.cat([ours, theirs]).double().mean()
    error = (share * (1 - share) * (1 / len(ours) + 1 / len(theirs))).sqrt()
    _within(case, f"share of masks that hide {what}", ours.double().mean(), theirs.double().mean(), error)


def _within(case: Case, what: str, ours: Tensor, theirs: Tensor, error: Tensor) -> None:
    excess = ((ours - theirs).abs() - _SIGMAS * error - 1e-9).max()
    if not bool(excess <= 0):
        worst = float(((ours - theirs).abs() / error.clamp(min=1e-12)).max())
        case.mismatches.append(f"{what}: {worst:.1f} standard errors apart, allowed {_SIGMAS}")


def _variance_of_deviation(sample: Tensor) -> Tensor:
    """Of the standard deviation of a sample, times the sample size: (fourth moment / variance - variance) / 4."""
    centred = sample - sample.mean()
    variance = centred.square().mean()
    return (centred.pow(4).mean() / variance.clamp(min=1e-12) - variance).clamp(min=0) / 4


def _draw(mask: Mask, draws: int) -> Tensor:
    at = BatchPosition(seed=1, positions=np.arange(draws), first=0, global_batch=draws, epoch_length=draws)
    return torch.from_numpy(draw(mask, at)[mask.name])


def _batch(mask: Mask, step: int, batch: int) -> list[Tensor]:
    """The entries of `mask` for one step of `batch` images."""
    positions = np.arange(step * batch, (step + 1) * batch)
    at = BatchPosition(seed=1, positions=positions, first=step * batch, global_batch=batch, epoch_length=batch)
    return [torch.from_numpy(array) for array in draw(mask, at).values()]


def _blocks(mask: BlockMask, position: int) -> list[Block]:
    """The rectangles of the mask at `position`."""
    numbers = keyed.stream(1, position, keyed.mask_purpose(mask.name))
    largest = mask.num_masked if mask.max_per_block is None else mask.max_per_block
    return place_blocks(mask.grid, mask.num_masked, mask.min_per_block, largest, mask.min_aspect, numbers)[1]


def _cells(indices: Tensor, side: int) -> Tensor:
    """Indices [b, n, K] as bool [b, n, side * side]."""
    return torch.zeros(*indices.shape[:2], side * side, dtype=torch.bool).scatter_(2, indices, True)


def _only(case: Case, *known: str) -> None:
    """Refuse options this runner would leave out."""
    case.only("seed", "draw_seed", "draws", *known)


def _pair(value: int | list[float]) -> tuple:
    return (value, value) if isinstance(value, int) else tuple(value)


def _tuple(value: float | list[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,)
