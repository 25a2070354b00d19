"""Vector quantization on the unit sphere with a codebook that follows the data (Peng et al. 2022, "BEiT v2", 2.1).

A feature is assigned to the nearest code, with a straight-through gradient. The codebook has no gradient: every code is
an EMA of the features assigned to it, and codes without features stay unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core import distributed
from pretrain.models.backbones.contract import Backbone, ImageEncoder
from pretrain.models.layers.initialize import initialize_linears

ROWS_AT_ONCE = 16384
KMEANS_ITERATIONS = 10


@dataclass(frozen=True)
class Quantized:
    """Features [..., D] after quantization.

    codes    the nearest code of each feature, with the gradient of the feature [..., D]
    ids      int64 [...]
    loss     mean squared distance of features to their codes (commitment loss)
    vectors  the features, length 1, without gradient [n, D]
    """

    codes: Tensor
    ids: Tensor
    loss: Tensor
    vectors: Tensor


class Quantizer(nn.Module):
    """A codebook [K, D] in buffers: fp32 whatever the parameters are cast to.

    A step uses the codes from before it. `remember` sums its assignments over micro-batches; `update` applies the sums
    of all ranks.

    Args:
        kmeans_init: the codebook is initialized by the k-means centres of the first batch of `forward` in training.

    Buffers: codebook, cluster_size [K] (EMA of the number of features per code and step), initted [1].
    """

    codebook: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.99, beta: float = 1.0, kmeans_init: bool = True):
        super().__init__()
        self.decay, self.beta = decay, beta
        start = torch.zeros(num_codes, dim) if kmeans_init else F.normalize(torch.randn(num_codes, dim), dim=-1)
        self.register_buffer("codebook", start)
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("initted", torch.tensor([0.0 if kmeans_init else 1.0]))
        self._found: Tensor | None = None
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Quantized:
        """Quantize features [..., D] in fp32.

        Args:
            noise: uniform random numbers, one per feature, which order the features for k-means initialization only.

        Raises:
            ValueError: the codebook must be initialized by k-means, without noise.
        """
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=-1)
            vectors = z.detach().flatten(0, -2)
            book = self._book(vectors, noise)
            ids = nearest(vectors, book).view(z.shape[:-1])
            codes = F.embedding(ids, book)
            loss = self.beta * F.mse_loss(z, codes)
            return Quantized(z + (codes - z).detach(), ids, loss, vectors)

    def remember(self, result: Quantized) -> None:
        """Add a micro-batch to the sums for `update`."""
        counts, sums = tally(result.vectors, result.ids.flatten(), len(self.codebook))
        if self._counts is not None and self._sums is not None:
            counts, sums = self._counts + counts, self._sums + sums
        self._counts, self._sums = counts, sums

    @torch.no_grad()
    def update(self) -> None:
        """Update the codes by the remembered sums of all ranks; unchanged without any."""
        if self._counts is None or self._sums is None:
            return
        if self._found is not None:
            self.codebook.copy_(self._found)
            self.initted.fill_(1.0)
        counts, sums = distributed.all_reduce_sum(self._counts), distributed.all_reduce_sum(self._sums)
        self.discard()
        self.observe(counts)
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        target = torch.where(counts[:, None] == 0, self.codebook, means)
        self.codebook.copy_(F.normalize(self.codebook * self.decay + target * (1 - self.decay), dim=-1))

    def observe(self, counts: Tensor) -> None:
        """Update `cluster_size` by the counts [K] of assignments over all ranks; codes stay unchanged."""
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)

    def discard(self) -> None:
        """Discard the remembered sums, and an initialization that is not yet applied."""
        self._found = self._counts = self._sums = None

    @torch.no_grad()
    def usage(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(perplexity of the codes, fraction of codes in use) after int64 `ids` of this rank.

        A code is in use if a feature was assigned to it in the last 1 / (1 - decay) steps.
        """
        taken = ids.flatten()
        counts = torch.zeros_like(self.cluster_size).index_add_(0, taken, self.cluster_size.new_ones(len(taken)))
        size = self.cluster_size * self.decay + counts * (1 - self.decay)
        return perplexity(size), (size > (1 - self.decay) * 0.36).float().mean()

    def _book(self, vectors: Tensor, noise: Tensor | None) -> Tensor:
        if self.initted.item():
            return self.codebook
        if self._found is None:
            if noise is None:
                raise ValueError("the codebook is initialized by k-means: give the noise that orders the features")
            found, _ = kmeans(
                distributed.all_gather(vectors), distributed.all_gather(noise.flatten()), len(self.codebook)
            )  # fmt: skip
            if not self.training:
                return found
            self._found = found
        return self._found


def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """Index of the code nearest to each of `vectors` [n, D]: int64 [n]."""
    square = book.square().sum(1)
    # |z|^2 is the same for all codes of a row. In chunks: [n, K] is larger than all activations of the network.
    return torch.cat([(square - 2 * rows @ book.T).argmin(1) for rows in vectors.split(ROWS_AT_ONCE)])


def tally(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Number [K] and sums [K, D] of the `vectors` [n, D] assigned to each code."""
    counts = vectors.new_zeros(num_codes).index_add_(0, ids, vectors.new_ones(len(ids)))
    return counts, vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, ids, vectors)


def kmeans(
    vectors: Tensor, noise: Tensor, num_centres: int, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Spherical k-means of `vectors` [n, D] of length 1: (centres [K, D] of length 1, numbers of vectors [K]).

    Initialized by the K vectors with the smallest `noise` [n], repeated if there are fewer vectors than centres; a
    centre without vectors stays unchanged.
    """
    order = noise.argsort()
    centres = vectors[order[torch.arange(num_centres, device=vectors.device) % len(order)]]
    counts = vectors.new_zeros(num_centres)
    for _ in range(iterations):
        ids = torch.cat([(rows @ centres.T).argmax(1) for rows in vectors.split(ROWS_AT_ONCE)])
        counts, sums = tally(vectors, ids, num_centres)
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        centres = torch.where(counts[:, None] == 0, centres, means)
    return centres, counts


def perplexity(weights: Tensor) -> Tensor:
    """exp(entropy) of nonnegative weights [K]: the effective number of codes; 1 if one has all the weight."""
    shares = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.special.entr(shares).sum().exp()


def task_layer(in_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, Tanh, Linear: from features of a transformer to codes, or to features of the teacher."""
    layer = nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, out_dim))
    initialize_linears(layer, "trunc_normal")
    return layer


def code_features(encoder: ImageEncoder, task: nn.Module, images: Tensor, *, drop: Tensor | None = None) -> Tensor:
    """Normalized images [b, C, H, W] -> features to quantize, fp32 [b, N, code_dim]. No autocast of the projection.

    `drop`: uniform random numbers of the drop path [b, depth, 2].
    """
    tokens = encoder(images, drop=drop) if isinstance(encoder, Backbone) else encoder(images)
    with torch.autocast(images.device.type, enabled=False):
        return task(tokens[:, encoder.num_prefix_tokens :].float())


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of vectors along the last dimension, fp32, mean over all."""
    return (1 - (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)).mean()
