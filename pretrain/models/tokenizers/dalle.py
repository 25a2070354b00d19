"""The encoder of DALL-E's discrete VAE (Ramesh et al. 2021, appendix A.1), with the names of its published weights.

A 7 x 7 convolution, four groups of residual blocks with pooling between them, and logits of 8192 tokens: one token per
8 x 8 px.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8
PIXEL_MARGIN = 0.1
GROUPS = 4


class Conv(nn.Module):
    """Same-size convolution whose weight and bias are named `w` and `b`."""

    def __init__(self, in_dim: int, out_dim: int, side: int):
        super().__init__()
        layer = nn.Conv2d(in_dim, out_dim, side)
        self.w, self.b = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.weight.new_zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.w.shape[-1] - 1) // 2)


class DalleBlock(nn.Module):
    """Four convolutions at a quarter of the width, added with a gain of 1 / (number of blocks)^2."""

    def __init__(self, in_dim: int, out_dim: int, *, gain: float):
        super().__init__()
        hidden, layers = out_dim // 4, OrderedDict[str, nn.Module]()
        for i, (narrow, wide, side) in enumerate(
            [(in_dim, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, out_dim, 1)], start=1
        ):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = Conv(narrow, wide, side)
        self.gain = gain
        self.id_path = Conv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleEncoder(nn.Module):
    """Images in [0, 1], [b, C, H, W] -> logits of the tokens [b, K, H / 8, W / 8]."""

    def __init__(self, *, width: int = 256, blocks_per_group: int = 2, in_chans: int = 3, num_tokens: int = 8192):
        super().__init__()
        gain = 1 / (GROUPS * blocks_per_group) ** 2
        parts = OrderedDict[str, nn.Module](input=Conv(in_chans, width, 7))
        dim = width
        for group in range(1, GROUPS + 1):
            wide, layers = width * 2 ** (group - 1), OrderedDict[str, nn.Module]()
            for i in range(1, blocks_per_group + 1):
                layers[f"block_{i}"] = DalleBlock(dim, wide, gain=gain)
                dim = wide
            if group < GROUPS:
                layers["pool"] = nn.MaxPool2d(2)
            parts[f"group_{group}"] = nn.Sequential(layers)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(dim, num_tokens, 1)))
        self.blocks = nn.Sequential(parts)

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> DalleEncoder:
        """An encoder with the widths of the state dict `state`."""
        width, in_chans = state["blocks.input.w"].shape[:2]
        per_group = sum(name.startswith("blocks.group_1.") and name.endswith("conv_1.w") for name in state)
        num_tokens = len(state["blocks.output.conv.w"])
        return cls(width=width, blocks_per_group=per_group, in_chans=in_chans, num_tokens=num_tokens)

    def forward(self, images: Tensor) -> Tensor:
        # Pixels must not be 0 or 1, where the logit-Laplace distribution of its training has no density.
        return self.blocks((1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN)
