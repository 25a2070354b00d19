"""Any model of timm's as a backbone of dense tasks: the stages of a hierarchical one, the blocks of a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.func import functional_call

from finetune.dense import blocks
from finetune.dense.contract import DenseBackbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.layers.sync_batch_norm import synchronized

FINEST = 4  # smallest stride of a hierarchical model's pyramid, in pixels


class TimmDense(DenseBackbone):
    """Images [b, C, H, W] -> a map [b, channels, ceil(H / stride), ceil(W / stride)] of each of the `indices`.

    The parts of the model that are never computed are frozen; batch norms use the statistics of all ranks.

    Args:
        window, global_blocks: attention in windows as in `plain.PlainDense`; of timm's plain `VisionTransformer` only.
        indices: ascending, of the stages or blocks as timm counts them (`feature_info`); None: of a hierarchical model
            every stage with a stride of at least 4 pixels, of a plain one the last block.
        norm: a plain model's last norm on every map; for a hierarchical model a new norm for each stage, as Swin and
            ConvNeXt have for detection and segmentation.

    Raises:
        ValueError: the model gives no maps, has no such stage or block, or takes no windows.
    """

    takes_windows = False

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
        model = backbone.model
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
            raise ValueError(f"timm/{backbone.name} gives no maps of its stages; choose another model")
        info = [(stage["num_chs"], stage["reduction"]) for stage in model.feature_info]
        self.hierarchical = len({stride for _, stride in info}) > 1
        if indices is None:
            indices = [i for i, (_, stride) in enumerate(info) if stride >= FINEST]
            indices = indices if self.hierarchical else indices[-1:]
        self.indices = blocks.ascending("indices", indices, len(info))
        self.channels = [info[index][0] for index in indices]
        self.strides = [info[index][1] for index in indices]
        self.patch_size = info[-1][1]
        self.norm = norm
        self.norms = None
        if self.hierarchical and norm:
            self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.channels)
        self.window = window
        if window is not None and not self.takes_windows:
            raise ValueError(f"window {window}: timm/{backbone.name} is no plain ViT whose blocks take windows")
        self.global_blocks = blocks.global_blocks(self.depth, window, global_blocks)
        self._freeze_unused()

    def forward(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """As `DenseBackbone.forward`; `drop` is not read.

        Raises:
            ValueError: the model takes no images of this size.
        """
        size = (images.shape[2], images.shape[3])
        maps = self._maps(self.padded(images))
        if self.norms is not None:
            maps = [norm(level) for norm, level in zip(self.norms, maps, strict=True)]
        covers = [tuple(-(-side // stride) for side in size) for stride in self.strides]
        return [level[:, :, : cover[0], : cover[1]] for level, cover in zip(maps, covers, strict=True)]

    @property
    def timm(self) -> TimmBackbone:
        return cast(TimmBackbone, self.backbone)

    def _maps(self, images: Tensor) -> list[Tensor]:
        plain_norm = self.norm and not self.hierarchical
        try:
            return self.timm.model.forward_intermediates(
                images, indices=list(self.indices), norm=plain_norm, stop_early=True, intermediates_only=True
            )
        except (AssertionError, RuntimeError) as error:
            size, made_for = tuple(images.shape[2:]), self.backbone.img_size
            if size == made_for or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"timm/{self.timm.name} was made for {made_for[0]} x {made_for[1]} px and refuses {size[0]} x "
                f"{size[1]}: {error}; set model.img_size to the size of the images"
            ) from error

    def _freeze_unused(self) -> None:
        """Determined on the meta device, without data: timm's models differ in what follows their stages."""
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
