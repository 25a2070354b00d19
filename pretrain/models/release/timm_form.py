"""How timm opens a release: which of its classes computes what a backbone computes, with which arguments and names.

timm reads `config.json` (a name of its registry, arguments that override that entry's) and `model.safetensors` (the
class's own parameter names). Where no class of timm's computes the same, there is no `config.json`, and the model
card gives the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.families import SWIN_OPTIONS
from pretrain.models.backbones.sizes import SIZES
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import State
from pretrain.models.layers.ffn import swiglu_hidden
from pretrain.models.layers.rel_pos import PER_BLOCK, SHARED
from pretrain.models.layers.rope import Rope

TIMM_EPS = 1e-6  # of timm's LayerNorm, which a config.json cannot change
DINOV3_EPS = 1e-5  # of timm's entries for DINOv3
VIT, BEIT, EVA, ANY = "vit", "beit", "eva", "timm"


@dataclass(frozen=True)
class TimmModel:
    """A model of timm's that computes the same.

    Attributes:
        kind: decides the names, see `to_timm`. architecture: of timm's registry. arguments: override the entry's.
        first_conv, classifier: names of those layers, which timm adapts to other channels and other classes.
        pooled_norm: argument of its class that puts the last norm after the pooling of a classifier.
        token_norm: argument that keeps a norm before it; None: that follows from `pooled_norm`.
    """

    kind: str
    architecture: str
    arguments: dict[str, Any]
    first_conv: str | None = "patch_embed.proj"
    classifier: str | None = "head"
    pooled_norm: str = "use_fc_norm"
    token_norm: str | None = None


def timm_model(backbone: ImageEncoder) -> TimmModel | str:
    """The model of timm's with the features of `backbone`, or why there is none."""
    if not isinstance(backbone, ViT | TimmBackbone) or isinstance(backbone, VideoViT):
        return f"timm has no class like {type(backbone).__name__}"
    if backbone.attention:
        kinds = ", ".join(dict.fromkeys(entry.kind for entry in backbone.attention))
        return f"timm has no class like this backbone with {kinds} in it"
    if isinstance(backbone, TimmBackbone):
        return _of_timm(backbone)
    if backbone.qk_scale is not None or backbone.ffn == "identity":
        return "timm's vision transformers have an MLP, and scores divided by the root of a head's channels"
    if backbone.ffn in ("relu2", "topk"):
        return f"timm's vision transformers have GELU or SwiGLU in their MLP, this backbone {backbone.ffn}"
    if backbone.norm_layer != "layer" or backbone.cls_norm is not None:
        return "timm's vision transformers have one last layer norm for all tokens"
    if backbone.proj_bias != backbone.ffn_bias:
        return "timm's vision transformers have both biases, of the attention's last layer and of the MLP, or neither"
    if backbone.rel_pos_kind != "none":
        return _beit(backbone)
    return _eva(backbone) if backbone.pos_kind == "rope" else _vit(backbone)


def config(model: TimmModel, backbone: ImageEncoder, *, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """config.json as timm reads it. A null `first_conv` keeps timm from fitting the first layer to other channels."""
    size, pool = list(backbone.img_size), model.arguments.get("global_pool")
    pretrained = {
        "input_size": [backbone.in_chans, *size],
        "fixed_input_size": "img_size" in model.arguments,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": model.first_conv if backbone.in_chans == 3 else None,
        "classifier": model.classifier,
    }
    return {
        "architecture": model.architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        **({} if pool is None else {"global_pool": pool}),
        "model_args": {**model.arguments, "num_classes": 0},
        "pretrained_cfg": pretrained,
    }


def to_timm(state: Mapping[str, Tensor], kind: str) -> State:
    """The state of a backbone by the names of timm's class.

    With registers timm's ViT has no layout of a class row alone (`no_embed_class` leaves out both): the class row is
    added to the class token, which gives the same first layer. Key biases are dropped where the class has none: they do
    not change the softmax, except with rotary positions, which `timm_model` refuses.
    """
    state = dict(state)
    if kind == ANY:
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if kind == VIT:
        if "reg_token" in state and "cls_token" in state and "pos_embed" in state:
            table = state["pos_embed"]
            state |= {"cls_token": state["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
        for prefix in [name.removesuffix("q_bias") for name in state if name.endswith("attn.q_bias")]:
            q, v = state.pop(f"{prefix}q_bias"), state.pop(f"{prefix}v_bias")
            state[f"{prefix}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        return state
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        prefix = name.removesuffix("qkv.bias")
        state[f"{prefix}q_bias"], _, state[f"{prefix}v_bias"] = state.pop(name).chunk(3)
    if kind == BEIT:
        weight = "blocks.0.mlp.fc{}.weight"
        gated = len(state[weight.format(1)]) == 2 * state[weight.format(2)].shape[1]
        for name in [name for name in state if gated and ".mlp.fc1." in name]:
            gate, value = state.pop(name).chunk(2)
            state |= {name.replace("fc1", "fc1_g"): gate, name.replace("fc1", "fc1_x"): value}
    return {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()}


def from_timm(state: Mapping[str, Tensor], kind: str, own: Mapping[str, Any]) -> State:
    """The inverse of `to_timm` for a backbone that was built with the arguments `own`, up to what it did not keep: the
    share of the class token in its position row, and key biases. Here both are zero."""
    state = dict(state)
    if kind == ANY:
        return {f"model.{name}": tensor for name, tensor in state.items()}
    if kind == VIT and "reg_token" in state and "cls_token" in state and "pos_embed" in state:
        table = state["pos_embed"]
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    if kind == VIT and own.get("qkv_bias") == "no_key":
        for name in [name for name in state if name.endswith("attn.qkv.bias")]:
            prefix = name.removesuffix("qkv.bias")
            state[f"{prefix}q_bias"], _, state[f"{prefix}v_bias"] = state.pop(name).chunk(3)
    if kind in (BEIT, EVA):
        if own.get("qkv_bias", True) is True:
            for prefix in [name.removesuffix("q_bias") for name in state if name.endswith("attn.q_bias")]:
                q, v = state.pop(f"{prefix}q_bias"), state.pop(f"{prefix}v_bias")
                state[f"{prefix}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        for name in [name for name in state if ".mlp.fc1_g." in name]:
            halves = [state.pop(name), state.pop(name.replace("fc1_g", "fc1_x"))]
            state[name.replace("fc1_g", "fc1")] = torch.cat(halves)
        state = {n.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for n, t in state.items()}
    return state


def architecture(backbone: ViT) -> str:
    """The entry of timm's registry to start from; `model_args` then sets every width."""
    if backbone.ffn == "swiglu":
        return "vit_giant_patch14_dinov2"
    patch = {"vit_huge": 14, "vit_giant": 14}
    for name, size in SIZES.items():
        if (size["embed_dim"], size["depth"]) == (backbone.embed_dim, backbone.depth):
            return f"{name}_patch{patch.get(name, 16)}_224"
    return "vit_base_patch16_224"


def _vit(backbone: ViT) -> TimmModel | str:
    if backbone.norm_eps != TIMM_EPS:
        return f"timm's VisionTransformer has norm_eps {TIMM_EPS:g}, this backbone {backbone.norm_eps:g}"
    arguments = _widths(backbone)
    if backbone.ffn == "swiglu":  # this entry counts the gate and the value
        arguments["mlp_ratio"] = _ratio(2 * _hidden(backbone), backbone.embed_dim)
    arguments |= {
        "qkv_bias": backbone.qkv_bias is not False,
        **({} if backbone.proj_bias else {"proj_bias": False}),
        "class_token": backbone.class_token,
        "reg_tokens": backbone.num_registers,
        "no_embed_class": backbone.num_registers > 0,
        "init_values": backbone.layer_scale,
    }
    if backbone.pos_embed is None:
        arguments["pos_embed"] = "none"
    arguments |= {"global_pool": "token"} if backbone.class_token else {"global_pool": "avg", "fc_norm": False}
    return TimmModel(VIT, architecture(backbone), arguments, pooled_norm="fc_norm")


def _beit(backbone: ViT) -> TimmModel | str:
    if backbone.norm_eps != TIMM_EPS:
        return f"timm's Beit has norm_eps {TIMM_EPS:g}, this backbone {backbone.norm_eps:g}"
    if not backbone.proj_bias:
        return "timm's Beit has biases in the attention's last layer and in the MLP"
    if not backbone.class_token or backbone.num_registers or backbone.pos_kind == "rope":
        return "timm's Beit, its class with relative-position bias, has a class token, no registers and no rotation"
    arguments = _widths(backbone) | {
        "qkv_bias": backbone.qkv_bias is not False,
        "init_values": backbone.layer_scale,
        "use_abs_pos_emb": backbone.pos_embed is not None,
        "use_rel_pos_bias": backbone.rel_pos_kind in PER_BLOCK,
        "use_shared_rel_pos_bias": backbone.rel_pos_kind in SHARED,
        "swiglu_mlp": backbone.ffn == "swiglu",
        "global_pool": "token",
    }
    return TimmModel(BEIT, "beit_base_patch16_224", arguments)


def _eva(backbone: ViT) -> TimmModel | str:
    if backbone.rope.frequencies is not None:
        return "timm has no vision transformer whose rotations have frequencies that are weights"
    if backbone.norm_eps not in (TIMM_EPS, DINOV3_EPS):
        return f"timm's Eva has norm_eps {TIMM_EPS:g} or {DINOV3_EPS:g}, this backbone {backbone.norm_eps:g}"
    if backbone.rope != Rope(base=backbone.rope.base):
        return "timm's Eva with DINOv3's rotations has periods of a base, fp32 angles and each axis its own length"
    if not backbone.proj_bias:
        return "timm's Eva has biases in the attention's last layer and in the MLP"
    if backbone.qkv_bias is True:
        return "timm's Eva, its class with rotary positions, has no key biases; train with model.qkv_bias=no_key"
    arguments = _widths(backbone) | {
        "qkv_bias": backbone.qkv_bias == "no_key",
        "class_token": backbone.class_token,
        "num_reg_tokens": backbone.num_registers,
        "init_values": backbone.layer_scale,
        "swiglu_mlp": backbone.ffn == "swiglu",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": backbone.rope.base,
        "rope_rotate_half": True,
        "dynamic_img_size": True,
        "use_fc_norm": False,
        "global_pool": "token" if backbone.class_token else "avg",
    }
    entry = "vit_base_patch16_dinov3" if backbone.norm_eps == DINOV3_EPS else "eva_giant_patch14_224"
    return TimmModel(EVA, entry, arguments, token_norm="use_post_transformer_norm")


def _of_timm(backbone: TimmBackbone) -> TimmModel | str:
    family = backbone.family
    if changed := sorted(set(SWIN_OPTIONS) & set(backbone.arguments)) if family.name == "Swin" else []:
        return f"timm's Swin has no {', '.join(changed)}"
    arguments: dict[str, Any] = {**backbone.arguments, "in_chans": backbone.in_chans}
    if backbone.takes_img_size:
        arguments["img_size"] = list(backbone.img_size)
    if "layers" in backbone.provides or backbone.class_token:
        arguments["global_pool"] = "token" if backbone.class_token else "avg"
        if not backbone.class_token:  # the norm comes before the mean, as in forward_cls
            arguments[family.pooled_norm] = False
    given = backbone.model.pretrained_cfg
    return TimmModel(
        ANY,
        backbone.name,
        arguments,
        given.get("first_conv"),
        given.get("classifier"),
        pooled_norm=family.pooled_norm,
        token_norm=family.token_norm,
    )


def _widths(backbone: ViT) -> dict[str, Any]:
    arguments = {
        "img_size": list(backbone.img_size),
        "patch_size": backbone.patch_size,
        "in_chans": backbone.in_chans,
        "embed_dim": backbone.embed_dim,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": backbone.mlp_ratio,
    }
    if backbone.ffn == "swiglu":
        arguments["mlp_ratio"] = _ratio(_hidden(backbone), backbone.embed_dim)
    return arguments


def _hidden(backbone: ViT) -> int:
    return swiglu_hidden(int(backbone.embed_dim * backbone.mlp_ratio), multiple=backbone.ffn_multiple)


def _ratio(hidden: int, dim: int) -> float:
    """An MLP ratio of which timm's int(dim * ratio) is exactly `hidden`."""
    return (hidden + 0.25) / dim
