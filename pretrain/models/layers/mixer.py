"""What mixes the tokens inside a block: attention, or a mechanism in its place (`pretrain.models.mechanisms`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

QKVBias = bool | Literal["no_key"]
Bias = Tensor | Callable[[Tensor], Tensor]
EVERY_TOKEN = slice(None)


@dataclass(frozen=True)
class Layout:
    """Which tokens [b, P + k, D] a mixer sees: P prefix tokens, then patches of a grid.

    Attributes:
        grid: rows and columns of all patches. num_prefix_tokens: P.
        keep: int64 [b, k], the patches that are there (row-major index), in this order; None: all.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int
    keep: Tensor | None = None

    def of_samples(self, rows: Tensor) -> Layout:
        """The layout of some samples of the batch, int64 [n]."""
        return self if self.keep is None else replace(self, keep=self.keep[rows])


class Mixer(nn.Module):
    """The first branch of a block, `attn` in the names of its parameters: it may read tokens of all positions.

    A block builds it by a `NewMixer`.

    Attributes:
        proj: the last layer. A layer of queries, keys and values, where there is one, is called `qkv`: papers
            initialize these two in their own ways.
    """

    proj: nn.Linear

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            queries: slice = EVERY_TOKEN,
            bias: Bias | None = None,
            rotation: Tensor | None = None,
            layout: Layout | None = None,
        ) -> Tensor: ...

    def forward(
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Tokens [b, s, D] -> the mixed tokens of `queries` [b, t, D]; all of x is read.

        Args:
            bias: added to scores of all pairs of tokens, [1 or b, h, s, s]; or a function of the queries [b, h, t, d]
                that gives it, [1 or b, 1 or h, 1 or t, s].
            rotation: of queries and keys, a table of `rope.rope_table`.
            layout: where the tokens are; None: not known, as inside a decoder.

        Raises:
            ValueError: it reads no bias or rotation and is given one, or needs a layout and has none.
        """
        raise NotImplementedError


def refuse_positions(kind: str, bias: Bias | None, rotation: Tensor | None) -> None:
    """Raises ValueError if a mixer that reads no relative positions is given some."""
    if bias is not None or rotation is not None:
        raise ValueError(f"{kind} adds no relative positions and rotates nothing; use a position table")


class NewMixer(Protocol):
    """Builds the mixer of a block, as `Attention` and `Mixer` themselves do."""

    def __call__(
        self, dim: int, num_heads: int, /, *, qkv_bias: QKVBias, rel_pos_grid: tuple[int, int] | None
    ) -> Mixer: ...
