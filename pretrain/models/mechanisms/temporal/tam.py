"""The temporal adaptive module: every video mixes its frames by a kernel of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism


class TAM(MapMechanism):
    """Frames [b * T, C, H, W] of b videos -> the same shape, convolved over time (Liu et al. 2021, eq. 2 to 6).

    y = sum_k softmax(G(m))_k * (x s(L(m))) of the frame t + k, with m [b, C, T] the means of the frames. G gives one
    kernel per video and channel from all T frames, which fixes T; L gates the frames of a channel by their neighbours.
    Frames of a video are adjacent in the batch. The norm of G reads b * C rows, that of L b * T.

    Args:
        dim: channels C, at least 4. num_frames: T. kernel_size: frames that the kernel covers, odd.
        stride, padding: of the convolution over time; they must give T frames again. padding None: kernel_size // 2.

    Raises:
        ValueError: they do not, or kernel_size is even.
    """

    def __init__(self, dim: int, num_frames: int, kernel_size: int = 3, *, stride: int = 1, padding: int | None = None):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"the kernel_size of TAM must be odd, got {kernel_size}")
        padding = kernel_size // 2 if padding is None else padding
        given = (num_frames + 2 * padding - kernel_size) // stride + 1
        if given != num_frames:
            raise ValueError(
                f"kernel_size {kernel_size}, stride {stride} and padding {padding} give {given} frames of "
                f"{num_frames}; use stride 1 and padding {kernel_size // 2}"
            )
        self.num_frames, self.kernel_size, self.stride, self.padding = num_frames, kernel_size, stride, padding
        hidden = max(1, dim // 4)
        self.kernel = nn.Sequential(
            nn.Linear(num_frames, 2 * num_frames, bias=False),
            nn.BatchNorm1d(2 * num_frames),
            nn.ReLU(),
            nn.Linear(2 * num_frames, kernel_size, bias=False),
            nn.Softmax(dim=-1),
        )
        self.gate = nn.Sequential(
            nn.Conv1d(dim, hidden, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Conv1d(hidden, dim, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.num_frames:
            raise ValueError(f"TAM needs videos of {self.num_frames} frames, got a batch of {x.shape[0]} frames")
        frames = x.unflatten(0, (-1, self.num_frames)).transpose(1, 2)  # [b, C, T, H, W]
        means = frames.mean((3, 4))
        kernels = self.kernel(means.flatten(0, 1)).unflatten(0, means.shape[:2])  # [b, C, K]
        gated = frames * self.gate(means)[..., None, None]
        padded = F.pad(gated, (0, 0, 0, 0, self.padding, self.padding))
        last = self.stride * (self.num_frames - 1) + 1
        # A sum of shifted frames: a grouped convolution would have the batch in its groups, which no export takes.
        y = sum(
            (
                padded[:, :, k : k + last : self.stride] * kernels[:, :, k, None, None, None]
                for k in range(self.kernel_size)
            ),
            start=padded.new_zeros(()),
        )
        return y.transpose(1, 2).flatten(0, 1)
