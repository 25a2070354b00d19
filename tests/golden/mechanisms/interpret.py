"""Rollout, relevance, deletion and insertion on their golden cases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from finetune.metrics.faithfulness import area, deletion, insertion
from pretrain.models.backbones.vit import ViT
from pretrain.models.explain.recording import recorded_attention
from pretrain.models.explain.rollout import relevance, rollout
from tests.golden.case import Case


def run_rollout_chefer(case: Case) -> None:
    known = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")
    ctor = case.take("ctor", *known, "qkv_bias", "mlp_head", neutral={"drop_rate": 0.0, "attn_drop_rate": 0.0})
    side = ctor["img_size"]
    vit = ViT(
        (side[0], side[1]) if isinstance(side, list) else (side, side),
        ctor["patch_size"],
        ctor.get("in_chans", 3),
        ctor.get("embed_dim", 768),
        ctor.get("depth", 12),
        ctor.get("num_heads", 12),
        ctor.get("mlp_ratio", 4.0),
        pos_embed="learned",
        qkv_bias=ctor.get("qkv_bias", False),
        norm_eps=case.config.get("norm_eps", 1e-6),
    ).eval()
    state = case.below("state")
    vit.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    head = _head({name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")})
    images, prefix = case["input/images"], vit.num_prefix_tokens
    with recorded_attention(vit) as recorded:
        logits = head(vit(images)[:, 0])
    maps = list(recorded.values())
    case.check("expect/logits", logits)
    for i, probabilities in enumerate(maps):
        case.check(f"expect/attention{i}", probabilities)
    for start in case.config.get("start_layers", [0]):
        case.check(f"expect/rollout_from{start}", rollout(maps, start=start)[:, 0, prefix:])
    gradients = _gradients(logits, case["input/classes"], maps)
    case.check("expect/relevance", relevance(maps, gradients)[:, 0, prefix:])
    for i, gradient in enumerate(gradients):
        case.check(f"expect/last_image/attention_gradient{i}", gradient[-1:])
    gradients = _gradients(logits, logits.argmax(1), maps)
    case.check("expect/relevance_of_the_top_class", relevance(maps, gradients)[:, 0, prefix:])


def _gradients(logits: Tensor, classes: Tensor, maps: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps, retain_graph=True))


def _head(state: dict[str, Tensor]) -> nn.Module:
    """A linear layer, or two with a GELU (`mlp_head`)."""
    layers = {name.rpartition(".")[0]: value.shape for name, value in state.items() if value.ndim == 2}
    head = nn.Sequential()
    for name, (out, features) in layers.items():
        if len(head):
            head.append(nn.GELU())
        head.append(layer := nn.Linear(features, out))
        layer.load_state_dict({part: state[f"{name}.{part}".removeprefix(".")] for part in ("weight", "bias")})
    return head.eval()


def run_deletion_insertion(case: Case) -> None:
    """Of a small network: a 3x3 convolution, tanh, pooling to a square grid, a linear layer, softmax."""
    width, classes = case.config["width"], case.config["classes"]
    cells = case["state/4.weight"].shape[1] // width
    network = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(math.isqrt(cells)),
        nn.Flatten(),
        nn.Linear(width * cells, classes),
        nn.Softmax(dim=1),
    )
    network.load_state_dict(case.below("state"))
    given = (network.eval(), case["input/images"], case["input/saliency"], case["input/substrate"])
    for name, follow in (("del", deletion), ("ins", insertion)):
        scores = follow(*given, step=case.config["step"])
        case.check(f"expect/{name}/scores", scores)
        case.check(f"expect/{name}/auc", area(scores))
