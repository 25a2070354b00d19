"""The tables of docs/attention.md: what each mechanism is, and which objective trains a backbone with it.

The cells are what a configuration is refused by; a test trains each of them, or sees it refused.
"""

from __future__ import annotations

from typing import Any

from pretrain.core.configlib import validate
from pretrain.models.config import ModelConfig
from pretrain.models.mechanisms import ATTENTION, MECHANISMS, Mechanism, Slot
from pretrain.models.mechanisms.placement import building_problem, weights_of
from pretrain.models.mechanisms.settings import parse
from pretrain.objectives import OBJECTIVES

BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
WORKS = "yes"
DIM, HEADS = 384, 6  # of vit_small
PLACES: dict[Slot, str] = {
    "gate": "blocks.*.mlp",
    "stage": "blocks.*",
    "mixer": "blocks.*.attn",
    "conv": "layer[34].0.conv2",
    "front": "images",
}
CLIPS = "clips"  # in place of a slot: no objective reads clips yet


def placeable() -> dict[str, Mechanism]:
    """The mechanisms that a configuration can name."""
    return {name: entry for name, entry in MECHANISMS.items() if name != ATTENTION and entry.slots}


def entry(kind: str, slot: Slot | None = None) -> dict[str, Any]:
    """An entry of `model.attention` at the usual places of a slot, the usual one by default."""
    slot = slot or MECHANISMS[kind].slots[0]
    start = "paper" if slot in ("conv", "front") else "identity"
    return {"kind": kind, "slot": slot, "places": PLACES[slot], "start": start}


def model(kind: str) -> dict[str, Any]:
    """The `model` of a configuration with this mechanism in its usual slot."""
    if MECHANISMS[kind].slots[0] == "conv":
        return {"name": "timm/test_resnet", "img_size": 64, "attention": [entry(kind)]}
    return {"name": "vit_tiny", "img_size": 64, "patch_size": 8, "depth": 2, "attention": [entry(kind)]}


def verdict(kind: str, objective: str) -> str:
    """Whether an objective trains a backbone with this mechanism: "yes", or "no: " and what it takes away from it, or
    "not last": everywhere but in the last block, of which the objective reads the class token only."""
    built = validate(ModelConfig, model(kind), source=kind)
    needs: frozenset[str] = OBJECTIVES[objective].needs
    if missing := needs - built.provides:
        return f"no: {', '.join(sorted(missing))}"
    return WORKS if built.lacking(objective, needs) is None else "not last"


def facts() -> list[list[str]]:
    """Rows of the table of mechanisms."""
    rows = [["mechanism", "weights by", "slots", "reads", f"weights added to a block of {DIM} channels"]]
    for kind, found in MECHANISMS.items():
        if kind != ATTENTION:
            rows.append([kind, found.kind, ", ".join(found.slots) or CLIPS, found.reads, _weights(kind, found)])
    return rows


def _weights(kind: str, found: Mechanism) -> str:
    if not found.slots or found.slots[0] in ("conv", "front"):
        return ""
    placed = parse(entry(kind))
    problem = building_problem(placed, DIM, HEADS, (14, 14))
    return problem or f"{weights_of(placed, DIM, HEADS):,}"


def objectives() -> list[str]:
    """Those that train a ViT; a dVAE trains its own convolutions."""
    return [name for name, config in OBJECTIVES.items() if "conv_map" not in config.needs]


def cells() -> list[list[str]]:
    """Rows of the table of mechanisms and objectives."""
    names = objectives()
    return [["mechanism", *names], *([kind, *(verdict(kind, name) for name in names)] for kind in placeable())]


def page(text: str) -> str:
    """The page `text` with the current tables.

    Raises:
        ValueError: the page has no markers around a table.
    """
    for name, rows in (("mechanisms", facts()), ("objectives", cells())):
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no lines {begin} and {end}")
        text = f"{before}{begin}\n{_markdown(rows)}\n{end}{after}"
    return text


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
