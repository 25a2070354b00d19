"""Runs Fovea on the golden cases of DINOv2's backbone: the whole of it, and its layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models import param_groups
from pretrain.models.backbones.vit import ViT
from pretrain.models.heads.projection import DINOHead
from pretrain.models.layer_decay import layer_decay
from pretrain.models.layers.attention import Block
from pretrain.models.layers.drop_path import subset_size
from pretrain.models.layers.ffn import SwiGLU, swiglu_hidden
from tests.golden.case import Case, is_statistic, key_third

FFN = {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu", "identity": "identity"}
RESIZE = {(True, False): "dino", (True, True): "dino_antialias", (False, True): "antialias", (False, False): "exact"}
MASKED_LOSS = "mean(patch^2)+0.5*mean(cls^2)+0.01*sum(patch)"


def run_vit(case: Case) -> None:
    vit, mask_token = build_vit(case)
    patches_from = vit.num_prefix_tokens
    for name in case.config["inputs"]:
        with torch.no_grad():
            images = case[f"input/{name}"]
            tokens, (raw,) = vit(images), vit.layers(images, [vit.depth - 1])
            case.check(f"expect/{name}/x_norm_clstoken", tokens[:, 0])
            case.check(f"expect/{name}/x_norm_clstoken", vit.forward_cls(images))
            case.check(f"expect/{name}/x_norm_regtokens", tokens[:, 1:patches_from])
            case.check(f"expect/{name}/x_norm_patchtokens", tokens[:, patches_from:])
            case.check(f"expect/{name}/x_prenorm", raw)
    (last,) = [key for key in case.below("expect") if key.startswith("intermediate_last")]
    count = int(re.fullmatch(r"intermediate_last(\d+)_reshaped", last)[1])  # pyright: ignore[reportOptionalSubscript]
    native = next(name for name, size in case.config["inputs"].items() if tuple(size) == vit.img_size)
    with torch.no_grad():
        outputs = vit.intermediate(case[f"input/{native}"], count)
    maps = [tokens[:, patches_from:].transpose(1, 2).unflatten(2, vit.grid_size) for tokens in outputs]
    case.check(f"expect/{last}", torch.stack(maps))
    check_masked_pass(case, vit, mask_token, case[f"input/{native}"])
    check_decay(case, vit, mask_token)


def check_masked_pass(case: Case, vit: ViT, mask_token: nn.Parameter, images: Tensor) -> None:
    masks = case["input/masks"]
    tokens = vit(images, mask=masks, mask_token=mask_token)
    patches = tokens[:, vit.num_prefix_tokens :]
    case.check("expect/masked/x_norm_patchtokens", patches)
    case.check("expect/masked/x_norm_clstoken", tokens[:, 0])
    case.check("expect/masked/x_norm_clstoken", vit.forward_cls(images, mask=masks, mask_token=mask_token))
    described = {case.facts["tensors"][f"grad/{name}"]["what"] for name in case.below("grad")}
    assert described == {f"gradient of {MASKED_LOSS} of the masked pass"}, f"{case.name}: gradients of {described}"
    (patches.square().mean() + 0.5 * tokens[:, 0].square().mean() + 0.01 * patches.sum()).backward()
    gradients = {"mask_token": mask_token.grad} | {name: p.grad for name, p in vit.named_parameters()}
    for name, expect in case.below("grad").items():
        gradient = gradients[ours(name, chunks=chunks(case))]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient.reshape(expect.shape), zero=key_third(name, expect))


def check_decay(case: Case, vit: ViT, mask_token: nn.Parameter) -> None:
    """Learning rate and weight decay of every parameter, as multiples."""
    with_token = nn.Module()
    with_token.backbone, with_token.mask_token = vit, mask_token
    groups = layer_decay(
        param_groups.split(with_token),
        decay=case.config["lr_decay"],
        depth=vit.depth,
        prefix="backbone.",
        first=("mask_token",),
        patch_embed_lr_scale=0.2,
    )
    found = {
        name.removeprefix("backbone."): (group["lr_scale"], group["weight_decay_scale"])
        for group in groups
        for name in group["names"]
    }
    ((title, table),) = case.facts["tables"].items()
    assert title == "param -> [lr_multiplier, wd_multiplier, is_last_layer]", f"{case.name}: table {title}"
    assert found.keys() == {ours(name, chunks=chunks(case)) for name in table}, f"{case.name}: other parameters"
    for name, (lr, decay, is_last) in table.items():
        assert not is_last, f"{name}: a backbone has no last layer of prototypes"
        got = found[ours(name, chunks=chunks(case))]
        assert abs(got[0] - lr) <= 1e-12 and got[1] == decay, f"{case.name}: {name} has {got}, not {(lr, decay)}"


def build_vit(case: Case) -> tuple[ViT, nn.Parameter]:
    """The official backbone in evaluation mode, and its mask token [1, 1, D]."""
    vit = new_vit(case).eval()
    state = {ours(name, chunks=chunks(case)): value for name, value in case.below("state").items()}
    mask_token = nn.Parameter(state.pop("mask_token")[None])
    vit.load_state_dict(state)
    return vit, mask_token


def new_vit(case: Case) -> ViT:
    """Of the official backbone's kind, with weights of its own."""
    known = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    known += ("init_values", "ffn_layer", "block_chunks", "num_register_tokens")
    known += ("interpolate_antialias", "interpolate_offset")
    known += ("ffn_bias", "proj_bias", "drop_path_uniform")
    neutral = {"drop_path_rate": 0}
    ctor = case.take("ctor", *known, neutral=neutral)
    side = ctor["img_size"]
    offset, antialias = float(ctor.get("interpolate_offset", 0.1)), bool(ctor.get("interpolate_antialias", False))
    return ViT(
        tuple(side) if isinstance(side, list) else (side, side),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor["embed_dim"],
        ctor["depth"],
        ctor["num_heads"],
        ctor.get("mlp_ratio", 4.0),
        num_registers=ctor.get("num_register_tokens", 0),
        pos_embed="learned",
        pos_offset=offset,
        pos_resize=RESIZE[offset != 0, antialias],  # pyright: ignore[reportArgumentType]
        qkv_bias=ctor.get("qkv_bias", True),
        layer_scale=ctor.get("init_values") or None,
        proj_bias=ctor.get("proj_bias", True),
        ffn_bias=ctor.get("ffn_bias", True),
        ffn=FFN[ctor.get("ffn_layer", "mlp")],  # pyright: ignore[reportArgumentType]
    )


def chunks(case: Case) -> bool:
    """Blocks in chunks: the official names then carry the chunk before the block."""
    return bool(case.config["ctor"].get("block_chunks", 1))


def ours(name: str, *, chunks: bool = False) -> str:
    """Our name of a parameter of the official backbone."""
    if chunks:
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return name.replace("register_tokens", "reg_token").replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")


def run_layers(case: Case) -> None:
    """Every layer in evaluation mode with its gradient, and the block with stochastic depth by subset."""
    case.only(
        "batch", "tokens", "dim", "heads", "mlp_ratio", "init_values", "drop_path", "ffn", "out_dim", "qkv_bias",
        "proj_bias", "ffn_bias", "mlp_bias", "use_bn", "nlayers", "hidden_dim", "bottleneck_dim",
    )  # fmt: skip
    modules = {name: built for name in _kinds(case) if (built := _layer(case, name)) is not None}
    x = case["input/x"].clone().requires_grad_()
    loss = torch.zeros(())
    for name, module in modules.items():
        out = module.eval()(x)
        case.check(f"expect/eval/{name}", out)
        loss = loss + out.square().mean()
    loss.backward()
    assert x.grad is not None
    case.check("expect/dx", x.grad)
    for name, expect in case.below("grad").items():
        kind, _, rest = name.partition(".")
        case.check(f"grad/{name}", _gradient(modules[kind], kind, rest), zero=key_third(name, expect))
    if "expect/train_stochastic_depth/block" in case.due:
        _check_subsets(case, modules["block"], x.detach())


def _check_subsets(case: Case, block: nn.Module, x: Tensor) -> None:
    """Uniform numbers whose largest belong to the samples that the official permutations began with."""
    rate = case.config["drop_path"]
    assert rate > 0.1, f"{case.name}: the official block drops by subset above 0.1 only"
    assert isinstance(block, Block)
    block.train()
    block.drop_rate, block.drop_subset = rate, True
    columns = []
    for key in ("draw/randperm0", "draw/randperm1"):
        order = case[key]
        assert subset_size(len(x), rate) <= len(order)
        columns.append(torch.empty(len(order)).scatter_(0, order, torch.linspace(1, 0, len(order))))
    case.check("expect/train_stochastic_depth/block", block(x, drop=torch.stack(columns, dim=1)))


def _kinds(case: Case) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in case.below("state")))


def _layer(case: Case, kind: str) -> nn.Module:
    """A layer of ours with the weights of the case."""
    config: dict[str, Any] = case.config
    state = {name.removeprefix(kind + "."): t for name, t in case.below("state").items() if name.startswith(kind + ".")}
    if kind == "block":
        block = Block(
            config["dim"],
            config["heads"],
            mlp_ratio=config["mlp_ratio"],
            qkv_bias="attn.qkv.bias" in state,
            layer_scale=config["init_values"] or None,
            ffn=FFN[config["ffn"]],  # pyright: ignore[reportArgumentType]
            ffn_bias=config["ffn"] == "identity" or any(name.startswith("mlp.") and "bias" in name for name in state),
            proj_bias="attn.proj.bias" in state,
            norm_eps=1e-6,
        )
        block.load_state_dict({ours(name): tensor for name, tensor in state.items()})
        return block
    if kind == "layerscale":
        scale = Block(config["dim"], config["heads"], layer_scale=config["init_values"] or 1.0).ls1
        scale.load_state_dict(state)
        return scale
    if kind == "head":
        weights = [name for name, tensor in state.items() if name.startswith("mlp.") and tensor.ndim == 2]
        weights.sort(key=lambda name: int(name.split(".")[1]) if name.count(".") == 2 else 0)
        head = DINOHead(
            config["dim"],
            config["out_dim"],
            nlayers=len(weights),
            hidden_dim=len(state[weights[0]]),
            bottleneck_dim=len(state[weights[-1]]),
            use_bn=any(is_statistic(name) for name in state),
            mlp_bias=weights[0].replace("weight", "bias") in state,
            norm_last_layer=f"grad/{kind}.last_layer.weight_g" not in case.tensors,
        )
        head.load_state_dict(state)
        return head
    if kind == "swiglu_aligned":  # gate and value apart
        state = {
            f"w12.{part}": torch.cat([state[f"w1.{part}"], state[f"w2.{part}"]]) for part in ("weight", "bias")
        } | {name: tensor for name, tensor in state.items() if name.startswith("w3.")}
    if "fc1.weight" in state:
        block = Block(
            config["dim"], 1, mlp_ratio=len(state["fc1.weight"]) / config["dim"], ffn_bias="fc1.bias" in state
        )
        block.mlp.load_state_dict(state)
        return block.mlp
    assert "w3.weight" in state, f"{case.name}: a layer the runner does not know: {kind}"
    layer = SwiGLU(config["dim"], state["w3.weight"].shape[1], bias="w3.bias" in state)
    layer.load_state_dict({name.replace("w12", "fc1").replace("w3", "fc2"): tensor for name, tensor in state.items()})
    if kind == "swiglu_fused":
        assert swiglu_hidden(int(config["dim"] * config["mlp_ratio"])) == state["w3.weight"].shape[1]
    return layer


def _gradient(module: nn.Module, kind: str, name: str) -> Tensor:
    parameters = dict(module.named_parameters())
    if kind == "swiglu_aligned" and name[:2] in ("w1", "w2"):
        gradient = parameters["fc1" + name[2:]].grad
        assert gradient is not None
        return gradient.chunk(2)[name.startswith("w2")]
    gradient = parameters[ours(f"mlp.{name}").removeprefix("mlp.") if kind.startswith("swiglu") else ours(name)].grad
    assert gradient is not None, f"{kind}.{name}: no gradient reached it"
    return gradient
