"""Channel and spatial mechanisms on their golden cases."""

from __future__ import annotations

from typing import Any

from pretrain.models.mechanisms.channel_spatial.bam import BAM
from pretrain.models.mechanisms.channel_spatial.cbam import CBAM
from pretrain.models.mechanisms.channel_spatial.coordinate import CoordinateAttention
from pretrain.models.mechanisms.channel_spatial.global_context import GlobalContext
from pretrain.models.mechanisms.channel_spatial.lka import LKA, LKABlock
from pretrain.models.mechanisms.channel_spatial.simam import SimAM
from tests.golden.case import Case
from tests.golden.mechanisms.module import run_module

LKA_NAMES = {
    "proj_1": "proj_in",
    "spatial_gating_unit.conv0": "near",
    "spatial_gating_unit.conv_spatial": "far",
    "spatial_gating_unit.conv1": "mix",
    "proj_2": "proj_out",
}


def run_cbam(case: Case) -> None:
    ctor = case.take("ctor", "gate_channels", "reduction_ratio", "pool_types", "no_spatial")
    module = CBAM(
        ctor["gate_channels"],
        ctor.get("reduction_ratio", 16),
        pools=ctor.get("pool_types", ("avg", "max")),
        spatial=not ctor.get("no_spatial", False),
    )
    names = {"ChannelGate.mlp.1": "fc1", "ChannelGate.mlp.3": "fc2"}
    run_module(case, module, names | {"SpatialGate.spatial.conv": "conv", "SpatialGate.spatial.bn": "norm"})


def run_bam(case: Case) -> None:
    """Its two gates have options that the official BAM leaves at their defaults."""
    ours = {"reduction_ratio": "reduction", "num_layers": "num_layers"}
    ours |= {"dilation_conv_num": "num_dilated", "dilation_val": "dilation"}
    ctor = case.take("ctor", "gate_channel", *ours)
    given: dict[str, Any] = {ours[name]: value for name, value in ctor.items() if name in ours}
    module = BAM(ctor["gate_channel"], **given)
    layers, dilated = given.get("num_layers", 1), given.get("num_dilated", 2)
    channel, spatial = "channel_att.gate_c.gate_c", "spatial_att.gate_s.gate_s"
    names = {f"{channel}_fc_final": f"channel.{3 * layers}", f"{spatial}_conv_final": f"spatial.{3 + 3 * dilated}"}
    for i in range(layers):
        names |= {f"{channel}_fc_{i}.": f"channel.{3 * i}.", f"{channel}_bn_{i + 1}.": f"channel.{3 * i + 1}."}
    names |= {f"{spatial}_conv_reduce0": "spatial.0", f"{spatial}_bn_reduce0": "spatial.1"}
    for i in range(dilated):
        names |= {f"{spatial}_conv_di_{i}.": f"spatial.{3 + 3 * i}.", f"{spatial}_bn_di_{i}.": f"spatial.{4 + 3 * i}."}
    run_module(case, module, names)


def run_coord(case: Case) -> None:
    ctor = case.take("ctor", "inp", "oup", "reduction")
    assert ctor["inp"] == ctor["oup"], f"{case.name}: a gate keeps its channels, got {ctor}"
    run_module(case, CoordinateAttention(ctor["inp"], ctor.get("reduction", 32)), {})


def run_simam(case: Case) -> None:
    ctor = case.take("ctor", "channels", "e_lambda")  # channels: never read
    module = SimAM(case["input/x"].shape[1], stabilizer=ctor.get("e_lambda", 1e-4))
    run_module(case, module, {})


def run_gc(case: Case) -> None:
    ctor = case.take("ctor", "inplanes", "ratio", "pooling_type", "fusion_types")
    fusion = {"channel_add": "add", "channel_mul": "scale"}
    chosen = [fusion[name] for name in ctor.get("fusion_types", ["channel_add"])]
    module = GlobalContext(
        ctor["inplanes"],
        hidden_dim=int(ctor["inplanes"] * ctor["ratio"]),
        pooling={"att": "attention", "avg": "mean"}[ctor.get("pooling_type", "att")],  # type: ignore[arg-type]
        fusion=chosen[0] if len(set(chosen)) == 1 else "both",  # type: ignore[arg-type]
    )
    names = {"conv_mask": "conv_attn"}
    for theirs, mlp in (("channel_add_conv", "mlp_add"), ("channel_mul_conv", "mlp_scale")):
        names |= {f"{theirs}.0": f"{mlp}.fc1", f"{theirs}.1": f"{mlp}.norm", f"{theirs}.3": f"{mlp}.fc2"}
    run_module(case, module, names)


def run_lka(case: Case) -> None:
    ctor = case.take("ctor", "d_model")
    run_module(case, LKA(ctor["d_model"]), LKA_NAMES)


def run_lka_block(case: Case) -> None:
    ctor = case.take("ctor", "dim", "mlp_ratio", neutral={"drop": 0.0, "drop_path": 0.0})
    module = LKABlock(ctor["dim"], mlp_ratio=ctor.get("mlp_ratio", 4.0))
    names = {f"attn.{theirs}": f"attn.{ours}" for theirs, ours in LKA_NAMES.items()}
    names |= {"layer_scale_1": "gamma1", "layer_scale_2": "gamma2"}
    run_module(case, module, names | {"mlp.fc1": "fc1", "mlp.dwconv.dwconv": "near", "mlp.fc2": "fc2"})
