"""Backbones with the names of torchvision (ViT, ResNet), OpenMMLab's mmpretrain (ViT, BEiT), and ResNets as a list.

torchvision's and mmpretrain's ResNets carry timm's names. A ResNet that was cut off at its pooling by
`nn.Sequential(*list(resnet.children())[:-1])`, as examples of lightly do, has numbers in place of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pretrain.models.importers.names import CLASSIFIER, renamed, take, to_vit
from pretrain.models.importers.weights import Source, State, Weights, below

_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
_MMPRETRAIN = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.attn\.gamma1\.weight$", ".ls1.gamma"),
    (r"\.ffn\.gamma2\.weight$", ".ls2.gamma"),
    (r"^(ln1|norm1)\.", "norm."),
)
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_STAGES = ("layer1", "layer2", "layer3", "layer4")
# (blocks per stage, whether a block is a bottleneck) -> depth (He et al. 2016, table 1)
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


def torchvision_vit(state: State, source: Source) -> Weights | None:
    """`conv_proj`, `encoder.layers.encoder_layer_N`; the classifier `heads` is left out."""
    if "conv_proj.weight" not in state or "encoder.pos_embedding" not in state:
        return None
    left_out = tuple(take(state, "heads.", *CLASSIFIER))
    backbone = to_vit({renamed(name, _TORCHVISION): tensor for name, tensor in state.items()}, source)
    return Weights("vit", backbone, {}, left_out=left_out, converted=("names of torchvision -> ours",))


def mmpretrain_vit(state: State, source: Source) -> Weights | None:
    """A backbone of mmpretrain's VisionTransformer or BEiTViT; neck and head are left out."""
    if "backbone.patch_embed.projection.weight" in state:
        inner = below(state, "backbone.")
        others = tuple(name for name in state if not name.startswith("backbone."))
    else:
        inner, others = state, ()
    if "patch_embed.projection.weight" not in inner or not any(name.startswith("layers.") for name in inner):
        return None
    left_out = (*others, *take(inner, "mask_token"))
    backbone = to_vit({renamed(name, _MMPRETRAIN): tensor for name, tensor in inner.items()}, source)
    return Weights("vit", backbone, {}, left_out=left_out, converted=("names of mmpretrain -> ours",))


def resnet(state: State, source: Source) -> Weights | None:
    """A ResNet alone or with a classifier, in timm's names, which are torchvision's; or as a numbered list."""
    converted: tuple[str, ...] = ()
    if resnet_depth(state) is None and any(name.startswith("4.0.conv1.") for name in state):
        parts = {name: name.partition(".") for name in state}
        state = {f"{_SEQUENTIAL.get(first, first)}.{rest}": state[name] for name, (first, _, rest) in parts.items()}
        converted = ("numbers of a Sequential -> names of a ResNet",)
    if resnet_depth(state) is None:
        return None
    kept = ("conv1.", "bn1.", *(f"{stage}." for stage in _STAGES))
    left_out = tuple(name for name in state if not name.startswith(kept))
    backbone = {name: tensor for name, tensor in state.items() if name.startswith(kept)}
    return Weights("resnet", backbone, {}, left_out=left_out, converted=converted)


def resnet_depth(state: Mapping[str, Tensor]) -> int | None:
    """18, 34, 50, 101 or 152; None: the state is of no such ResNet, or of a wider one."""
    if "conv1.weight" not in state or state["conv1.weight"].shape[0] != 64 or "bn1.weight" not in state:
        return None
    blocks = [{name.split(".")[1] for name in state if name.startswith(f"{stage}.")} for stage in _STAGES]
    bottleneck = "layer1.0.conv3.weight" in state
    first = state.get("layer1.0.conv2.weight" if bottleneck else "layer1.0.conv1.weight")
    if first is None or tuple(first.shape[:2]) != (64, 64):
        return None
    return _DEPTHS.get((tuple(map(len, blocks)), bottleneck))
