"""Images as sequences of patches, clips as sequences of tubes, and the random split of MAE (He et al. 2021, section
3)."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_of(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of whole patches in images [b, C, H, W]."""
    _, _, height, width = images.shape
    return height // patch_size, width // patch_size


def gather_pixels(images: Tensor, patch_size: int, index: Tensor | None = None) -> Tensor:
    """The pixels of patches, [b, k, C, p, p]: those of `index` int64 [b, k], or all N in row-major order.

    Only the chosen pixels are copied. Pixels beyond the last whole patch are left out, as a strided convolution does.
    """
    b, c, _, _ = images.shape
    p = patch_size
    grid_h, grid_w = grid_of(images, p)
    patches = images[:, :, : grid_h * p, : grid_w * p].reshape(b, c, grid_h, p, grid_w, p).permute(0, 2, 4, 1, 3, 5)
    if index is None:
        return patches.flatten(1, 2)
    rows = torch.arange(b, device=images.device)[:, None]
    return patches[rows, index // grid_w, index % grid_w]


def patchify(images: Tensor, patch_size: int, index: Tensor | None = None) -> Tensor:
    """Images [b, C, H, W] -> patch vectors [b, k, p * p * C], channels fastest; `index` as in `gather_pixels`."""
    return gather_pixels(images, patch_size, index).permute(0, 1, 3, 4, 2).flatten(2)


def gather_tubes(clips: Tensor, tubelet_size: int, patch_size: int, index: Tensor | None = None) -> Tensor:
    """The pixels of tubes of clips [b, T, C, H, W], [b, k, C, t, p, p]: those of `index` int64 [b, k], or all N in the
    order time, row, column."""
    b, frames, c, height, width = clips.shape
    t, p = tubelet_size, patch_size
    slices, rows, columns = frames // t, height // p, width // p
    tubes = clips[:, : slices * t, :, : rows * p, : columns * p]
    tubes = tubes.reshape(b, slices, t, c, rows, p, columns, p).permute(0, 1, 4, 6, 3, 2, 5, 7)
    if index is None:
        return tubes.flatten(1, 3)
    of, patch = torch.arange(b, device=clips.device)[:, None], index % (rows * columns)
    return tubes[of, index // (rows * columns), patch // columns, patch % columns]


def tubes_of_patches(index: Tensor, slices: int, num_patches: int) -> Tensor:
    """The tubes of some patches in every slice of time: int64 [b, k] of `num_patches` -> [b, slices * k]."""
    starts = torch.arange(slices, device=index.device) * num_patches
    return (starts[:, None] + index[:, None]).flatten(1)


def unpatchify(vectors: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for all patches: [b, N, p * p * C] -> [b, C, H, W]."""
    b, p, (grid_h, grid_w) = len(vectors), patch_size, grid_size
    image = vectors.reshape(b, grid_h, grid_w, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(b, -1, grid_h * p, grid_w * p)


def normalize_patches(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patch vectors by their own mean and unbiased variance: (normalized, mean, standard deviation)."""
    mean = vectors.mean(dim=-1, keepdim=True)
    std = (vectors.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (vectors - mean) / std, mean, std


def patches_of_cells(cells: Tensor, grid_size: tuple[int, int], side: int) -> Tensor:
    """Patches of cells of `side` x `side` patches: int64 [b, k] -> [b, k * side^2], row-major within each cell."""
    columns = grid_size[1]
    cells_a_row = columns // side
    corner = cells // cells_a_row * side * columns + cells % cells_a_row * side
    within = torch.arange(side, device=cells.device)
    return (corner[..., None] + (within[:, None] * columns + within).flatten()).flatten(1)


def split_by_noise(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Split each image's patches by rank of its noise [b, N]: int64 indices (keep [b, k], masked [b, N - k])."""
    order = noise.argsort(dim=1)
    return order[:, :num_keep], order[:, num_keep:]
