"""Weights of other people's files, by strict matching: nothing is skipped silently and nothing in a file is executed.

Read: MAE's pretraining and fine-tuning checkpoints, DINO's backbone files and full checkpoints, timm state dicts; as
pickles (tensors and plain values only) or safetensors.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.models import pos_embed as positions

State = dict[str, Tensor]
Grid = tuple[int, int]
CLASSIFIER = ("head.", "fc_norm.", "head_dist.")
MAE_DECODER = ("decoder_", "mask_token")


@dataclass(frozen=True)
class Weights:
    """What a file holds, in our names.

    Attributes:
        kind: objective that made it ("mae", "dino"), or "vit" for a backbone alone.
        backbone: state of a `ViT`.
        heads: the rest of the objective's own state, as its `heads_state` names it; empty for a backbone alone.
        grid: rows and columns of its position table; None: square.
        left_out: names in the file that belong to a classifier, not to a backbone.
    """

    kind: str
    backbone: State
    heads: State
    grid: Grid | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class MatchReport:
    """How a state fitted a module. `resized` are position tables that were resampled to the module's grid."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    resized: list[str]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = {
            "matched": self.matched,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "resized": self.resized,
            "left out": self.left_out,
        }
        return "\n".join(f"{title:<10} {len(names):>5}  {_some(names)}".rstrip() for title, names in rows.items())


def load_official(path: Path | str) -> Weights:
    """Read a checkpoint file and find out by its keys what it is.

    Raises:
        ValueError: the file is missing or unreadable, holds more than tensors and plain values, or is of no known kind.
    """
    path = Path(path)
    content = _read(path)
    if isinstance(content.get("student"), Mapping) and isinstance(content.get("teacher"), Mapping):
        return _dino(content, path)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = _without(_tensors(content, path), "module.", "backbone.")
    if "cls_token" not in state or "patch_embed.proj.weight" not in state:
        raise ValueError(
            f"{path}: not a checkpoint we know (MAE, DINO, timm ViT); its first keys are {_some(sorted(state))}"
        )
    if any(name.startswith("decoder_") for name in state):
        heads = {_mae_head(name): state.pop(name) for name in list(state) if name.startswith(MAE_DECODER)}
        return Weights("mae", state, heads)
    left_out = tuple(name for name in state if name.startswith(CLASSIFIER))
    backbone = {name: tensor for name, tensor in state.items() if name not in left_out}
    return Weights("vit", with_class_row(backbone, path), {}, left_out=left_out)


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    grid: Grid | None = None,
    left_out: tuple[str, ...] = (),
) -> MatchReport:
    """Load `state` into `module`; the module is unchanged when it does not fit.

    Position tables of another grid are resampled (bicubic, as MAE does) and reported.

    Args:
        allow_missing: prefixes of names that may keep their initial values.
        grid: rows and columns of the state's position tables; None: square.

    Raises:
        ValueError: names are unexpected, or missing and not allowed to be, or shapes differ; all of them are listed.
    """
    own = module.state_dict()
    unexpected = [name for name in state if name not in own]
    missing = [name for name in own if name not in state]
    fitted, resized, problems = dict(state), [], []
    for name in own.keys() & state.keys():
        if state[name].shape == own[name].shape and not _other_grid(module, name, grid):
            continue
        if name.rpartition(".")[2] == "pos_embed" and state[name].shape[-1] == own[name].shape[-1]:
            new = _owner(module, name).grid_size
            old = grid or _square_grid(state[name].shape[1] - 1, name)
            fitted[name] = positions.resize(state[name].float(), old, new)
            resized.append(f"{name} {old[0]}x{old[1]} -> {new[0]}x{new[1]}")
        else:
            problems.append(f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model")
    lacking = [name for name in missing if not name.startswith(tuple(allow_missing))]
    problems += [f"{name}: not in the model" for name in unexpected]
    problems += [f"{name}: not in the file" for name in lacking]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    module.load_state_dict(fitted, strict=False)
    return MatchReport(sorted(own.keys() & state.keys()), missing, unexpected, sorted(resized), left_out)


def with_class_row(backbone: State, source: Path | str) -> State:
    """A ViT state whose position table has exactly the rows [class, patches], computing the same features.

    timm can leave the class row out (`no_embed_class`) or give the registers positions; the first becomes a zero row,
    the second move into the register tokens.
    """
    table, registers = backbone["pos_embed"], backbone.get("reg_token")
    rows, extra = table.shape[1], 0 if registers is None else registers.shape[1]
    if _is_square(rows - 1) and not (extra and _is_square(rows)):
        return backbone
    if _is_square(rows):
        return backbone | {"pos_embed": torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)}
    if registers is not None and _is_square(rows - 1 - extra):
        moved = registers + table[:, 1 : 1 + extra]
        return backbone | {"reg_token": moved, "pos_embed": torch.cat([table[:, :1], table[:, 1 + extra :]], dim=1)}
    raise ValueError(f"{source}: cannot tell the grid of a position table of {rows} rows and {extra} registers")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: refused, it holds more than tensors and plain values; nothing in it was executed ({reason})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable checkpoint: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return dict(content)


def _tensors(content: Mapping[str, Any], path: Path) -> State:
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        raise ValueError(f"{path}: not a state dict; these entries are not tensors: {_some(other) or '(it is empty)'}")
    return dict(content)


def _dino(content: Mapping[str, Any], path: Path) -> Weights:
    branches = {name: _without(_tensors(content[name], path), "module.") for name in ("student", "teacher")}
    split = {name: {part: _below(state, part) for part in ("backbone", "head")} for name, state in branches.items()}
    center = content.get("dino_loss", {}).get("center")
    strange = [n for state in branches.values() for n in state if not n.startswith(("backbone.", "head."))]
    if strange or center is None:
        raise ValueError(f"{path}: not a full DINO checkpoint: {_some(strange) or 'it has no dino_loss.center'}")
    heads = {f"student.{name}": tensor for name, tensor in branches["student"].items()}
    heads |= {f"teacher.average.head.{name}": tensor for name, tensor in split["teacher"]["head"].items()}
    return Weights("dino", split["teacher"]["backbone"], heads | {"center": center})


def _mae_head(name: str) -> str:
    return "decoder.mask_token" if name == "mask_token" else "decoder." + name.removeprefix("decoder_")


def _below(state: State, prefix: str) -> State:
    return {n.removeprefix(prefix + "."): t for n, t in state.items() if n.startswith(prefix + ".")}


def _without(state: State, *prefixes: str) -> State:
    """Names without the prefixes that every one of them has."""
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _owner(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name.rpartition(".")[0])


def _other_grid(module: nn.Module, name: str, grid: Grid | None) -> bool:
    """Same number of patches in another arrangement."""
    return grid is not None and name.rpartition(".")[2] == "pos_embed" and _owner(module, name).grid_size != grid


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _square_grid(patches: int, name: str) -> Grid:
    if not _is_square(patches):
        raise ValueError(f"{name}: {patches} positions are not a square grid, and the file does not say which they are")
    return math.isqrt(patches), math.isqrt(patches)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
