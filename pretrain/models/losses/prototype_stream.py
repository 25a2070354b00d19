"""Logits of many prototypes, chunk by chunk, so that losses over prototypes do not store their logits.

There are two passes over the prototypes: first for the normalizers, then for loss and gradients, which are computed
before backward. Chunks are of prototypes, not of rows, so that each writes its own part of the weight gradient; the
normalization of weights (Salimans & Kingma 2016) is applied to the chunk's logits, without a normalized copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.models.heads.projection import Prototypes

KEPT_LOGITS = 2**23  # below this number the first pass keeps logits (32 MB), else the second recomputes them
Gradients = tuple[Tensor | None, Tensor, Tensor | None]
Compute = Callable[[bool], tuple[tuple[Tensor, ...], Gradients | None]]


def chunk_size(rows: int, device: torch.device) -> int:
    """Prototypes per chunk: limited by the cache of a CPU, or by kernel size and memory of a GPU."""
    return 2048 if device.type == "cpu" else max(1024, 2**25 // max(rows, 1))


def chunks_of(prototypes: int, rows: int, device: torch.device) -> list[slice]:
    """Ranges of all prototypes, in order."""
    size = chunk_size(rows, device)
    return [slice(start, start + size) for start in range(0, prototypes, size)]


def product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of the products rows x prototypes: that of autocast if enabled."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def differentiable_once(rows: Tensor, weight: Tensor, vector: Tensor | None, compute: Compute) -> tuple[Tensor, ...]:
    """The outputs of `compute`, the first of which is differentiable with respect to `rows` and a layer's two weights.

    Args:
        weight, vector: of the layer; a layer without gain or bias has no vector.
        compute: given whether gradients are needed, returns the outputs and the three gradients of the first output,
            in fp32; None for what needs none. It runs without autocast.
    """
    return _Once.apply(rows, weight, vector, compute)  # type: ignore[return-value]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, v: Tensor, g: Tensor | None, compute: Compute):
        with torch.autocast(rows.device.type, enabled=False):
            outputs, ctx.gradients = compute(any(ctx.needs_input_grad))
        ctx.dtypes = rows.dtype, v.dtype, None if g is None else g.dtype
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the prototype loss frees its gradients in backward, which cannot run a second time")
        gradients, ctx.gradients = ctx.gradients, None
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return *(None if x is None or dtype is None else x.mul_(grads[0]).to(dtype) for x, dtype in pairs), None


class StreamedLogits:
    """Rows [n, D] times the weights of a layer of prototypes, chunk by chunk.

    Attributes:
        scale: [K] gain / length of each prototype; 1 where the layer is linear. lse: [n, 1] logsumexp of each row's
            (sharpened) logits, filled by `add_to_lse`. dot: [n, 1] for the product of a row's logits with other
            numbers, filled by the caller.
    """

    def __init__(self, rows: Tensor, layer: Prototypes, dtype: torch.dtype):
        self.rows, self.v, self.dtype, self.linear = rows.to(dtype), layer.weight_v, dtype, layer.weight_g is None
        self.g = self.v.new_ones(len(self.v)).float() if layer.weight_g is None else layer.weight_g.float()[:, 0]
        self.length, self.scale = torch.ones_like(self.g), torch.ones_like(self.g)
        self.lse = self.g.new_full((len(self.rows), 1), float("-inf"))
        self.dot = self.g.new_zeros(len(self.rows), 1)
        self._kept: dict[int, Tensor] = {}

    def first(self, chunk: slice) -> Tensor:
        """Raw logits of the chunk, fp32 [n, k]; also fills `scale` for it."""
        logits = self.measure(chunk).compute(chunk)
        if len(self.rows) * len(self.g) <= KEPT_LOGITS:
            self._kept[chunk.start] = logits.clone()
        return logits

    def again(self, chunk: slice) -> Tensor:
        """The same, in the second pass."""
        kept = self._kept.pop(chunk.start, None)
        return self.compute(chunk) if kept is None else kept

    def measure(self, chunk: slice) -> StreamedLogits:
        """Fill `scale` for the chunk; `compute` needs it."""
        if self.linear:
            return self
        self.length[chunk] = torch.linalg.vector_norm(self.v[chunk], dim=1, dtype=torch.float32)
        self.scale[chunk] = self.g[chunk] / self.length[chunk]
        return self

    def compute(self, chunk: slice) -> Tensor:
        """Raw logits of a chunk with known `scale`, fp32 [n, k]."""
        logits = (self.rows @ self.v[chunk].to(self.dtype).T).float()
        return logits if self.linear else logits.mul_(self.scale[chunk])

    def add_to_lse(self, sharpened: Tensor) -> None:
        """Add a chunk's sharpened logits [n, k] to `lse`."""
        self.lse = torch.logaddexp(self.lse, sharpened.logsumexp(dim=1, keepdim=True))

    def propagate(self, chunk: slice, difference: Tensor, by_rows: Tensor, by_v: Tensor, by_g: Tensor) -> None:
        """From the gradient of a chunk's logits [n, k], which is overwritten, to those of rows, weight_v and weight_g.

        Args:
            by_rows: [n, D], added to. by_v: [k, D] and by_g: [k] of the chunk, written; a linear layer has no gain.
        """
        v, scale, length = self.v[chunk], self.scale[chunk], self.length[chunk]
        by_weight = (difference.to(self.dtype).T @ self.rows).float()
        if self.linear:
            by_v.copy_(by_weight)
            by_rows += difference.to(self.dtype) @ v.to(self.dtype)
            return
        along = torch.linalg.vecdot(by_weight, v.float())
        torch.mul(by_weight, scale[:, None], out=by_v)
        by_v.addcmul_(v, (along * scale / length.square())[:, None], value=-1.0)
        by_g.copy_(along / length)
        by_rows += difference.mul_(scale).to(self.dtype) @ v.to(self.dtype)


class StreamedTargets:
    """A teacher's assignments softmax((logits - center) / temperature), chunk by chunk.

    Attributes:
        sum: [K] sum over rows of the raw logits, for the centre.
    """

    def __init__(self, logits: StreamedLogits, center: Tensor, temp: float):
        self.logits, self.center, self.sharpness = logits, center, 1 / temp
        self.sum = torch.empty_like(center)

    def first(self, chunk: slice) -> None:
        """First pass: the normalizers and the sums."""
        raw = self.logits.first(chunk)
        self.sum[chunk] = raw.sum(dim=0)
        self.logits.add_to_lse(self._sharpen(raw, chunk))

    def probabilities(self, chunk: slice) -> Tensor:
        """Second pass: the chunk's part of the assignments, [n, k]."""
        logits = self._sharpen(self.logits.again(chunk), chunk)
        probabilities = (logits - self.logits.lse).exp_()
        self.logits.dot += torch.linalg.vecdot(probabilities, logits)[:, None]
        return probabilities

    def entropy(self) -> Tensor:
        """Entropy of each row's assignment in nats, [n, 1], after the second pass."""
        return self.logits.lse - self.logits.dot

    def _sharpen(self, raw: Tensor, chunk: slice) -> Tensor:
        return raw.sub_(self.center[chunk]).mul_(self.sharpness)
