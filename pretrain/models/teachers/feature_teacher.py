"""A frozen network whose features are targets: from a release or an official checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pretrain.core.configlib import ConfigError
from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official, load_strict
from pretrain.models.importers.facts import recipe
from pretrain.models.release.folder import read_release
from pretrain.models.teachers.frozen import Fingerprint, Frozen, digest_of


class FeatureTeacher(Frozen):
    """Normalized tokens of the last block, or where there are none one vector per image.

    Attributes:
        embed_dim: their width. stride: side of a token in pixels. in_chans: channels of the images.
        has_patches: it gives patch tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: ImageEncoder, mean: Any, std: Any):
        super().__init__()
        self.embed_dim, self.stride, self.in_chans = network.embed_dim, network.patch_size, network.in_chans
        self.has_patches = "patches" in network.provides
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.network = network
        self.hold(network)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images in [0, 1], [b, C, H, W] -> patches [b, N, D]."""
        return self.network(self._normalized(images))[:, self.network.num_prefix_tokens :]

    @torch.no_grad()
    def both(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images in [0, 1], [b, C, H, W] -> one vector each [b, D], and their patches [b, N, D] if it has any."""
        images, network = self._normalized(images), self.network
        if not self.has_patches:
            return network.forward_cls(images), None
        tokens = network(images)
        patches = tokens[:, network.num_prefix_tokens :]
        return tokens[:, 0] if network.class_token else patches.mean(dim=1), patches

    def _normalized(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def open_teacher(
    path: Path | str,
    *,
    num_heads: int | None,
    size: tuple[int, int],
    grid: tuple[int, int] | None,
    in_chans: int,
    key: str = "objective.teacher",
) -> tuple[FeatureTeacher, Fingerprint]:
    """The teacher at `path`, and its fingerprint.

    Args:
        path: release folder, or file of weights of a ViT, with timm's or official names.
        num_heads: of a file, see `recipe`. size: of its input images. grid: the required features; None: any.
        key: that names it in the configuration.

    Raises:
        ConfigError: it cannot be read, or its features do not fit the grid or the images.
    """
    path = Path(path)
    try:
        digest = digest_of(path)
        if path.is_dir():
            release = read_release(path)
            record = release.record
            teacher = FeatureTeacher(release.build(), record["mean"], record["std"])
        else:
            weights = load_official(path)
            vit = ViT(**recipe(weights, num_heads=num_heads))
            load_strict(vit, weights.backbone, grid=weights.grid, pos_resize=weights.pos_resize, facts=weights.facts)
            teacher = FeatureTeacher(vit, IMAGENET_MEAN, IMAGENET_STD)
    except ValueError as error:
        raise ConfigError(key, str(error).splitlines()) from error
    problems, stride = [], cast(int, teacher.stride)
    fits = not any(side % stride for side in size)
    if grid is None and not fits:
        near = [max(1, round(side / stride)) * stride for side in size]
        problems.append(f"{path} has patches of {stride} px, which do not divide {size[0]} x {size[1]} px; set {near}")
    elif grid is not None and not (fits and (size[0] // stride, size[1] // stride) == grid):
        problems.append(
            f"{path} has patches of {stride} px, so images of {size[0]} x {size[1]} px do not give the model's "
            f"{grid[0]} x {grid[1]} patches; set {key}_size: [{grid[0] * stride}, {grid[1] * stride}]"
        )
    if teacher.in_chans != in_chans:
        problems.append(f"{path} reads {teacher.in_chans} channels, model.in_chans is {in_chans}")
    if problems:
        raise ConfigError(key, problems)
    return teacher, Fingerprint(key, path, digest)
