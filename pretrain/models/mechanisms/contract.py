"""What gates a map, stands behind a stage, or replaces a convolution: modules from maps to maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn


class MapMechanism(nn.Module):
    """A gate or a stage: maps [b, C, H, W] -> [b, C, H, W].

    One that reads a set (the order of the places means nothing to it) takes tokens too, as maps [b, C, n, 1].

    What `forward` finds out for a state that is not a weight waits for `after_step`, so that a skipped step leaves no
    trace and accumulation is exact. Most mechanisms have no such state and inherit both methods.

    Random numbers in training are a function of the number of `after_step` calls, which is a buffer: all images of a
    step share a draw, on every rank and in every micro-batch, and a resumed run draws as one that never stopped.
    Evaluation is deterministic.

    Attributes:
        averaged: names of buffers that a teacher averages as it averages weights.
    """

    own_start = True  # its initial weights are its paper's, not those of the network it stands in
    starts_as_identity = False  # its initial weights give m(x) = x
    averaged: tuple[str, ...] = ()

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, C, H, W] -> maps [b, C, H, W]."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Apply what the micro-batches of this optimizer step left for the state. Every rank calls it."""

    def discard_pending(self) -> None:
        """Forget what they left: the step was skipped."""

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError if it does not suit maps of this many rows and columns. Most suit any."""


class ConvMechanism(MapMechanism):
    """Replaces a convolution: maps [b, C, H, W] -> [b, D, H', W'].

    It is built with the arguments of `nn.Conv2d`: `Class(in_channels, out_channels, kernel_size, stride=...,
    padding=..., dilation=..., groups=..., bias=..., **options of its own)`.
    """
