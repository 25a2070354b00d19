"""Any model of timm's as a backbone of dense tasks: the stages of a hierarchical one, the blocks of a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from finetune.dense import windows
from finetune.dense.plain import ascending, four_blocks, with_mask
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.layers.sync_batch_norm import synchronized

FINEST = 4  # pixels: a pyramid of a hierarchical model begins there


class TimmDense(nn.Module):
    """Images [b, C, H, W] -> a map [b, channels, ceil(H / stride), ceil(W / stride)] of each of the `indices`.

    Images are padded with zeros at the right and below to whole places of the last map. What of the model is never
    computed is frozen; batch norms become those of all ranks together.

    Args:
        window, global_blocks: attention in windows as in `plain.PlainDense`; of timm's plain `VisionTransformer` only.
        indices: ascending, of the stages or blocks as timm counts them (`feature_info`); None: of a hierarchical model
            every stage of at least 4 pixels a place, of a plain one the last block.
        norm: on every map the norm of a plain model; for a hierarchical one a new norm for each stage, as Swin and
            ConvNeXt have them for detection and segmentation.

    Attributes:
        channels, strides: of each map. embed_dim, depth, patch_size: of the backbone.

    Raises:
        ValueError: the model gives no maps, has no such stage or block, or takes no windows.
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        *,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        norm: bool = True,
    ):
        super().__init__()
        self.backbone = synchronized(backbone)
        self.embed_dim, self.depth = backbone.embed_dim, backbone.depth
        model = backbone.model
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
            raise ValueError(f"timm/{backbone.name} gives no maps of its stages; take another model")
        info = [(stage["num_chs"], stage["reduction"]) for stage in model.feature_info]
        self.hierarchical = len({stride for _, stride in info}) > 1
        if indices is None:
            indices = [i for i, (_, stride) in enumerate(info) if stride >= FINEST]
            indices = indices if self.hierarchical else indices[-1:]
        self.indices = ascending("indices", indices, len(info))
        self.channels = [info[index][0] for index in indices]
        self.strides = [info[index][1] for index in indices]
        self.patch_size = info[-1][1]
        self.norm = norm
        self.norms = None
        if self.hierarchical and norm:
            self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.channels)
        self.window = window
        self.global_blocks: tuple[int, ...] = ()
        if window is not None:
            if not isinstance(model, VisionTransformer) or backbone.family.name != "ViT":
                raise ValueError(f"window {window}: timm/{backbone.name} is no plain ViT whose blocks take windows")
            given = four_blocks(self.depth) if global_blocks is None else global_blocks
            self.global_blocks = ascending("global_blocks", given, self.depth)
        elif global_blocks is not None:
            raise ValueError("global_blocks without a window: every block is global already; give window too")
        self._freeze_unused()

    def forward(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """The maps, finest first. `drop` is not read: timm draws its stochastic depth from torch's generator.

        Raises:
            ValueError: the model takes no images of this size.
        """
        size = (images.shape[2], images.shape[3])
        step = self.patch_size
        images = F.pad(images, (0, -size[1] % step, 0, -size[0] % step))
        maps = self._maps(images)
        if self.norms is not None:
            maps = [norm(level) for norm, level in zip(self.norms, maps, strict=True)]
        covers = [tuple(-(-side // stride) for side in size) for stride in self.strides]
        return [level[:, :, : cover[0], : cover[1]] for level, cover in zip(maps, covers, strict=True)]

    def _maps(self, images: Tensor) -> list[Tensor]:
        model: Any = self.backbone.model
        if self.window is not None:
            return self._windowed(model, images, self.window)
        plain_norm = self.norm and not self.hierarchical
        try:
            return model.forward_intermediates(
                images, indices=list(self.indices), norm=plain_norm, stop_early=True, intermediates_only=True
            )
        except (AssertionError, RuntimeError) as error:
            size, made_for = tuple(images.shape[2:]), self.backbone.img_size
            if size == made_for or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"timm/{self.backbone.name} was made for {made_for[0]} x {made_for[1]} px and refuses {size[0]} x "
                f"{size[1]}: {error}; set model.img_size to the size of the images"
            ) from error

    def _windowed(self, model: Any, images: Tensor, side: int) -> list[Tensor]:
        """A plain ViT, its blocks wrapped as in `PlainDense`."""
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        window, prefix = windows.fit(grid, side), model.num_prefix_tokens
        empty = windows.empty_places(grid, window, num_prefix=prefix, device=images.device)
        hidden = None if empty is None else empty.repeat(len(images), 1)[:, None, None]
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        maps = []
        for index in range(self.indices[-1] + 1):
            local = index not in self.global_blocks
            x = windows.split(x, grid, window, num_prefix=prefix) if local else x
            mask = None if hidden is None or not local else with_mask(x.new_zeros(()), hidden)
            x = _call(model, model.blocks[index], x, mask)
            x = windows.join(x, grid, window, num_prefix=prefix) if local else x
            if index in self.indices:
                patches = (model.norm(x) if self.norm else x)[:, prefix:]
                maps.append(patches.transpose(1, 2).unflatten(2, grid).contiguous())
        return maps

    def _freeze_unused(self) -> None:
        """Found out without data, on the meta device: timm's models differ in what comes after their stages."""
        state = {name: value.to("meta") for name, value in self.named_buffers()}
        trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
        parameters = {name: value.detach().to("meta") for name, value in self.named_parameters()}
        inputs = {name: parameters[name].requires_grad_() for name in trained}
        height, width = self.backbone.img_size
        image = torch.empty(1, self.backbone.in_chans, height, width, device="meta")
        with torch.enable_grad():
            maps = functional_call(self, (parameters, state), (image,))
            total = cast(Tensor, sum(level.sum() for level in maps))
            grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        for (_, parameter), grad in zip(trained.items(), grads, strict=True):
            if grad is None:
                parameter.requires_grad_(False)


def _call(model: Any, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    if model.grad_checkpointing and block.training and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, x, mask, use_reentrant=False))
    return block(x, mask)
