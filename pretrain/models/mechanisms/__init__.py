"""The attention mechanisms, by name: what they tell apart, where they stand, what they read. No torch here: an
unsuitable one is refused before training.

A new mechanism is one file in a folder beside this one, a `contract.MapMechanism` or a `layers.mixer.Mixer`, and one
line here. A backbone takes them from `model.attention` (`settings`); `placement` puts them in.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

Kind = Literal["channel", "spatial", "channel and spatial", "branch", "temporal"]
Slot = Literal["gate", "mixer", "stage", "conv", "front"]
Reads = Literal["set", "grid"]


@dataclass(frozen=True, eq=False)
class Mechanism:
    """An entry of the table.

    Attributes:
        kind: what its weights tell apart.
        slots: where it can stand, the usual one first. "gate" and "stage" change the output of a module, "mixer" stands
            in place of the attention of a block, "conv" in place of a convolution, "front" before the network.
        reads: "set": any of the tokens, in any order; "grid": all patches, each at its position.
        module: "module:Class".
        options: of its constructor beside the widths, (type, default) by name, as pydantic reads them.
        relative_positions: whether it adds a relative-position bias and rotates; else positions are in the tokens only.
        keeps_frame: whether patch (i, j) after it still shows patch (i, j) of the image.
        grid_option: an option with which it reads the grid in place of a set.
    """

    kind: Kind
    slots: tuple[Slot, ...]
    reads: Reads
    module: str
    options: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    relative_positions: bool = False
    keeps_frame: bool = True
    grid_option: str | None = None


def _of(
    kind: Kind,
    slots: str,
    reads: Reads,
    where: str,
    *,
    keeps_frame: bool = True,
    grid_option: str | None = None,
    **options: Any,
) -> Mechanism:
    named: Any = tuple(slots.split())
    module = f"{__name__}.{where}"
    return Mechanism(kind, named, reads, module, options, keeps_frame=keeps_frame, grid_option=grid_option)


ATTENTION, BOTH = "attention", "channel and spatial"
OptionalPositive = Annotated[int | None, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_reduction, _flag = (PositiveInt, 16), (bool, False)
_inner, _norm = (OptionalPositive, None), (Literal["batch", "layer"], "batch")
MECHANISMS: dict[str, Mechanism] = {
    ATTENTION: Mechanism(
        "spatial", ("mixer",), "set", "pretrain.models.layers.attention:Attention", relative_positions=True
    ),
    "se": _of("channel", "gate", "set", "channel.squeeze_excitation:SqueezeExcitation", reduction=_reduction),
    "eca": _of("channel", "gate", "set", "channel.eca:ECA", kernel_size=(OptionalPositive, None)),
    "fca": _of(
        "channel",
        "gate",
        "grid",
        "channel.fca:FCA",
        reduction=_reduction,
        ranking=(Literal["top", "low", "bot"], "top"),
        num_frequencies=(PositiveInt, 16),
    ),
    "xca": _of("channel", "mixer", "set", "channel.xca:XCA", qkv_bias=(bool, True)),
    "cam": _of("channel", "stage", "set", "channel.channel_map:ChannelMap", per_place=_flag),
    "cbam": _of(BOTH, "gate", "grid", "channel_spatial.cbam:CBAM", reduction=_reduction, kernel_size=(PositiveInt, 7)),
    "bam": _of(BOTH, "gate", "grid", "channel_spatial.bam:BAM", reduction=_reduction, dilation=(PositiveInt, 4)),
    "coord": _of(BOTH, "gate", "grid", "channel_spatial.coordinate:CoordinateAttention", reduction=(PositiveInt, 32)),
    "simam": _of(BOTH, "gate", "set", "channel_spatial.simam:SimAM", stabilizer=(PositiveFloat, 1e-4)),
    "gc": _of(
        BOTH,
        "stage mixer",
        "set",
        "channel_spatial.global_context:GlobalContext",
        reduction=_reduction,
        pooling=(Literal["attention", "mean"], "attention"),
        fusion=(Literal["add", "scale", "both"], "add"),
    ),
    "non_local": _of(
        "spatial",
        "stage mixer",
        "set",
        "spatial.non_local:NonLocal",
        grid_option="sub_sample",
        inner_dim=_inner,
        similarity=(Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"], "embedded_gaussian"),
        sub_sample=_flag,
        norm=_norm,
    ),
    "pam": _of("spatial", "stage mixer", "set", "spatial.position_attention:PositionAttention", inner_dim=_inner),
    "ema_unit": _of(
        "spatial",
        "stage mixer",
        "set",
        "spatial.em_attention:EMAttention",
        num_bases=(PositiveInt, 64),
        iterations=(PositiveInt, 3),
        momentum=(Share, 0.9),
        norm=_norm,
    ),
    "hamburger": _of(
        "spatial",
        "stage mixer",
        "set",
        "spatial.hamburger:Hamburger",
        inner_dim=(PositiveInt, 512),
        version=(Literal["v1", "v2", "v2+"], "v1"),
        factorization=(Literal["nmf", "cd", "vq"], "nmf"),
        num_bases=(PositiveInt, 64),
        train_iterations=(PositiveInt, 6),
        eval_iterations=(PositiveInt, 7),
        random_bases=(bool, True),
        norm=_norm,
    ),
    "external": _of(
        "spatial", "mixer stage", "set", "spatial.external:ExternalAttention", num_slots=(PositiveInt, 64), norm=_norm
    ),
    "criss_cross": _of(
        "spatial",
        "stage mixer",
        "grid",
        "spatial.criss_cross:CrissCross",
        inner_dim=_inner,
        recurrence=(PositiveInt, 2),
    ),
    "lka": _of(BOTH, "mixer stage", "grid", "channel_spatial.lka:LKA"),
    "sk": _of("branch", "conv", "grid", "branch.selective_kernel:SelectiveKernel", reduction=_reduction),
    "split_attention": _of("branch", "conv", "grid", "branch.split_attention:SplitAttention", radix=(PositiveInt, 2)),
    "cond_conv": _of("branch", "conv", "grid", "branch.cond_conv:CondConv", num_experts=(PositiveInt, 4)),
    "dynamic_conv": _of(
        "branch",
        "conv",
        "grid",
        "branch.dynamic_conv:DynamicConv",
        num_kernels=(PositiveInt, 4),
        temperature=(PositiveFloat, 30.0),
        temperature_steps=(NonNegativeInt, 0),
    ),
    "stand_alone": _of(
        "spatial",
        "conv",
        "grid",
        "spatial.stand_alone:StandAloneAttention",
        num_heads=(PositiveInt, 8),
        border=(Literal["masked", "zero"], "masked"),
    ),
    "dcn": _of(
        "spatial",
        "conv",
        "grid",
        "spatial.deform_conv:DeformConv",
        offset_groups=(PositiveInt, 1),
        modulated=(bool, True),
    ),
    "stn": _of(
        "spatial",
        "front",
        "grid",
        "spatial.spatial_transformer:SpatialTransformer",
        keeps_frame=False,
        align_corners=_flag,
    ),
    "tam": _of("temporal", "", "grid", "temporal.tam:TAM", num_frames=(PositiveInt, 8), kernel_size=(PositiveInt, 3)),
    "general": _of(
        "branch",
        "mixer",
        "set",
        "mixers:Blend",
        branches=(tuple[str | dict[str, Any], ...], ("xca", "none")),
        choice=(Literal["soft", "hard", "uniform"], "soft"),
    ),
}


def find(name: str, slot: Slot | None = None) -> Mechanism:
    """The entry `name`, of a slot if one is given.

    Raises:
        ValueError: there is none.
    """
    known = [key for key, entry in MECHANISMS.items() if slot is None or slot in entry.slots]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else f"; one of {', '.join(known)}"
        raise ValueError(f"no {slot or 'mechanism'} is called {name!r}{hint}")
    return MECHANISMS[name]


def class_of(name: str) -> type[Any]:
    """The class of the mechanism `name`; imports it.

    Raises:
        ValueError: there is none.
    """
    module, _, class_name = find(name).module.partition(":")
    return getattr(importlib.import_module(module), class_name)
