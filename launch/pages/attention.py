"""The tables of docs/attention.md: what each mechanism is, and which objective trains a backbone with it.

The cells are what a configuration is refused by; a test trains each of them, or sees it refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pretrain.core.configlib import validate
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.config import ModelConfig
from pretrain.models.mechanisms import ATTENTION, MECHANISMS, Mechanism, Slot
from pretrain.models.mechanisms.placement import building_problem, weights_of
from pretrain.models.mechanisms.settings import parse
from pretrain.objectives import OBJECTIVES

BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
WORKS = "yes"
ANY_SIZE, ONE_SIZE = "any size", "one size"
DIM, HEADS = 384, 6  # of vit_small
PLACES: dict[Slot, str] = {
    "gate": "blocks.*.mlp",
    "stage": "blocks.*",
    "mixer": "blocks.*.attn",
    "conv": "layer[34].0.conv2",
    "front": "images",
}
CLIPS = "clips"  # in place of a slot: no objective reads clips yet
# Mechanism -> its golden cases in tests/golden/cases.
GOLDEN = {
    "se": "se_bias, se_nobias",
    "eca": "eca",
    "fca": "fca",
    "xca": "xca, xca_block",
    "cam": "danet_cam",
    "non_local": "nonlocal_gaussian, nonlocal_dot, nonlocal_video",
    "pam": "danet_pam",
    "ema_unit": "ema_unit",
    "hamburger": "ham_nmf, ham_cd, ham_vq, ham_dual",
    "external": "external_attention",
    "criss_cross": "criss_cross",
    "stand_alone": "sasa_paper, sasa_per_channel",
    "dcn": "dcn_v1, dcn_v2",
    "stn": "stn_affine",
    "cbam": "cbam",
    "bam": "bam",
    "coord": "coord",
    "simam": "simam",
    "gc": "gc_add, gc_mul_add",
    "lka": "lka, lka_block",
    "sk": "selective_kernel",
    "split_attention": "split_attention",
    "cond_conv": "condconv",
    "dynamic_conv": "dynamic_conv",
    "tam": "tam",
}
# Mechanism -> a model of timm's that has it by itself: (name, arguments). Its release stays timm's.
IN_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: ("resnet50", {"block_args": {"attn_layer": kind}}) for kind in ("se", "eca", "cbam", "coord", "gc")},
    "non_local": ("resnet50", {"block_args": {"attn_layer": "nl"}}),
    "xca": ("xcit_small_12_p16_224", {}),
    "sk": ("skresnet50", {}),
    "split_attention": ("resnest50d", {}),
    "cond_conv": ("efficientnet_cc_b0_4e", {}),
}


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


@cache
def _validated(kind: str) -> ModelConfig:
    return validate(ModelConfig, model(kind), source=kind)


def network(entries: Sequence[Mapping[str, Any]]) -> Backbone:
    """A tiny backbone with these entries of `model.attention`, a block for each: our ViT, a ResNet for convolutions."""
    if entries[0]["slot"] == "conv":
        return TimmBackbone("test_resnet", (64, 64), attention=entries)
    return ViT((64, 64), 8, embed_dim=32, depth=len(entries), num_heads=2, class_token=False, attention=entries)


def exports(kind: str) -> str:
    """Image sizes of the graphs of `fovea export` of a network with this mechanism; "": nothing places it."""
    if not MECHANISMS[kind].slots:
        return ""
    return ANY_SIZE if network([entry(kind)]).fixed_size_reason() is None else ONE_SIZE


def verdict(kind: str, objective: str) -> str:
    """Whether an objective trains a backbone with this mechanism: "yes", or "no: " and what it takes away from it, or
    "not last": everywhere but in the last block, of which the objective reads the class token only."""
    built = _validated(kind)
    needs: frozenset[str] = OBJECTIVES[objective].needs
    if missing := needs - built.provides:
        return f"no: {', '.join(sorted(missing))}"
    return WORKS if built.lacking(objective, needs) is None else "not last"


def facts() -> list[list[str]]:
    """Rows of the table of mechanisms."""
    head = ["mechanism", "kind", "slots", "reads", f"weights added to a block of {DIM} channels", "golden cases"]
    rows = [[*head, "timm has it as", "exports"]]
    for kind, found in MECHANISMS.items():
        if kind != ATTENTION:
            own = [kind, found.kind, ", ".join(found.slots) or CLIPS, found.reads, _weights(kind, found)]
            rows.append([*own, GOLDEN.get(kind, ""), _in_timm(kind), exports(kind)])
    return rows


def _in_timm(kind: str) -> str:
    if kind not in IN_TIMM:
        return ""
    name, arguments = IN_TIMM[kind]
    given = f", attn_layer: {arguments['block_args']['attn_layer']}" if arguments else ""
    return f"timm/{name}{given}"


def _weights(kind: str, found: Mechanism) -> str:
    if not found.slots or found.slots[0] in ("conv", "front"):
        return ""
    placed = parse(entry(kind))
    problem = building_problem(placed, DIM, HEADS, (14, 14))
    return problem or f"{weights_of(placed, DIM, HEADS):,}"


def objectives() -> list[str]:
    """Those that train a ViT of images; a dVAE trains its own convolutions."""
    return [name for name, config in OBJECTIVES.items() if not config.needs & {"conv_map", "clip"}]


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
