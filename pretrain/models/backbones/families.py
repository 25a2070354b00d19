"""What a backbone can do for an objective, by name. No torch here: unsuitable pairs are refused before training.

image         one feature vector per image (`forward_cls`)
patches       tokens on a grid of patches
class_token   a class token before them
keep          any subset of the patches can be encoded alone
mask          patches can be replaced by a mask token before the first block
layers        the tokens after any block
own_blocks    it consists of our own `Block`, of which an objective can add more
conv_map      the feature map of the dVAE's convolutional encoder
clip          it reads clips; a photo is a clip of equal frames
tubes         tokens of patches through several frames
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.models.mechanisms.settings import Placed

Provides = frozenset[str]
# tokens: [b, P + N, D]. rows: [b, h, w, D]. conv: [b, D, h, w]. stages: the last of a list of [b, h, w, D]. Of the last
# two, the norm is in the head.
Layout = Literal["tokens", "rows", "conv", "stages"]

VIT_PROVIDES: Provides = frozenset({"image", "patches", "class_token", "keep", "mask", "layers", "own_blocks"})
VIDEO_PROVIDES: Provides = frozenset({"clip", "tubes", "class_token", "keep", "mask", "layers", "own_blocks"})
TIMM, CONV = "timm/", "conv_encoder"
CONV_PROVIDES: Provides = frozenset({"patches", "conv_map"})
SWIN_OPTIONS = ("ape", "patch_norm", "qk_scale")  # of timm's Swin, added here: see `swin_options`
WITHOUT_CLASS_TOKEN = re.compile(r"_gap_|siglip|^aimv2_|^vit_so150m2?_|_rpn_")


@dataclass(frozen=True)
class Family:
    """A class of timm's models, and how it is called.

    Attributes:
        pattern: matches the complete names of its models.
        module, class_name: where timm keeps it.
        provides: what it can do; "class_token" only if the model has one.
        other_sizes: it also encodes images of another size than `img_size`.
        arguments: given to timm when a model is built.
        takes_img_size: timm's constructor has `img_size`.
        layout: of what `forward_features` returns, see `Layout`.
        stem: the module whose output a mask token replaces.
        stem_stride: pixels per position of the stem's output, where it differs from the stride of the model.
        stride: pixels per output token of its models without arguments; 0: in their names.
        pooled_norm: argument that puts the last norm after the pooling of a classifier.
        token_norm: argument that keeps a norm before it; None: `pooled_norm` decides both.
    """

    name: str
    pattern: str
    module: str
    class_name: str
    provides: Provides
    other_sizes: bool
    arguments: Mapping[str, Any]
    takes_img_size: bool = True
    layout: Layout = "tokens"
    stem: str = "patch_embed"
    stem_stride: int = 0
    stride: int = 0
    pooled_norm: str = "use_fc_norm"
    token_norm: str | None = None


def _family(name: str, pattern: str, where: str, provides: str, *, other_sizes: bool, **more: Any) -> Family:
    module, _, class_name = where.rpartition(".")
    arguments = more.pop("arguments", {})
    return Family(name, pattern, module, class_name, frozenset(provides.split()), other_sizes, arguments, **more)


FAMILIES = (
    _family(
        "BEiT",
        r"beit(v2)?_(base|large)_.*",
        "beit.Beit",
        "image patches class_token mask layers",
        other_sizes=False,
        arguments={"global_pool": ""},
    ),
    _family(
        "EVA and RoPE",
        r"eva02_.*|eva_giant_.*|vit_.*(_rope_|dinov3).*",
        "eva.Eva",
        "image patches class_token mask layers",
        other_sizes=True,
        arguments={"global_pool": "", "dynamic_img_size": True},
        token_norm="use_post_transformer_norm",
    ),
    _family(
        "ViT",
        r"(vit|deit3?|test_vit)\d?_(?!s?relpos|pe_|.*(_r_?\d*_s\d|resnet|_mci_|distilled|sapiens|lingbot|radio)).*"
        r"|test_vit\d?|flexivit_.*|aimv2_.*",
        "vision_transformer.VisionTransformer",
        "image patches class_token keep mask layers",
        other_sizes=True,
        arguments={"global_pool": "", "dynamic_img_size": True},
        pooled_norm="fc_norm",
    ),
    _family(
        "Swin",
        r"swin_.*",
        "swin_transformer.SwinTransformer",
        "image patches mask",
        other_sizes=True,
        arguments={"strict_img_size": False},
        layout="rows",
        stem_stride=4,
        stride=32,
    ),
    _family(
        "Swin v2",
        r"swinv2_(?!cr_).*",
        "swin_transformer_v2.SwinTransformerV2",
        "image patches mask",
        other_sizes=True,
        arguments={"strict_img_size": False},
        layout="rows",
        stem_stride=4,
        stride=32,
    ),
    _family(
        "Hiera",
        r"hiera_.*",
        "hiera.Hiera",
        "image patches mask",
        other_sizes=False,
        layout="stages",
        stem_stride=4,
        stride=32,
    ),
    _family("XCiT", r"xcit_.*", "xcit.Xcit", "image patches class_token mask", other_sizes=True),
    _family(
        "ConvNeXt",
        r"(test_)?convnext.*",
        "convnext.ConvNeXt",
        "image patches mask",
        other_sizes=True,
        takes_img_size=False,
        layout="conv",
        stem="stem",
        stem_stride=4,
        stride=32,
    ),
)
POOLED = _family("any other", r".*", "", "image", other_sizes=True, stride=1)


def vit_provides(*, class_token: bool, attention: Sequence[Placed] = (), clips: bool = False) -> Provides:
    """Of our own vision transformer, of images or of `clips`, with these mechanisms: everything that they leave."""
    provides = VIDEO_PROVIDES if clips else VIT_PROVIDES
    return provides - (set() if class_token else {"class_token"}) - lost(attention)


def lost(attention: Sequence[Placed]) -> Provides:
    """What a backbone no longer provides with these mechanisms: "keep" where one reads the grid of all patches; masks
    and patches where one moves what they show."""
    found: set[str] = {"keep"} if any(entry.reads == "grid" for entry in attention) else set()
    if not all(entry.entry.keeps_frame for entry in attention):
        found |= {"keep", "mask", "patches"}
    return frozenset(found)


def lacking(needs: frozenset[str], provides: Provides) -> str | None:
    """What a backbone lacks for an objective, and which backbones have it; None: nothing."""
    missing = needs - provides
    if not missing:
        return None
    having = [family.name for family in FAMILIES if needs <= family.provides]
    ours = ["a size of our own ViT"] if needs <= vit_provides(class_token=True) else []
    ours += ["a size of our own ViT with model.num_frames"] if needs <= VIDEO_PROVIDES else []
    ours += [CONV] if needs <= CONV_PROVIDES else []
    return f"it lacks {', '.join(sorted(missing))}; use {', '.join(ours + [f'timm/ of {name}' for name in having])}"


def family_of(name: str) -> Family:
    """The family of timm's model `name` (without "timm/"); what no family claims gives one vector per image."""
    for family in FAMILIES:
        if re.fullmatch(family.pattern, name):
            return family
    return POOLED


def timm_provides(name: str, arguments: Mapping[str, Any]) -> Provides:
    """Of timm's model `name` built with `arguments`."""
    provides = family_of(name).provides
    has = arguments.get("class_token", WITHOUT_CLASS_TOKEN.search(name) is None)
    return provides if has else provides - {"class_token"}


def timm_stride(name: str, arguments: Mapping[str, Any]) -> int:
    """Pixels per output token of timm's model `name`; 1 where it has no tokens.

    Raises:
        ValueError: neither the name nor the arguments give it.
    """
    family = family_of(name)
    if family is POOLED:
        return 1
    if "output_stride" in arguments:
        return arguments["output_stride"]
    if family.stride:
        stages = arguments.get("depths", arguments.get("stages"))
        stem = arguments.get("patch_size", family.stem_stride)
        return stem * 2 ** (len(stages) - 1 if stages is not None else 3)
    found = re.search(r"_p(?:atch)?(\d+)(?:_|$)", name)
    stride = arguments.get("patch_size", int(found[1]) if found else None)
    if stride is None:
        raise ValueError(f"{TIMM}{name} does not name its patch size; give model.args.patch_size")
    return stride
