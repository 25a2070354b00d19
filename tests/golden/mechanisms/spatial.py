"""Spatial mechanisms on their golden cases."""

from __future__ import annotations

import copy
from typing import Any, get_args

import torch
from torch import Tensor

from pretrain.models.mechanisms.spatial.criss_cross import CrissCross
from pretrain.models.mechanisms.spatial.deform_conv import DeformConv
from pretrain.models.mechanisms.spatial.em_attention import EMAttention
from pretrain.models.mechanisms.spatial.external import ExternalAttention
from pretrain.models.mechanisms.spatial.non_local import NonLocal, Similarity
from pretrain.models.mechanisms.spatial.position_attention import PositionAttention
from pretrain.models.mechanisms.spatial.spatial_transformer import SpatialTransformer
from pretrain.models.mechanisms.spatial.stand_alone import StandAloneAttention
from tests.golden.case import Case
from tests.golden.mechanisms.module import check_buffers, check_gradients, load_state, run_module

BN_MOMENTUM = 3e-4  # of EMANet and Hamburger; no option of their constructors
PLACES = {"query_conv": "query", "key_conv": "key", "value_conv": "value"}


def known(case: Case, *keys: str) -> dict[str, Any]:
    """The config, refusing keys that this runner would leave out."""
    unknown = set(case.config) - {"seed", "input", *keys}
    assert not unknown, f"{case.name}: config has options the runner does not know: {sorted(unknown)}"
    return case.config


def run_position(case: Case) -> None:
    known(case, "ctor")
    run_module(case, PositionAttention(case.take("ctor", "in_dim")["in_dim"]), PLACES)


def run_criss_cross(case: Case) -> None:
    recurrence = known(case, "ctor", "recurrence").get("recurrence", 1)
    module = CrissCross(case.take("ctor", "in_dim")["in_dim"], recurrence=recurrence)
    run_module(case, module, PLACES)
    if "expect/out_first" in case.tensors:
        case.check("expect/out_first", module.once(case["input/x"]))


def run_non_local(case: Case) -> None:
    config = known(case, "ctor", "variant", "dimension")
    ctor = case.take("ctor", "in_channels", "inter_channels", "sub_sample", "bn_layer", "dimension")
    dimension = config.get("dimension", ctor.get("dimension"))
    assert dimension in (None, case["input/x"].dim() - 2), f"{case.name}: maps are not of dimension {dimension}"
    has_norm, pooled = ctor.get("bn_layer", True), ctor.get("sub_sample", True)
    module = NonLocal(
        ctor["in_channels"],
        inner_dim=ctor.get("inter_channels"),
        similarity=similarity(config.get("variant", "embedded_gaussian")),
        sub_sample=pooled,
        norm="batch" if has_norm else None,
    )
    names = {"W.0": "proj", "W.1": "norm", "W": "proj", "g.0": "g", "phi.0": "phi", "concat_project.0": "pair"}
    run_module(case, module, names)
    for key in ("expect/map", "expect/map_eval"):
        if key in case.tensors:
            case.check(key, module.weights(case["input/x"]))


def similarity(variant: str) -> Similarity:
    """Our name of a variant: embedded_gaussian, gaussian, dot_product, concatenation."""
    return next(name for name in get_args(Similarity) if name[:4] == variant[:4])


def run_em(case: Case) -> None:
    config = known(case, "ctor", "steps", "em_mom")
    ctor = case.take("ctor", "c", "k", "stage_num")
    iterations, momentum = ctor.get("stage_num", 3), config.get("em_mom", 0.9)
    module = EMAttention(
        ctor["c"], num_bases=ctor["k"], iterations=iterations, momentum=momentum, bn_momentum=BN_MOMENTUM
    )
    names = {"mu": "bases", "conv1": "proj_in", "conv2.0": "proj", "conv2.1": "norm"}
    ours = load_state(case, module, names)
    first = copy.deepcopy(module).eval()
    for step in range(config["steps"]):
        x = case[f"input/x{step}"].clone().requires_grad_()
        module.zero_grad()
        case.check(f"expect/mu{step}", module.fit(x)[0])
        out = module.train()(x)
        case.check(f"expect/out{step}", out)
        (out * case[f"input/grad_out{step}"]).sum().backward()
        check_gradients(case, module, ours, {f"input/x{step}": x}, suffix=f"#{step}")
        module.after_step()
        check_buffers(case, module, names, f"expect/after{step}")
        if f"expect/out{step}_eval" in case.tensors:
            with torch.no_grad():
                case.check(f"expect/out{step}_eval", (copy.deepcopy(module).eval() if step else first)(x))


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def run_external(case: Case) -> None:
    config = known(case, "channels", "slots")
    module = ExternalAttention(config["channels"], num_slots=config.get("slots", 64))
    names = {
        "conv1": "proj_in",
        "linear_0": "memory_keys",
        "linear_1": "memory_values",
        "conv2.0": "proj",
        "conv2.1": "norm",
    }
    run_module(case, module, names)


def run_stand_alone(case: Case) -> None:
    config = known(case, "in_channels", "out_channels", "heads", "kernel_size", "stride", "padding", "dilation", "bias")
    kernel = config["kernel_size"]
    options = {key: config[key] for key in ("stride", "dilation", "bias") if key in config}
    options["padding"] = config.get("padding", options.get("dilation", 1) * (kernel // 2))
    sizes = (config["in_channels"], config["out_channels"], kernel)
    names = {"rel_h": "rel_rows", "rel_w": "rel_columns"}
    run_module(case, StandAloneAttention(*sizes, num_heads=config["heads"], **options), names)
    padded = StandAloneAttention(*sizes, num_heads=config["heads"], **options, border="zero")
    load_state(case, padded, names)
    case.check("expect/out_zero_padded", padded(case["input/x"]))


def run_per_channel(case: Case) -> None:
    known(case, "ctor")
    ctor = case.take("ctor", "in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "bias")
    ctor = {"padding": 0} | {key: value for key, value in ctor.items() if key != "groups"}  # its heads: without effect
    module = StandAloneAttention(**ctor, border="zero", per_channel=True)
    run_module(case, module, {**PLACES, "rel_h": "rel_rows", "rel_w": "rel_columns"})


def run_transformer(case: Case) -> None:
    size = known(case, "size", "align_corners").get("size")
    for corners, name in ((True, "corners"), (False, "centres")):
        if f"expect/{name}/out" not in case.tensors:
            continue
        x, theta = (case[f"input/{key}"].clone().requires_grad_() for key in ("x", "theta"))
        to = (size[0], size[1]) if size else None
        module = SpatialTransformer(x.shape[1], size=to, align_corners=corners)
        case.check(f"expect/{name}/grid", module.grid(x, theta))
        out = module.warp(x, theta)
        case.check(f"expect/{name}/out", out)
        (out * case["input/grad_out"]).sum().backward()
        case.check(f"grad/{name}/input/x", grad(x))
        case.check(f"grad/{name}/input/theta", grad(theta))


def run_deform(case: Case) -> None:
    geometry = ("kernel_size", "stride", "padding", "dilation", "groups", "offset_groups")
    config = known(case, "modulated", "in_channels", "out_channels", "bias", *geometry)
    options = {key: pair(config[key]) for key in ("stride", "padding", "dilation") if key in config}
    options |= {key: config[key] for key in ("groups", "offset_groups") if key in config}
    channels, bias = case["input/x"].shape[1], config.get("bias", "state/bias" in case.tensors)
    module = DeformConv(
        channels,
        config["out_channels"],
        pair(config["kernel_size"]),
        **options,
        bias=bias,
        modulated=config["modulated"],
    )
    names = {"weight": "conv.weight", "bias": "conv.bias", "conv_offset": "offset"}
    ours = load_state(case, module, names)
    x = case["input/x"].clone().requires_grad_()
    offsets, masks = module.predict(x)
    offsets.retain_grad()
    out = module.sample(x, offsets, masks)
    (out * case["input/grad_out"]).sum().backward()
    case.check("expect/offset", offsets)
    case.check("expect/out", out)
    case.check("expect/out", module(x))
    if masks is not None:
        case.check("expect/mask", masks)
    check_gradients(case, module, ours, {"input/x": x, "offset": offsets})


def pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
