"""Load a state into a module by strict matching: what does not fit is listed, and then nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers.forms import TABLE, in_the_form_of
from pretrain.models.importers.weights import Facts, Grid, MatchReport, not_finite
from pretrain.models.layers import pos_embed as positions
from pretrain.models.layers import rel_pos
from pretrain.models.layers.rope import BASE


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    grid: Grid | None = None,
    left_out: tuple[str, ...] = (),
    converted: Sequence[str] = (),
    pos_resize: positions.PosResize = "exact",
    facts: Facts | None = None,
) -> MatchReport:
    """Load `state` into `module`; the module is unchanged when it does not fit.

    Position tables of another grid are resampled (bicubic), a shared relative-position table is copied into every block
    that has its own, and biases of queries, keys and values take the module's form; all of it is reported.

    Args:
        allow_missing: prefixes of names that may keep their initial values.
        grid: rows and columns of the state's position tables; None: square.
        pos_resize: how position tables are resampled.
        left_out, converted: of the reading of the file, for the report.
        facts: of the file. Those that are certain must be the module's: no shape shows that they differ.

    Raises:
        ValueError: names are unexpected, or missing and not allowed to be, or shapes or facts differ; all of them are
            listed. Or a value is NaN or infinite.
    """
    own = module.state_dict()
    fitted, rewritten = in_the_form_of(module, own, dict(state), grid)
    unexpected = [name for name in fitted if name not in own]
    missing = [name for name in own if name not in fitted]
    resized, problems = [], []
    for name in own.keys() & fitted.keys():
        value, wanted = fitted[name], own[name]
        new = _grid_of(module, name, wanted)
        if value.shape == wanted.shape and (grid is None or new is None or new == grid):
            continue
        if new is None or value.ndim != wanted.ndim or value.shape[-1] != wanted.shape[-1]:
            problems.append(f"{name}: {list(value.shape)} in the file, {list(wanted.shape)} in the model")
            continue
        try:
            fitted[name], old = _resize(name, value, wanted, grid, new, pos_resize)
        except ValueError as error:
            problems.append(str(error))
        else:
            resized.append(f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}")
    lacking = [name for name in missing if not name.startswith(tuple(allow_missing))]
    problems += [f"{name}: not in the model" for name in unexpected]
    problems += [f"{name}: not in the file" for name in lacking]
    problems += _contradictions(module, facts)
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    if broken := not_finite(fitted):
        raise ValueError(f"the weights cannot be used: {broken}")
    module.load_state_dict(fitted, strict=False)
    return MatchReport(
        sorted(own.keys() & fitted.keys()), missing, [], sorted(resized), left_out, [*converted, *rewritten]
    )


def _contradictions(module: nn.Module, facts: Facts | None) -> list[str]:
    """Facts of the file that its ViT in `module` does not have, each once."""
    found: dict[str, None] = {}
    for inner in module.modules():
        if facts is None or not facts.certain or not isinstance(inner, ViT | TimmBackbone):
            continue
        if "layers" not in inner.provides or (inner.embed_dim, inner.depth) != (facts.embed_dim, facts.depth):
            continue
        block: Any = inner.trunk.blocks[0]
        own = {"num_heads": inner.num_heads, "norm_eps": getattr(block.norm1, "eps", None)}
        if facts.rotary and isinstance(inner, ViT) and (inner.rope.periods is not None or inner.rope.base != BASE):
            found[f"rope: {inner.rope} in the model, base {BASE:g} in the file ({facts.source})"] = None
        for name, value in own.items():
            wanted = getattr(facts, name)
            if None not in (wanted, value) and not math.isclose(wanted, value):
                found[f"{name}: {value:g} in the model, {wanted:g} in the file ({facts.source})"] = None
    return list(found)


def _resize(
    name: str, value: Tensor, wanted: Tensor, grid: Grid | None, new: Grid, how: positions.PosResize
) -> tuple[Tensor, Grid]:
    """A position table on another grid, and the grid it had."""
    if name.endswith(TABLE):
        offsets = len(value) - rel_pos.PREFIX_ROWS
        old = grid or _square(math.isqrt(max(offsets, 0)) ** 2 == offsets, (math.isqrt(offsets) + 1) // 2, name)
        return rel_pos.resize_table(value.float(), old, new), old
    class_rows = wanted.shape[1] - new[0] * new[1]
    patches = value.shape[1] - class_rows
    old = grid or _square(math.isqrt(max(patches, 0)) ** 2 == patches, math.isqrt(patches), name)
    if old[0] * old[1] != patches:
        raise ValueError(f"{name}: {value.shape[1]} rows in the file, {class_rows} + {old[0]} x {old[1]} expected")
    return positions.resize(value.float(), old, new, how=how), old


def _square(is_square: bool, side: int, name: str) -> Grid:
    if not is_square:
        raise ValueError(f"{name}: its positions are not a square grid, and the file does not say which they are")
    return side, side


def _grid_of(module: nn.Module, name: str, table: Tensor) -> Grid | None:
    """The grid of the position table `name`: that of the nearest module around it that has one; None: no such table.

    Tables of clips have several grids and were fitted before.
    """
    path, _, leaf = name.rpartition(".")
    if leaf not in ("pos_embed", TABLE):
        return None
    while True:
        owner = module.get_submodule(path)
        grid = getattr(owner, "grid_size", None)
        if grid is None and path:
            path = path.rpartition(".")[0]
            continue
        if isinstance(owner, VideoViT):
            return None
        if leaf == TABLE:  # Swin's tables of windows are not of a grid of patches
            return grid if hasattr(owner, "rel_pos_kind") else None
        # Nor are Hiera's, which are of a finer grid.
        return grid if grid is not None and table.shape[1] - math.prod(grid) in (0, 1) else None
