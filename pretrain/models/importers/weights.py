"""The content of a file of weights in our names, and how it fitted a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pretrain.models.layers.pos_embed import PosResize

State = dict[str, Tensor]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """Where weights come from, for messages; `grid`: rows and columns of its position tables where they are stated;
    `folder`: where Hugging Face's config.json would be."""

    place: object
    grid: Grid | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class Facts:
    """What no shape tells of a ViT of this width and depth; None: not known.

    rotary: its positions are DINOv3's rotations. source: where the facts come from, in words. certain: they are of this
    file, not only usual for its size.
    """

    embed_dim: int
    depth: int
    num_heads: int | None = None
    norm_eps: float | None = None
    rotary: bool = False
    source: str = ""
    certain: bool = False

    def __str__(self) -> str:
        if self.num_heads is None and self.norm_eps is None:
            return f"heads and eps of the norms: not known ({self.source})" if self.source else "heads: not known"
        heads = "heads: not known" if self.num_heads is None else f"{self.num_heads} heads"
        eps = "" if self.norm_eps is None else f", eps of the norms {self.norm_eps:g}"
        return f"{heads}{eps} ({self.source})"


@dataclass(frozen=True)
class Weights:
    """The content of a file, in our names.

    Attributes:
        kind: objective that trained it, by its name in the table, or "vit" for a backbone alone.
        backbone: state of a `ViT`, or of a timm model of another family in timm's names.
        heads: the rest of the objective's own state, as its `heads_state` names it; empty for a backbone alone.
        grid: rows and columns of its position tables; None: square.
        left_out: names in the file of a classifier, or of parts that no objective here has.
        pos_resize: how the project resamples its position tables, see `layers.pos_embed.resize`.
        converted: what was renamed on reading: a prefix that was removed, the names of another library.
        facts: of a ViT from a file, see `importers.facts`; None: of another network, or of a release, which names them.
    """

    kind: str
    backbone: State
    heads: State
    grid: Grid | None = None
    left_out: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    pos_resize: PosResize = "exact"
    facts: Facts | None = None


@dataclass(frozen=True)
class MatchReport:
    """How a state fitted a module.

    Attributes:
        resized: position tables that were resampled to the module's grid.
        converted: what was rewritten in another form that computes the same.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    resized: list[str]
    left_out: tuple[str, ...] = ()
    converted: list[str] = field(default_factory=list)

    def changes(self) -> dict[str, Sequence[str]]:
        """What is not as in the file."""
        rows = {"resized": self.resized, "converted": self.converted, "left out": self.left_out}
        return {title: names for title, names in rows.items() if names}

    def __str__(self) -> str:
        rows = {
            "matched": self.matched,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "resized": self.resized,
            "converted": self.converted,
            "left out": self.left_out,
        }
        return "\n".join(f"{title:<10} {len(names):>5}  {some(names)}".rstrip() for title, names in rows.items())


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The first tensor with NaN or an infinite value, in words; None: every value is finite."""
    for name, tensor in state.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not (finite := torch.isfinite(tensor)).all():
            return f"{name} has {int((~finite).sum())} of {tensor.numel()} values that are NaN or infinite"
    return None


def some(names: Sequence[str]) -> str:
    """The first few names, in words."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def below(state: State, *prefixes: str) -> State:
    """The entries below any of the prefixes (with their dots), without it."""
    return {
        name.removeprefix(prefix): tensor
        for prefix in prefixes
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def under(prefix: str, state: State) -> State:
    """`state` with `prefix` (with its dot) before every name."""
    return {prefix + name: tensor for name, tensor in state.items()}
