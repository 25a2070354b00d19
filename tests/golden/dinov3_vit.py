"""Runs Fovea on the golden cases of DINOv3's backbone and of its rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.attention import new_norm
from pretrain.models.layers.rope import NUM_DRAWN, Rope, moved_axes, rotate
from tests.golden.case import Case

NORMS: dict[str, tuple[Any, float]] = {
    "layernorm": ("layer", 1e-6),
    "layernormbf16": ("layer", 1e-5),
    "rmsnorm": ("rms", 1e-5),
}
FFNS: dict[str, tuple[Any, int]] = {
    "mlp": ("mlp", 8),
    "swiglu": ("swiglu", 8),
    "swiglu32": ("swiglu", 32),
    "swiglu64": ("swiglu", 64),
    "swiglu128": ("swiglu", 128),
}
# Options of the official constructor that the runner applies; in the file of a whole step they have another prefix.
ROPE_OPTIONS = ("base", "min_period", "max_period", "normalize_coords", "shift_coords", "jitter_coords")
ROPE_OPTIONS += ("rescale_coords", "dtype")
KNOWN = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "ffn_ratio", "layerscale_init")
KNOWN += ("n_storage_tokens", "mask_k_bias", "untie_global_and_local_cls_norm", "untie_cls_and_patch_norms")
KNOWN += ("norm_layer", "ffn_layer", "qkv_bias", "proj_bias", "ffn_bias", "drop_path_rate")
KNOWN += tuple(f"pos_embed_rope_{name}" for name in ROPE_OPTIONS)


def run_rope(case: Case) -> None:
    known = ("batch", "prefix", "embed_dim", "num_heads", "base", "min_period", "max_period", "normalize_coords")
    case.only(*known, "shift_coords", "jitter_coords", "rescale_coords", "grids")
    config, head_dim = case.config, case.config["embed_dim"] // case.config["num_heads"]
    rope, low = new_rope(config, ""), new_rope({**config, "dtype": "bf16"}, "")
    case.check("expect/periods", rope.periods_of(head_dim))
    case.check("expect/bf16/periods", low.periods_of(head_dim))
    moves = movement(config, "")
    for index, grid in enumerate(map(tuple, config["grids"])):
        axes = moved_axes(drawn_uniforms(case, f"draw/{index}", moves), **moves)
        for mode, table in (("eval", rope.table(grid, head_dim)), ("train", rope.table(grid, head_dim, axes=axes))):
            for part, values in zip(("sin", "cos"), table[:, 0, 0], strict=True):
                case.check(f"expect/{mode}/{index}/{part}", values)
    grid = tuple(config["grids"][0])
    for part, values in zip(("sin", "cos"), low.table(grid, head_dim)[:, 0, 0], strict=True):
        case.check(f"expect/bf16/{part}", values)
    table = rope.table(grid, head_dim, num_prefix=config["prefix"])
    for name in ("q", "k"):
        x = case[f"input/{name}"].clone().requires_grad_()
        turned = rotate(x, table)
        case.check(f"expect/rotated_{name}", turned)
        (gradient,) = torch.autograd.grad((turned * case[f"input/grad_{name}"]).sum(), x)
        case.check(f"grad/input/{name}", gradient)


def new_rope(options: Mapping[str, Any], prefix: str) -> Rope:
    """Of the official options with this prefix."""
    first, last = options.get(f"{prefix}min_period"), options.get(f"{prefix}max_period")
    return Rope(
        base=options.get(f"{prefix}base", 100.0) or 100.0,
        periods=None if first is None else (first, last),
        normalize=options.get(f"{prefix}normalize_coords", "separate"),
        precision="fp32" if options.get(f"{prefix}dtype", "fp32") == "fp32" else "bf16",
    )


def movement(options: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    """The arguments of `moved_axes`."""
    return {name: options.get(f"{prefix}{name}_coords") for name in ("shift", "jitter", "rescale")}


def drawn_uniforms(case: Case, where: str, moves: Mapping[str, float | None]) -> Tensor:
    """The uniform random numbers [NUM_DRAWN] that the recorded draws came from."""
    uniform = torch.full((NUM_DRAWN,), 0.5)
    for name, places in (("shift", slice(0, 2)), ("jitter", slice(2, 4)), ("rescale", slice(4, 5))):
        if (limit := moves[name]) is not None:
            reach = limit if name == "shift" else math.log(limit)
            uniform[places] = (case[f"{where}/{name}"] / reach + 1) / 2
    return uniform


def axes_of_blocks(case: Case, where: str, entry: int, depth: int, moves: Mapping[str, float | None]) -> Tensor | None:
    """[depth, 2, 2] of an entry of the list of resolutions."""
    if not any(moves.values()):
        return None
    drawn = [drawn_uniforms(case, f"{where}/block{i}/entry{entry}", moves) for i in range(depth)]
    return moved_axes(torch.stack(drawn), **moves)


def drops_of_blocks(case: Case, where: str, entry: int, depth: int) -> Tensor | None:
    """Uniform numbers [b, depth, 2] whose largest are at the samples that the recorded permutations begin with."""
    if f"{where}/block0/attn/entry{entry}" not in case.tensors:
        return None
    blocks = []
    for i in range(depth):
        orders = [case[f"{where}/block{i}/{branch}/entry{entry}"] for branch in ("attn", "mlp")]
        columns = [torch.empty(len(o)).scatter_(0, o, torch.linspace(1, 0, len(o))) for o in orders]
        blocks.append(torch.stack(columns, dim=1))
    return torch.stack(blocks, dim=1)


def new_vit(ctor: Mapping[str, Any]) -> ViT:
    """Of the official constructor's options, with weights of its own; its drop path is by subset, equal in all blocks.

    The last norm of local crops belongs to the objective here.
    """
    norm, eps = NORMS[ctor.get("norm_layer", "layernorm")]
    ffn, multiple = FFNS[ctor.get("ffn_layer", "mlp")]
    qkv_bias = ctor.get("qkv_bias", True)
    rope = new_rope(ctor, "pos_embed_rope_")
    vit = ViT(
        (ctor["img_size"], ctor["img_size"]),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor["embed_dim"],
        ctor["depth"],
        ctor["num_heads"],
        ctor.get("ffn_ratio", 4.0),
        num_registers=ctor.get("n_storage_tokens", 0),
        pos_embed="rope",
        rope=vars(rope),
        qkv_bias="no_key" if qkv_bias and ctor.get("mask_k_bias", False) else qkv_bias,
        layer_scale=ctor.get("layerscale_init"),
        ffn=ffn,
        ffn_multiple=multiple,
        ffn_bias=ctor.get("ffn_bias", True),
        proj_bias=ctor.get("proj_bias", True),
        norm_layer=norm,
        norm_eps=eps,
        cls_norm=ctor.get("untie_cls_and_patch_norms", False),
    )
    vit.set_drop_path(ctor.get("drop_path_rate", 0.0), uniform=True, subset=True)
    return vit


def run_vit(case: Case) -> None:
    case.only("batch", "sizes", "ctor")
    ctor = case.take("ctor", *KNOWN)
    vit = new_vit(ctor)
    state = case.below("state")
    case_periods = state["rope_embed.periods"]
    torch.testing.assert_close(vit.rope.periods_of(vit.embed_dim // vit.num_heads), case_periods)
    vit.load_state_dict({name: ours(state, name) for name in vit.state_dict()})
    mask_token = nn.Parameter(state["mask_token"][None])
    local_norm = new_norm(vit.norm_layer, vit.embed_dim, vit.norm_eps) if "local_cls_norm.weight" in state else None
    if local_norm is not None:
        local_norm.load_state_dict({name: state[f"local_cls_norm.{name}"] for name in local_norm.state_dict()})
    moves, prefix = movement(ctor, "pos_embed_rope_"), vit.num_prefix_tokens

    loss = torch.zeros(())
    vit.train()
    for entry in (0, 1):
        images = case[f"input/x{entry}"]
        given: dict[str, Any] = {
            "axes": axes_of_blocks(case, "draw/rope", entry, vit.depth, moves),
            "drop": drops_of_blocks(case, "draw/drop_path", entry, vit.depth),
        }
        if entry == 0:
            given |= {"mask": case["input/masks0"], "mask_token": mask_token}
        (raw,) = vit.layers(images, [vit.depth - 1], **given)
        case.check(f"expect/train/{entry}/x_prenorm", raw)
        tokens = vit(images, **given)
        if entry == 1 and local_norm is not None:
            of_class = vit.forward_cls(images, **given, norm=local_norm)
            tokens = torch.cat([local_norm(raw[:, :prefix]), tokens[:, prefix:]], dim=1)
            torch.testing.assert_close(of_class, tokens[:, 0])
        outputs = check_tokens(case, f"expect/train/{entry}", tokens, prefix)
        loss = loss + sum((out * case[f"input/cotangent{entry}/{name}"]).sum() for name, out in outputs.items())
    case.check("expect/loss", loss)
    loss.backward()
    gradients = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
    gradients |= {"mask_token": mask_token.grad[0]}  # pyright: ignore[reportOptionalSubscript]
    if local_norm is not None:
        gradients |= {f"local_cls_norm.{name}": p.grad for name, p in local_norm.named_parameters()}  # pyright: ignore
    for name, expect in case.below("grad").items():
        case.check(f"grad/{name}", official(gradients, name, expect))

    vit.eval()
    with torch.no_grad():
        for entry in (0, 1):
            tokens, (raw,) = vit(case[f"input/x{entry}"]), vit.layers(case[f"input/x{entry}"], [vit.depth - 1])
            check_tokens(case, f"expect/eval/{entry}", tokens, prefix)
            case.check(f"expect/eval/{entry}/x_prenorm", raw)
        case.check("expect/eval/0/class_token_output", vit.forward_cls(case["input/x0"]))
        count = len({key.split("/")[0] for key in case.below("expect/intermediate")})
        grid = tuple(side // vit.patch_size for side in case["input/x0"].shape[2:])
        for index, tokens in enumerate(vit.intermediate(case["input/x0"], count)):
            where = f"expect/intermediate/{index}"
            case.check(f"{where}/patches", tokens[:, prefix:].transpose(1, 2).unflatten(2, grid))
            case.check(f"{where}/class", tokens[:, 0])
            if f"{where}/storage" in case.due:
                case.check(f"{where}/storage", tokens[:, 1:prefix])


def check_tokens(case: Case, where: str, tokens: Tensor, prefix: int) -> dict[str, Tensor]:
    """Compare the outputs by their official names, and return them."""
    parts = {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, prefix:]}
    if prefix > 1:
        parts |= {"x_storage_tokens": tokens[:, 1:prefix]}
    for name, part in parts.items():
        case.check(f"{where}/{name}", part)
    return parts


def ours(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The value of our parameter `name` in an official state."""
    stem, _, leaf = name.rpartition(".")
    if leaf in ("q_bias", "v_bias"):
        return state[f"{stem}.qkv.bias"].chunk(3)[0 if leaf == "q_bias" else 2]
    if f"{stem.removesuffix('fc1').removesuffix('fc2')}w1.{leaf}" in state:  # gate and value apart
        stem = stem.removesuffix("fc1") if stem.endswith("fc1") else stem
        if stem.endswith("."):
            return torch.cat([state[f"{stem}w1.{leaf}"], state[f"{stem}w2.{leaf}"]])
        return state[f"{stem.removesuffix('fc2')}w3.{leaf}"]
    return state[name.replace("reg_token", "storage_tokens")]


def official(named: Mapping[str, Tensor], name: str, like: Tensor, *, key: Tensor | None = None) -> Tensor:
    """The official parameter `name`, of the shape of `like`, from values by our names.

    Args:
        key: what stands in the key third of a masked bias, which has no parameter here; None: zeros.
    """
    stem, _, leaf = name.rpartition(".")
    if name.endswith("attn.qkv.bias") and f"{stem.removesuffix('qkv')}q_bias" in named:
        q, v = (named[f"{stem.removesuffix('qkv')}{part}_bias"] for part in "qv")
        return torch.cat([q, torch.zeros_like(q) if key is None else key, v])
    change: dict[str, Callable[[str], Tensor]] = {
        "mlp.w1": lambda at: named[f"{at}mlp.fc1.{leaf}"].chunk(2)[0],
        "mlp.w2": lambda at: named[f"{at}mlp.fc1.{leaf}"].chunk(2)[1],
        "mlp.w3": lambda at: named[f"{at}mlp.fc2.{leaf}"],
    }
    for end, value in change.items():
        if stem.endswith(end):
            return value(stem.removesuffix(end))
    return named[name.replace("storage_tokens", "reg_token")].reshape(like.shape)
