"""What no shape of a weight tells of a vision transformer: the heads of its attention and the eps of its norms.

They come from the file itself (its periods of rotary positions, its settings, the name of its architecture), or from
the table of official models. Where neither tells them, whoever builds the network asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from pretrain.models.backbones.vit_arguments import vit_arguments
from pretrain.models.importers.names import blocks_of, is_vit, periods_of, square_grid
from pretrain.models.importers.weights import Facts, Grid, State, Weights
from pretrain.models.layers.pos_embed import sincos_2d


class Model(NamedTuple):
    """`name` in the code of its project."""

    name: str
    embed_dim: int
    depth: int
    num_heads: int


@dataclass(frozen=True)
class Project:
    """Models of a project with the facts that their files do not show. kinds: of `Weights`.

    positions, pooled: for the page: its positions, and the vector of an image that its code uses.
    """

    title: str
    kinds: tuple[str, ...]
    models: tuple[Model, ...]
    positions: str
    pooled: str
    norm_eps: float = 1e-6


_TINY, _SMALL = ("tiny", 192, 12, 3), ("small", 384, 12, 6)
_BASE, _LARGE, _HUGE = ("base", 768, 12, 12), ("large", 1024, 24, 16), ("huge", 1280, 32, 16)
_GIANT = ("giant", 1408, 40, 16)


def _named(form: str, *sizes: tuple[str, int, int, int]) -> tuple[Model, ...]:
    return tuple(Model(form.format(name), *numbers) for name, *numbers in sizes)


_CLASS, _MEAN = "class token", "mean of the patches"
# Read in the official codes of MoCo v3, DINOv2 and DINOv3 (hub/backbones.py); the others from papers and timm.
PROJECTS = (
    Project("MAE", ("mae",), _named("mae_vit_{}", _BASE, _LARGE, _HUGE), "sin-cos, columns first",
            f"{_CLASS} (linear probe), {_MEAN} (fine-tuning)"),
    Project("VideoMAE", ("videomae",), _named("pretrain_videomae_{}", _SMALL, _BASE, _LARGE, _HUGE),
            "sin-cos of the token's number", _MEAN),
    Project("DINO", ("dino",), _named("vit_{}", _TINY, _SMALL, _BASE), "table", _CLASS),
    Project("iBOT", ("ibot",), _named("vit_{}", _TINY, _SMALL, _BASE, _LARGE), "table", _CLASS),
    Project("DINOv2", ("dinov2",), _named("vit_{}", _SMALL, _BASE, _LARGE, ("giant2", 1536, 40, 24)), "table",
            f"{_CLASS}, or it and the {_MEAN}"),
    Project("DINOv3", (), _named("vit_{}", _SMALL, _BASE, _LARGE, ("huge2", 1280, 32, 20), ("7b", 4096, 40, 32)),
            "rotary, base 100, rows and columns in -1 to 1", f"{_CLASS}, or it and the {_MEAN}", norm_eps=1e-5),
    Project("MoCo v3", ("mocov3",), _named("vit_{}", ("small", 384, 12, 12), _BASE, _LARGE, _HUGE),
            "sin-cos, rows first", _CLASS),
    Project("I-JEPA", ("ijepa",), _named("vit_{}", _TINY, _SMALL, _BASE, _LARGE, _HUGE, _GIANT),
            "sin-cos, columns first", _MEAN),
    Project("BEiT, BEiT v2", ("beit", "beit2"), _named("beit_{}", _BASE, _LARGE), "relative tables", _MEAN),
    Project("VQ-KD", ("vqkd",), _named("vqkd_encoder_{}", _BASE), "table", "none: tokens"),
    Project("data2vec", ("data2vec",), _named("beit_{}", _BASE, _LARGE), "relative tables", _MEAN),
    Project("SimMIM", ("simmim",), _named("vit_{}", _BASE), "relative tables", _MEAN),
    Project("DeiT, timm, torchvision", ("vit",), _named("vit_{}", _TINY, _SMALL, _BASE, _LARGE, _HUGE, _GIANT), "table",
            _CLASS),
)  # fmt: skip
_DINOV3, _MOCOV3 = (next(one for one in PROJECTS if one.title == title) for title in ("DINOv3", "MoCo v3"))
DEFAULT_SIDE = 224  # pixels: image size of weights that do not contain theirs, as those of rotary positions do not
_MAY_ROTATE = ("vit", "dinov2")  # a complete checkpoint of DINOv3 has the names of DINOv2


def recipe(weights: Weights, *, num_heads: int | None = None, grid: Grid | None = None) -> dict[str, Any]:
    """Arguments of `ViT` for the backbone of a file, see `vit_arguments`.

    Args:
        num_heads: those that are stated; default: those of the file's facts.
        grid: rows and columns of patches; default: those of its position tables, or of `DEFAULT_SIDE` where its
            positions are rotary.

    Raises:
        ValueError: it is not a ViT, or its heads are known from nowhere.
    """
    facts = weights.facts or Facts(0, 0)
    heads = num_heads or facts.num_heads
    grid = grid or weights.grid
    if grid is None and facts.rotary:
        side = DEFAULT_SIDE // weights.backbone["patch_embed.proj.weight"].shape[-1]
        grid = side, side
    arguments = vit_arguments(weights.backbone, num_heads=heads, grid=grid)
    known = {"norm_eps": facts.norm_eps, "pos_embed": "rope" if facts.rotary else None}
    return arguments | {name: value for name, value in known.items() if value is not None}


def facts_of(kind: str, backbone: State, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Facts | None:
    """The facts of a file; None: its backbone is no vision transformer.

    Args:
        kind: of `Weights`. backbone: in our names. state: in the names of the file. settings: of the file.

    Raises:
        ValueError: its settings name a model of timm's with an activation that our ViT does not have.
    """
    if not is_vit(backbone):
        return None
    widths = backbone["patch_embed.proj.weight"].shape[0], len(blocks_of(backbone))
    found = _of_timm(settings, widths) if kind == "vit" else None
    periods = periods_of(state)
    found = found or _of_project(kind, backbone, widths, rotates=periods is not None)
    heads, source = _stated(settings), "its settings"
    if periods is not None and kind in _MAY_ROTATE:
        heads, source = widths[0] // (4 * len(periods)), "its periods of rotary positions"
    if heads is None or widths[0] % heads:
        return found
    return replace(found, num_heads=heads, source=source, certain=True)


def _of_project(kind: str, backbone: State, widths: tuple[int, int], *, rotates: bool) -> Facts:
    """Those of the project that its kind or its positions show, else those that all models of its size have."""
    certain = next((one for one in PROJECTS if kind in one.kinds and kind != "vit"), None)
    if kind in _MAY_ROTATE and (rotates or _is_dinov3(backbone)):
        certain = _DINOV3
    elif kind == "vit" and _has_positions_of_mocov3(backbone):
        certain = _MOCOV3
    projects = [certain] if certain else [one for one in PROJECTS if one not in (_DINOV3, _MOCOV3)]
    models = [(one, model) for one in projects for model in one.models if (model.embed_dim, model.depth) == widths]
    heads = {model.num_heads for _, model in models}
    if certain:
        name = f"{certain.title}, {models[0][1].name}" if models else certain.title
        rotary = certain is _DINOV3
        return Facts(*widths, min(heads, default=None), certain.norm_eps, rotary, source=name, certain=True)
    if len(heads) != 1:
        return Facts(*widths)
    return Facts(*widths, heads.pop(), 1e-6, source=f"usual for width {widths[0]} and {widths[1]} blocks")


def _is_dinov3(backbone: State) -> bool:
    """Rotary positions, four registers and layer scale."""
    positions = any(name == "pos_embed" or name.endswith("position_bias_table") for name in backbone)
    registers = backbone.get("reg_token")
    return not positions and registers is not None and registers.shape[1] == 4 and "blocks.0.ls1.gamma" in backbone


def _has_positions_of_mocov3(backbone: State) -> bool:
    """Its fixed table, which no other project has."""
    table, grid = backbone.get("pos_embed"), square_grid(backbone)
    if table is None or grid is None or grid[0] < 2 or "cls_token" not in backbone or table.shape[2] % 4:
        return False
    fixed = sincos_2d(table.shape[2], grid, rows_first=True)
    return table.shape[1:] == fixed.shape and torch.allclose(table[0].double(), fixed, atol=1e-3)


def _of_timm(settings: Mapping[str, Any], widths: tuple[int, int]) -> Facts | None:
    """Those of the model that the settings name, as timm's training does; None: timm has no such plain ViT."""
    name = next((settings[key] for key in ("arch", "model") if isinstance(settings.get(key), str)), "")
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or (model.embed_dim, len(blocks)) != widths:
        return None
    block: Any = blocks[0]
    act, heads = getattr(block.mlp, "act", None), getattr(getattr(block, "attn", None), "num_heads", None)
    gated = hasattr(block.mlp, "fc1_g") or hasattr(block.mlp, "gate")
    if not gated and not (isinstance(act, nn.GELU) and act.approximate == "none"):
        raise ValueError(f"its settings name {name}, whose activation is {act}; our ViT has the exact GELU")
    return Facts(*widths, heads, block.norm1.eps, source=f"timm's {name}, which its settings name", certain=True)


def _stated(settings: Mapping[str, Any]) -> int | None:
    """The heads in the settings of a trainer; SimMIM keeps those of its ViT in `config`."""
    inner: Any = settings.get("config")
    for key in ("MODEL", "VIT"):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    values = (settings.get("num_heads"), inner.get("NUM_HEADS") if isinstance(inner, Mapping) else None)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
