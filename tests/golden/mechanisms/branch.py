"""Branch mechanisms (in place of a convolution) on their golden cases."""

from __future__ import annotations

from typing import Any

from timm.layers.helpers import make_divisible
from timm.layers.padding import get_padding_value

from pretrain.models.mechanisms.branch.cond_conv import CondConv
from pretrain.models.mechanisms.branch.dynamic_conv import DynamicConv
from pretrain.models.mechanisms.branch.selective_kernel import SelectiveKernel
from pretrain.models.mechanisms.branch.split_attention import SplitAttention
from tests.golden.case import Case
from tests.golden.mechanisms.channel import activation
from tests.golden.mechanisms.module import run_module


def pairs(value: Any) -> Any:
    """A tuple from a list of JSON."""
    return tuple(value) if isinstance(value, list) else value


def run_condconv(case: Case) -> None:
    conv = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    ctor = {name: pairs(value) for name, value in case.take("ctor", *conv, "num_experts").items()}
    ctor = {"kernel_size": 3, "bias": False} | ctor
    shape = {"stride": ctor.get("stride", 1), "dilation": ctor.get("dilation", 1)}
    padding, dynamic = get_padding_value(ctor.get("padding", ""), ctor["kernel_size"], **shape)
    module = CondConv(**ctor | {"padding": "same" if dynamic else padding})
    run_module(case, module, {"routing_fn": "routing"})


def run_dynamic_conv(case: Case) -> None:
    conv = ("in_planes", "out_planes", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    ctor = case.take("ctor", *conv, "ratio", "K", "temperature", "init_weight")
    renamed = {"in_planes": "in_channels", "out_planes": "out_channels", "K": "num_kernels"}
    given = {renamed.get(name, name): pairs(value) for name, value in ctor.items() if name != "init_weight"}
    module = DynamicConv(**{"padding": 0, "temperature": 34} | given)
    run_module(case, module, {"attention.": ""}, own=["temperature"])


def run_selective_kernel(case: Case) -> None:
    known = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "act_layer")
    ctor = case.take("ctor", *known, "rd_ratio", "rd_channels", "rd_divisor", "keep_3x3", "split_input")
    out = ctor.get("out_channels") or ctor["in_channels"]
    sizes = ctor.get("kernel_size") or [3, 5]
    rounded = make_divisible(out * ctor.get("rd_ratio", 1 / 16), divisor=ctor.get("rd_divisor", 8))
    module = SelectiveKernel(
        ctor["in_channels"],
        out,
        stride=ctor.get("stride", 1),
        dilation=ctor.get("dilation", 1),
        groups=ctor.get("groups", 1),
        branches=sizes if isinstance(sizes, list) else [sizes] * 2,
        dilated=ctor.get("keep_3x3", True),
        split_input=ctor.get("split_input", True),
        hidden_dim=ctor.get("rd_channels") or rounded,
        activation=activation(ctor.get("act_layer", "ReLU")),
    )
    run_module(case, module, {})


def run_split_attention(case: Case) -> None:
    conv = ("in_channels", "channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    known = ("radix", "reduction_factor", "norm_layer", "rectify", "rectify_avg")
    ctor = case.take("ctor", *conv, *known, neutral={"dropblock_prob": 0.0})
    padded = ctor.get("padding", 0) not in (0, [0, 0])
    assert not (ctor.get("rectify", False) and padded), f"{case.name}: a rectified convolution at padded borders"
    module = SplitAttention(
        ctor["in_channels"],
        ctor["channels"],
        pairs(ctor["kernel_size"]),
        pairs(ctor.get("stride", 1)),
        pairs(ctor.get("padding", 0)),
        pairs(ctor.get("dilation", 1)),
        ctor.get("groups", 1),
        ctor.get("bias", True),
        radix=ctor.get("radix", 2),
        reduction=ctor.get("reduction_factor", 4),
        norm="batch" if "state/bn0.weight" in case.tensors else "none",
    )
    run_module(case, module, {})
