"""For every objective: ours by its official recipe on a small ViT, a batch, and the plain step with the same weights.

The recipe is the file of configs/pretrain; it differs in the width, the number of prototypes, stochastic depth
(whose random numbers plain code draws by itself), and the overrides in RECIPE. Tokenizers and teachers that both
would run in the same way are omitted: their output is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.plain_beit import PlainBEiT, PlainDVAE, dvae_from_ours, from_ours
from benchmarks.plain_data2vec import PlainData2Vec
from benchmarks.plain_data2vec2 import PlainData2Vec2
from benchmarks.plain_dino import PlainDINO
from benchmarks.plain_dinov2 import PlainDINOv2
from benchmarks.plain_ibot import PlainIBOT
from benchmarks.plain_ijepa import PlainIJEPA
from benchmarks.plain_mocov3 import PlainMoCoV3
from benchmarks.plain_simmim import PlainSimMIM
from benchmarks.plain_vqkd import PlainEncoder, PlainVQKD
from launch.plan.memory import empty_batch
from pretrain.config import PretrainConfig
from pretrain.core.configlib import load_config
from pretrain.objectives import build
from pretrain.objectives.base import Horizon
from pretrain.start import build_backbone

RECIPES = Path(__file__).parents[1] / "configs" / "pretrain"
TEACHER_DIM = 512
STEPS = 10**6  # the schedules do not matter here


@dataclass
class Pair:
    """`plain(batch)` is the loss; `follow` updates its EMA after the step."""

    objective: Any
    batch: dict[str, Tensor]
    plain: nn.Module
    follow: Callable[[], None]
    clip: float
    clip_mode: str


class GivenTokens(nn.Module):
    """Replaces a tokenizer that both steps would run in the same way."""

    def __init__(self, num_tokens: int, tokens: Tensor):
        super().__init__()
        self.num_tokens, self.given = num_tokens, tokens

    def tokens(self, images: Tensor) -> Tensor:
        return self.given[: len(images)]


class GivenFeatures(nn.Module):
    """Replaces the teacher of a tokenizer."""

    embed_dim = TEACHER_DIM

    def __init__(self, given: Tensor):
        super().__init__()
        self.given = given

    def features(self, images: Tensor) -> Tensor:
        return self.given[: len(images)]


class Adapter(nn.Module):
    """A plain module called with the batch."""

    def __init__(self, module: nn.Module, call: Callable[[Any, dict[str, Tensor]], Tensor]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.call(self.module, batch)


def pair(name: str, args: argparse.Namespace) -> Pair:
    """Ours and plain for objective `name`, their losses equal up to rounding."""
    recipe, overrides = RECIPE[name]
    overrides = [text.format(size=args.size, prototypes=args.prototypes, any=__file__) for text in overrides]
    config = load_config(PretrainConfig, RECIPES / f"{recipe}.yaml", overrides)
    torch.manual_seed(0)
    batch = _batch(config, args.batch)
    objective, module = PAIRS[name](config, batch)
    if config.optim.clip_grad is None:
        clip, mode = 0.0, "none"
    else:
        clip, mode = config.optim.clip_grad, config.optim.clip_mode
    follow = getattr(module, "follow", None)
    momentum = getattr(objective, "momentum", lambda step: 0.0)
    return Pair(
        objective.to(args.device),
        {key: value.to(args.device) for key, value in batch.items()},
        module.to(args.device),
        (lambda: follow(momentum(0))) if follow is not None else lambda: None,
        clip,
        mode,
    )


def _batch(config: PretrainConfig, images: int) -> dict[str, Tensor]:
    def filled(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn_like(tensor) if tensor.ndim == 5 else torch.rand_like(tensor)

    return {name: filled(name, tensor) for name, tensor in empty_batch(config, images).items()}


def _build(config: PretrainConfig, **more: Any) -> Any:
    """Our objective; `more` are arguments of its class."""
    backbone = build_backbone(config.model)
    made: Any = build(config.objective.name)
    return made(config.objective, backbone, Horizon(STEPS, 1000), **more)


def _settings(config: PretrainConfig) -> Any:
    """The section of the objective."""
    return config.objective


def _shape(config: PretrainConfig) -> dict[str, int]:
    """The arguments of plain ViTs."""
    widths = config.model.widths()
    shape = {key: widths[key] for key in ("embed_dim", "depth", "num_heads")}
    return {"img_size": config.model.size[0], "patch_size": config.model.patch_size, **shape}


def _head(config: Any) -> dict[str, int]:
    return {"hidden_dim": config.head_hidden_dim, "bottleneck_dim": config.head_bottleneck_dim}


def _mae(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    made = plain.PlainMAE(
        plain.plain_vit(**_shape(config)),
        decoder_dim=set_to.decoder_embed_dim,
        decoder_depth=set_to.decoder_depth,
        decoder_heads=set_to.decoder_num_heads,
    )
    made.load_state_dict({name.replace("decoder.", "decoder_"): value for name, value in ours.state_dict().items()})
    made.encoder.pos_embed.requires_grad_(False)
    return ours, Adapter(made, lambda module, batch: module(batch["image"][:, 0], batch["mask_noise"]))


def _dino(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    made = PlainDINO(plain.plain_vit(**_shape(config)), out_dim=set_to.out_dim, **_head(set_to))
    made.load_ours(ours.state_dict())
    return ours, made


def _ibot(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    made = PlainIBOT(
        plain.plain_vit(**_shape(config)),
        out_dim=set_to.out_dim,
        patch_out_dim=set_to.patch_out_dim,
        shared_head=set_to.shared_head,
        shared_head_teacher=set_to.shared_head_teacher,
        student_temp=set_to.student_temp,
        teacher_temp=set_to.warmup_teacher_temp,
        teacher_patch_temp=set_to.warmup_teacher_patch_temp,
        **_head(set_to),
    )
    made.load_ours(ours.state_dict())
    return ours, made


def _dinov2(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    made = PlainDINOv2(
        plain.plain_vit(**_shape(config)),
        out_dim=set_to.out_dim,
        patch_out_dim=set_to.patch_out_dim if set_to.separate_patch_head else None,
        student_temp=set_to.student_temp,
        teacher_temp=set_to.warmup_teacher_temp,
        centering=set_to.centering,
        koleo_weight=set_to.koleo_weight,
        **_head(set_to),
    )
    made.load_ours(ours.state_dict())
    return ours, made


def _mocov3(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    made = PlainMoCoV3(
        plain.plain_vit(**_shape(config)),
        hidden_dim=set_to.hidden_dim,
        out_dim=set_to.projection_dim,
        temperature=set_to.temperature,
        momentum=set_to.momentum,
    )
    made.load_ours(ours.state_dict())
    return ours, Adapter(made, lambda module, batch: module(*batch["views"].unbind(1)))


def _beit(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    set_to = _settings(config)
    tokens = torch.randint(8192, batch["mask"].shape)
    ours = _build(config, tokenizer=GivenTokens(8192, tokens))
    layers = {key: getattr(set_to, key) for key in ("early_layers", "head_layers") if hasattr(set_to, key)}
    made = PlainBEiT(**_shape(config), init_values=0.1, vocab_size=8192, **layers)
    made.load_state_dict(from_ours(ours.state_dict()))
    return ours, Adapter(made, lambda module, batch: module(batch["image"][:, 0], batch["mask"], tokens))


def _dvae(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    kl_weight = set_to.kl_div_loss_weight / (
        len(batch["image"]) * (config.model.size[0] // config.model.patch_size) ** 2
    )
    made = PlainDVAE(
        patch_size=config.model.patch_size,
        num_tokens=set_to.num_tokens,
        codebook_dim=set_to.codebook_dim,
        hidden_dim=config.model.widths()["embed_dim"],
    )
    made.load_state_dict(dvae_from_ours(ours.state_dict()))
    given = {"temperature": set_to.temperature, "kl_weight": kl_weight}
    return ours, Adapter(made, lambda module, batch: module(batch["image"][:, 0], batch["gumbel_noise"], **given))


def _vqkd(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    set_to = _settings(config)
    features = torch.randn(len(batch["image"]), (config.model.size[0] // config.model.patch_size) ** 2, TEACHER_DIM)
    ours = _build(config, teacher=GivenFeatures(features))
    shape, widths = _shape(config), config.model.widths()
    side = shape["img_size"] // shape["patch_size"]
    encoder = PlainEncoder(
        side=side,
        patch_size=shape["patch_size"],
        in_chans=3,
        dim=shape["embed_dim"],
        depth=shape["depth"],
        num_heads=shape["num_heads"],
        mlp_ratio=widths["mlp_ratio"],
    )
    decoder = PlainEncoder(
        side=side,
        patch_size=1,
        in_chans=set_to.code_dim,
        dim=set_to.decoder_embed_dim,
        depth=set_to.decoder_depth,
        num_heads=set_to.decoder_num_heads,
        mlp_ratio=set_to.decoder_mlp_ratio,
    )
    made = PlainVQKD(
        encoder,
        decoder,
        num_codes=set_to.num_codes,
        code_dim=set_to.code_dim,
        target_dim=TEACHER_DIM,
        decay=set_to.decay,
    )
    own = {
        name: value for name, value in ours.state_dict().items() if not name.startswith(("fingerprint.", "teacher."))
    }
    made.load_state_dict(own)
    return ours, Adapter(made, lambda module, batch: module(batch["image"][:, 0], features))


def _simmim(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours = _build(config)
    made = PlainSimMIM(**_shape(config), layer_scale=0.1)
    made.load_ours(ours.state_dict())
    grid, cells = config.model.size[0] // config.model.patch_size, config.model.size[0] // _settings(config).mask_cell
    order = batch["mask_noise"].argsort(1)
    mask = torch.ones_like(order, dtype=torch.bool)
    mask.scatter_(1, order[:, : order.shape[1] - _settings(config).num_masked(order.shape[1])], False)
    mask = mask.unflatten(1, (cells, cells)).repeat_interleave(grid // cells, 1).repeat_interleave(grid // cells, 2)
    mask = mask.flatten(1)
    return ours, Adapter(made, lambda module, batch: module(batch["image"][:, 0], mask))


def _ijepa(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    widths = {"predictor_dim": set_to.predictor_embed_dim, "predictor_depth": set_to.predictor_depth}
    made = PlainIJEPA(**_shape(config), **widths)
    made.load(ours.state_dict())
    return ours, made


def _data2vec(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    given = {"num_target_layers": set_to.num_target_layers, "loss_beta": set_to.loss_beta}
    made = PlainData2Vec(**_shape(config), **given, layer_scale=1e-4)
    made.load(ours.state_dict())
    return ours, made


def _data2vec2(config: PretrainConfig, batch: dict[str, Tensor]) -> tuple[Any, nn.Module]:
    ours, set_to = _build(config), _settings(config)
    made = PlainData2Vec2(
        **_shape(config),
        decoder_dim=set_to.decoder_dim,
        decoder_layers=set_to.decoder_layers,
        kernel=set_to.decoder_kernel,
        groups=set_to.decoder_groups,
        top_k=set_to.average_top_k_layers,
        cls_weight=set_to.cls_weight,
    )
    made.load_ours(ours.state_dict())
    rows = (batch["decoder_noise"] * len(ours.decoder.noise)).long()
    noise = (ours.decoder.noise[rows] * ours.decoder.noise_std).flatten(0, 1)
    return ours, Adapter(made, lambda module, batch: module(batch["image"][:, 0], batch["mask"], noise))


_SIZE, _NO_DROP = "model.name={size}", "model.drop_path_rate=0"
_OWN_NO_DROP, _PROTOTYPES = "objective.drop_path_rate=0", "objective.out_dim={prototypes}"
_VQKD_DECODER = ["objective.decoder_embed_dim=192", "objective.decoder_num_heads=3"]
# objective -> (its recipe, what is set otherwise)
RECIPE: dict[str, tuple[str, list[str]]] = {
    "mae": ("mae_vit_base", [_SIZE]),
    "dino": ("dino_vit_small", [_SIZE, _OWN_NO_DROP, _PROTOTYPES]),
    "ibot": ("ibot_vit_small", [_SIZE, _OWN_NO_DROP]),
    "dinov2": ("dinov2_vit_large", [_SIZE, _OWN_NO_DROP, _PROTOTYPES, "model.layer_scale=null"]),
    "mocov3": ("mocov3_vit_small", [_SIZE, "model.num_heads=null"]),
    "beit": ("beit_vit_base", [_SIZE, _NO_DROP, "objective.tokenizer={any}"]),
    "beit2": ("beit2_vit_base", [_SIZE, _NO_DROP, "objective.tokenizer={any}"]),
    "dvae": ("dvae_112px", []),
    "vqkd": ("vqkd_vit_base", [_SIZE, "objective.teacher={any}", "objective.kmeans_init=false", *_VQKD_DECODER]),
    "simmim": ("simmim_vit_base", [_SIZE, _NO_DROP]),
    "ijepa": ("ijepa_vit_huge", [_SIZE, "model.patch_size=16"]),
    "data2vec": ("data2vec_vit_base", [_SIZE, _NO_DROP]),
    "data2vec2": ("data2vec2_vit_base", [_SIZE, _NO_DROP, "objective.clone_batch=8"]),
}
PAIRS: dict[str, Callable[[PretrainConfig, dict[str, Tensor]], tuple[Any, nn.Module]]] = {
    "mae": _mae,
    "dino": _dino,
    "ibot": _ibot,
    "dinov2": _dinov2,
    "mocov3": _mocov3,
    "beit": _beit,
    "beit2": _beit,
    "dvae": _dvae,
    "vqkd": _vqkd,
    "simmim": _simmim,
    "ijepa": _ijepa,
    "data2vec": _data2vec,
    "data2vec2": _data2vec2,
}
