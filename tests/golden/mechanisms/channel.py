"""Channel mechanisms on their golden cases."""

from __future__ import annotations

from functools import partial

from timm.models.xcit import XCABlock
from torch import nn

from pretrain.models.mechanisms.channel.channel_map import ChannelMap
from pretrain.models.mechanisms.channel.eca import ECA
from pretrain.models.mechanisms.channel.fca import FCA
from pretrain.models.mechanisms.channel.squeeze_excitation import SqueezeExcitation
from pretrain.models.mechanisms.channel.xca import XCA
from tests.golden.case import Case
from tests.golden.mechanisms.module import run_module

ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Sigmoid": "sigmoid", "Hardsigmoid": "hard_sigmoid", "GELU": "gelu"}


def activation(name: str) -> str:
    """timm's name of a class of torch.nn."""
    short = name.removeprefix("torch.nn.").removeprefix("nn.")
    return ACTIVATIONS.get(short, short)


def run_se_bias(case: Case) -> None:
    ctor = case.take("ctor", "input_channels", "squeeze_channels", "activation", "scale_activation")
    module = SqueezeExcitation(
        ctor["input_channels"],
        hidden_dim=ctor["squeeze_channels"],
        activation=activation(ctor.get("activation", "ReLU")),
        gate=activation(ctor.get("scale_activation", "Sigmoid")),  # type: ignore[arg-type]
    )
    run_module(case, module, {})


def run_se_nobias(case: Case) -> None:
    ctor = case.take("ctor", "channel", "reduction")
    module = SqueezeExcitation(ctor["channel"], ctor.get("reduction", 16), bias=False)
    run_module(case, module, {"fc.0": "fc1", "fc.2": "fc2"})


def run_eca(case: Case) -> None:
    ctor = case.take("ctor", "channel", "k_size")
    run_module(case, ECA(ctor["channel"], ctor.get("k_size", 3)), {})
    table = case.facts.get("tables", {})
    for rule, sizes in table.items():
        if rule.startswith("adaptive kernel size"):
            ours = {channels: ECA(int(channels)).conv.kernel_size[0] for channels in sizes}
            assert ours == sizes, f"{case.name}: kernel sizes {ours}, expected {sizes}"


def run_fca(case: Case) -> None:
    ctor = case.take("ctor", "channel", "dct_h", "dct_w", "reduction", "freq_sel_method")
    method = ctor.get("freq_sel_method", "top16")
    module = FCA(
        ctor["channel"],
        ctor.get("reduction", 16),
        grid=(ctor["dct_h"], ctor["dct_w"]),
        ranking=method[:3],
        num_frequencies=int(method[3:]),
    )
    if "expect/basis" in case.tensors:
        case.check("expect/basis", module.basis)
    run_module(case, module, {"fc.0": "fc1", "fc.2": "fc2"}, unused=["dct_layer.weight"])


def run_xca(case: Case) -> None:
    neutral = {"attn_drop": 0.0, "proj_drop": 0.0}
    ctor = case.take("ctor", "dim", "num_heads", "qkv_bias", "qk_scale", neutral=neutral)  # qk_scale: never read
    module = XCA(ctor["dim"], ctor.get("num_heads", 8), qkv_bias=ctor.get("qkv_bias", False))
    run_module(case, module, {})


def run_xca_block(case: Case) -> None:
    """timm's block: Fovea has it through timm's XCiT."""
    known = ("dim", "num_heads", "mlp_ratio", "qkv_bias", "eta", "qk_scale", "num_tokens")  # the last two: never read
    ctor = case.take("ctor", *known, neutral={"drop": 0.0, "attn_drop": 0.0, "drop_path": 0.0})
    module = XCABlock(
        ctor["dim"],
        ctor["num_heads"],
        mlp_ratio=ctor.get("mlp_ratio", 4.0),
        qkv_bias=ctor.get("qkv_bias", False),
        eta=ctor["eta"],
        norm_layer=partial(nn.LayerNorm, eps=case.config.get("norm_eps", 1e-6)),  # type: ignore[arg-type]
    )
    rows, columns = case.config["grid"]
    run_module(case, module, {}, call=lambda block, x: block(x, rows, columns))


def run_danet_cam(case: Case) -> None:
    ctor = case.take("ctor", "in_dim")
    run_module(case, ChannelMap(ctor["in_dim"]), {})
