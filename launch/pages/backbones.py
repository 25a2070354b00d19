"""docs/backbones.md: the table of which backbone each objective works on.

It is built from what the objectives require and what the backbones provide, the facts by which a configuration is
refused; a test trains every cell, or sees it refused. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pretrain.models.backbones import families
from pretrain.objectives import OBJECTIVES

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
WORKS, NO_CLASS_TOKEN, ONE_SIZE = "yes", "no class token", "one size"
# start of a problem's text -> the setting that solves it
SETTINGS = {
    "objective.cls_weight": {"cls_weight": 0},
    "objective.drop_path_subset": {"drop_path_subset": "false"},
    "objective.layerwise_decay": {"layerwise_decay": 1, "patch_embed_lr_mult": 1},
}
ONE_SIZE_SETTING = {"local_crops_number": 0}


@dataclass(frozen=True)
class BackboneRow:
    """A kind of backbone, with the properties of a model that configurations check."""

    title: str
    provides: frozenset[str]
    other_sizes: bool = True
    patch_size: int = 16
    size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    drop_path_rate: float = 0.0
    num_blocks: int = 12
    num_frames: int | None = None
    embed_dim: int = 768

    @property
    def class_token(self) -> bool:
        return "class_token" in self.provides


def rows() -> list[BackboneRow]:
    """Our own backbones, then timm's families."""
    own = [
        BackboneRow("own ViT", families.vit_provides(class_token=True)),
        BackboneRow("own ViT, no class token", families.vit_provides(class_token=False)),
        BackboneRow("own ViT of clips", families.vit_provides(class_token=True, clips=True), num_frames=16),
        BackboneRow(
            "own ViT of clips, no class token", families.vit_provides(class_token=False, clips=True), num_frames=16
        ),
        BackboneRow(families.CONV, families.CONV_PROVIDES),
    ]
    timm = [BackboneRow(f"timm/ {f.name}", f.provides, f.other_sizes) for f in (*families.FAMILIES, families.POOLED)]
    return own + timm


def verdict(name: str, row: BackboneRow) -> str:
    """Whether objective `name` trains on a backbone: "yes"; "no class token": without one; "no: " and what the
    backbone lacks; or the conditions, "one size" (of all crops) and settings of the objective."""
    config = OBJECTIVES[name]
    needs: frozenset[str] = config.needs
    if missing := needs - row.provides:
        return f"no: {', '.join(sorted(missing))}"
    if any(problem.startswith("model.class_token: true") for problem in _problems(config, row)):
        return NO_CLASS_TOKEN
    required = {key: value for key, value in settings(name, row).items() if key != "local_crops_number"}
    conditions = [f"{key} {value}" for key, value in required.items()]
    if not row.other_sizes and "local_crops_number" in config.model_fields:
        conditions.insert(0, ONE_SIZE)
    return ", ".join(conditions) or WORKS


def settings(name: str, row: BackboneRow) -> dict[str, Any]:
    """The settings with which objective `name` trains on a backbone that provides what it requires."""
    config = OBJECTIVES[name]
    found = {} if row.other_sizes or "local_crops_number" not in config.model_fields else ONE_SIZE_SETTING
    for problem in _problems(config, row):
        for start, setting in SETTINGS.items():
            if problem.startswith(start):
                found = found | setting
    return found


def _problems(config: type[Any], row: BackboneRow) -> list[str]:
    """Problems of the default settings on a backbone; none if the settings require a file."""
    try:
        return config().problems(row)
    except ValidationError:
        return []


def table() -> str:
    """The table in Markdown, a row per backbone and a column per objective."""
    lines = [["backbone", *OBJECTIVES], ["---"] * (1 + len(OBJECTIVES))]
    lines += [[row.title, *(verdict(name, row) for name in OBJECTIVES)] for row in rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(text: str) -> str:
    """The page `text` with the current table.

    Raises:
        ValueError: the page has no markers around the table.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"
