"""The kinds of patch masks an objective can request: specifications, without torch and numpy.

maskdraw.py draws them on the host. BlockMask, InverseBlockMask, RatioBlockMask and PartMask depend on the seed and the
sample's position only; StratifiedBlockMask and MultiBlockMask also on the sample's index in the global batch of its
step. So the masks are the same for any number of ranks, workers and micro-batches.

Every kind raises ValueError when its grid cannot hold the requested blocks, or when no patch would stay visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.data.views.specs import Mask


@dataclass(frozen=True)
class BlockMask(Mask):
    """Rectangles until `num_masked` patches are hidden (Bao et al. 2021, "BEiT", algorithm 1).

    Batch entry: bool [b, N] with True where hidden, or [b, count, N] for a count above 1.

    num_masked      patches to hide; never more. If ten tries find no position for a block, fewer are hidden
    min_per_block, max_per_block   patches of a block; the default maximum is num_masked
    min_aspect      height / width of a block is log-uniform in [min_aspect, 1 / min_aspect]
    exact           random single patches are added until num_masked are hidden (Peng et al. 2022, "BEiT v2")
    """

    num_masked: int
    min_per_block: int = 16
    max_per_block: int | None = None
    min_aspect: float = 0.3
    exact: bool = False
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, self.count)
        _check_aspect(self, self.min_aspect)
        if not 1 <= self.num_masked < self.num_patches:
            raise ValueError(
                f"mask {self.name!r}: {self.num_masked} of {self.num_patches} patches hidden; at least one must be "
                "hidden and one visible"
            )
        largest = self.num_masked if self.max_per_block is None else self.max_per_block
        if self.min_per_block < 1 or largest < 1:
            raise ValueError(
                f"mask {self.name!r}: min_per_block and max_per_block must be at least 1, got {self.min_per_block} and "
                f"{largest}"
            )
        if self.max_per_block is not None and self.max_per_block < self.min_per_block:
            raise ValueError(f"mask {self.name!r}: max_per_block {largest} is below min_per_block {self.min_per_block}")
        _check_block_fits(self, min(self.min_per_block, largest, self.num_masked), self.min_aspect)


@dataclass(frozen=True)
class RatioBlockMask(Mask):
    """Each view hides a random share of its patches (Zhou et al. 2022, "iBOT", section 3.1 and its loader).

    Batch entry: bool [b, count, N], True where hidden. One of the pairs (ratio, ratio_var) is chosen with equal
    probability, the share is uniform in ratio +- ratio_var; with ratio 0 nothing is hidden.

    shape         block: rectangles of at least (shorter side of the grid // 3)^2 patches; rand: single patches
    start_epoch   nothing is hidden in earlier epochs
    """

    count: int = 2
    ratio: tuple[float, ...] = (0.0, 0.3)
    ratio_var: tuple[float, ...] = (0.0, 0.2)
    min_aspect: float = 0.3
    start_epoch: int = 0
    shape: Literal["block", "rand"] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, self.count)
        _check_aspect(self, self.min_aspect)
        if self.shape not in ("block", "rand"):
            raise ValueError(f"mask {self.name!r}: shape must be block or rand, got {self.shape!r}")
        if not self.ratio or len(self.ratio) != len(self.ratio_var):
            raise ValueError(
                f"mask {self.name!r}: ratio and ratio_var must be of one length, got {self.ratio} and {self.ratio_var}"
            )
        for ratio, var in zip(self.ratio, self.ratio_var, strict=True):
            if not (0 <= var <= ratio and math.ceil((ratio + var) * self.num_patches) < self.num_patches):
                raise ValueError(
                    f"mask {self.name!r}: ratio {ratio} +- {var} of {self.num_patches} patches must stay above 0 and "
                    "leave one visible"
                )
        if self.shape == "block" and any(self.ratio):
            _check_block_fits(self, self.smallest_block or 1, self.min_aspect)

    @property
    def smallest_block(self) -> int:
        """In patches; 0 on grids with fewer than 3 rows or columns."""
        return (min(self.grid) // 3) ** 2


@dataclass(frozen=True)
class StratifiedBlockMask(Mask):
    """A fixed share of the views is masked, with mask ratios spread evenly over a range (Oquab et al. 2023, DINOv2).

    Batch entry: bool [b, count, N], True where hidden. Of the V = count * global batch views of a step, int(prob * V)
    are masked, one per equal bin of `ratio`; a permutation drawn for the step assigns bins to views. Blocks have
    min_patches to half the grid.

    exact   a view hides exactly the upper end of its bin: random single patches are added (Siméoni et al. 2025, DINOv3)
    roll    the mask is shifted around both edges by random numbers of rows and columns
    """

    count: int = 2
    ratio: tuple[float, float] = (0.1, 0.5)
    prob: float = 0.5
    min_patches: int = 4
    min_aspect: float = 0.3
    exact: bool = False
    roll: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, self.count)
        _check_aspect(self, self.min_aspect)
        low, high = self.ratio
        if not 0 <= low <= high or int(high * self.num_patches) >= self.num_patches:
            raise ValueError(
                f"mask {self.name!r}: ratio must be 0 <= low <= high and leave one of {self.num_patches} patches "
                f"visible, got {self.ratio}"
            )
        if not 0 <= self.prob <= 1:
            raise ValueError(f"mask {self.name!r}: prob must be in [0, 1], got {self.prob}")
        if self.min_patches < 1:
            raise ValueError(f"mask {self.name!r}: min_patches must be at least 1, got {self.min_patches}")
        _check_block_fits(self, min(self.min_patches, self.max_patches), self.min_aspect)

    @property
    def max_patches(self) -> int:
        """Largest block: half the rows."""
        return max(1, self.grid[0] // 2 * self.grid[1])


@dataclass(frozen=True)
class MultiBlockMask(Mask):
    """A large context block and several smaller target blocks (Assran et al. 2023, "I-JEPA", section 3).

    Batch entries, indices of patches in ascending order: int64 [b, num_contexts, K] at "<name>_context" and int64
    [b, num_targets, K'] at "<name>_targets". K' is the size of the step's target block; K is the smallest context of
    the global batch, longer ones are cut at the end.

    context_scale, target_scale   a block's share of the patches before overlap is removed
    aspect         height / width of target blocks; the context is square. One random number sets scale and aspect;
                   all blocks of a step have one size
    min_keep       a context must keep more patches than this; after 20 tries it may overlap the last target, then more
    allow_overlap  the context keeps the patches of the targets

    As in the official code no block reaches the last row or the last column.
    """

    context_scale: tuple[float, float] = (0.85, 1.0)
    target_scale: tuple[float, float] = (0.15, 0.2)
    aspect: tuple[float, float] = (0.75, 1.5)
    num_targets: int = 4
    num_contexts: int = 1
    min_keep: int = 10
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("context_scale", "target_scale"):
            low, high = getattr(self, key)
            if not 0 < low <= high <= 1:
                raise ValueError(f"mask {self.name!r}: {key} must be 0 < low <= high <= 1, got {(low, high)}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"mask {self.name!r}: aspect must be 0 < low <= high, got {self.aspect}")
        if self.num_targets < 1 or self.num_contexts < 1 or self.min_keep < 0:
            raise ValueError(
                f"mask {self.name!r}: num_targets and num_contexts must be at least 1 and min_keep at least 0, got "
                f"{self.num_targets}, {self.num_contexts} and {self.min_keep}"
            )
        for what, size in (("target", self.target_size), ("context", self.context_size)):
            height, width = min((size(step / 1024) for step in range(1025)), key=math.prod)
            if height * width <= self.min_keep:
                raise ValueError(
                    f"mask {self.name!r}: a {what} block can be {height} x {width} patches on the grid "
                    f"{self.grid[0]} x {self.grid[1]}, not more than min_keep {self.min_keep}; lower min_keep or raise "
                    f"{what}_scale"
                )

    @property
    def entries(self) -> tuple[str, ...]:
        return (f"{self.name}_context", f"{self.name}_targets")

    def target_size(self, number: float) -> tuple[int, int]:
        """(rows, columns) of target blocks for a random number in [0, 1]."""
        return _block_size(self.grid, self.target_scale, self.aspect, number)

    def context_size(self, number: float) -> tuple[int, int]:
        """(rows, columns) of context blocks for a random number in [0, 1]."""
        return _block_size(self.grid, self.context_scale, (1.0, 1.0), number)


@dataclass(frozen=True)
class InverseBlockMask(Mask):
    """Square blocks stay visible, all other patches are hidden (Baevski et al. 2023, "data2vec 2.0", section 3.3).

    Batch entry: bool [b, count, N], True where hidden, exactly N - int(N * (1 - mask_ratio)) in each: random patches
    are removed from or added to the blocks until the number is right.

    block    side of a block in patches
    adjust   added to the visible share before it is divided into blocks, because blocks overlap
    count    masks per image
    """

    mask_ratio: float
    block: int = 3
    adjust: float = 0.07
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, self.count)
        if self.block < 1 or self.adjust < 0:
            raise ValueError(
                f"mask {self.name!r}: block must be at least 1, adjust at least 0, got {self.block} and {self.adjust}"
            )
        if not 0 < self.mask_ratio < 1 or self.num_visible < 1:
            raise ValueError(
                f"mask {self.name!r}: mask_ratio {self.mask_ratio} of {self.num_patches} patches must hide one and "
                "leave one visible"
            )

    @property
    def num_visible(self) -> int:
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_blocks(self) -> int:
        """Number of blocks, before patches are removed or added."""
        return int(self.num_patches * (1 - self.mask_ratio + self.adjust) / self.block**2)


@dataclass(frozen=True)
class PartMask(Mask):
    """A part of the patches is visible, and a random part of the others is to be predicted (Darcet et al. 2025, CAPI).

    Batch entries, indices of patches in ascending order: int64 [b, N - num_hidden] at "<name>_visible" and int64
    [b, num_predicted] at "<name>_predicted".

    mask_ratio   share of the hidden patches. predicted: share of those that are predicted
    shape        inverse_block: the visible patches are one block; block: the hidden ones are; random: single patches
    aspect       height / width of the block is log-uniform in it, as far as such a block fits. Its sides are rounded
                 up, and what is too much is removed from its end
    roll         the block is shifted around both edges by random numbers of rows and columns
    """

    mask_ratio: float = 0.65
    predicted: float = 0.05
    shape: Literal["inverse_block", "block", "random"] = "inverse_block"
    aspect: tuple[float, float] = (0.5, 2.0)
    roll: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in ("inverse_block", "block", "random"):
            raise ValueError(f"mask {self.name!r}: shape must be inverse_block, block or random, got {self.shape!r}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"mask {self.name!r}: aspect must be 0 < low <= high, got {self.aspect}")
        if not 0 < self.num_hidden < self.num_patches or not 0 < self.num_predicted <= self.num_hidden:
            raise ValueError(
                f"mask {self.name!r}: mask_ratio {self.mask_ratio} and predicted {self.predicted} hide "
                f"{self.num_hidden} of {self.num_patches} patches and predict {self.num_predicted}; at least one must "
                "be visible and one predicted"
            )

    @property
    def entries(self) -> tuple[str, ...]:
        return (f"{self.name}_visible", f"{self.name}_predicted")

    @property
    def num_hidden(self) -> int:
        return int(self.num_patches * self.mask_ratio)

    @property
    def num_predicted(self) -> int:
        return int(self.num_hidden * self.predicted)


def _block_size(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], number: float
) -> tuple[int, int]:
    patches = int(grid[0] * grid[1] * (scale[0] + number * (scale[1] - scale[0])))
    ratio = aspect[0] + number * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def _check_count(mask: Mask, count: int) -> None:
    if count < 1:
        raise ValueError(f"mask {mask.name!r}: count must be at least 1, got {count}")


def _check_aspect(mask: Mask, min_aspect: float) -> None:
    if not 0 < min_aspect <= 1:
        raise ValueError(f"mask {mask.name!r}: min_aspect must be in (0, 1], got {min_aspect}")


def _check_block_fits(mask: Mask, patches: int, min_aspect: float) -> None:
    """A block has sides round(sqrt(patches * aspect)) and round(sqrt(patches / aspect)), both below the grid's."""
    height, width = mask.grid[0] - 0.5, mask.grid[1] - 0.5
    flattest, steepest = max(min_aspect, patches / width**2), min(1 / min_aspect, height**2 / patches)
    if min(mask.grid) < 2 or flattest >= steepest * (1 + 1e-9):
        raise ValueError(
            f"mask {mask.name!r}: no block of {patches} patches with sides of aspect {min_aspect} or more fits into "
            f"the grid {mask.grid[0]} x {mask.grid[1]}, of which it may not fill a row or column; set smaller blocks "
            "or use smaller patches"
        )
