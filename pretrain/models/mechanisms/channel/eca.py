"""Efficient channel attention: every channel is gated by the means of its neighbours."""

from __future__ import annotations

from timm.layers.eca import EcaModule

from pretrain.models.mechanisms.contract import MapMechanism


class ECA(EcaModule, MapMechanism):
    """x * s(conv1d_k(mean(x))): a convolution without bias along the channels, zeros beyond both ends.

    Wang et al. 2020, eq. 9 and 12. Reads a set. At the start about half of each channel passes.

    Args:
        dim: channels C.
        kernel_size: k, odd; None: the paper's rule, |(log2 C + 1) / 2| made odd, at least 3.

    Raises:
        ValueError: an even kernel_size.
    """

    def __init__(self, dim: int, kernel_size: int | None = None):
        if kernel_size is None:
            super().__init__(dim)
            return
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"the kernel_size of ECA must be odd, got {kernel_size}")
        super().__init__(kernel_size=kernel_size)
