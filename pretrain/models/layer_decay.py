"""Learning rates that fall from the last layer to the first, for fine-tuning and DINOv2.

Clark et al. 2020 (ELECTRA), as BEiT (Bao et al. 2021, appendix) and MAE (He et al. 2021, A.1) apply it to a vision
transformer; DINOv2 (Oquab et al. 2023) also lowers that of the patch embedding.
"""

from __future__ import annotations

from collections.abc import Collection

from pretrain.core.trainable import ParamGroup
from pretrain.models import param_groups
from pretrain.models.param_groups import GroupChange

_FIRST = ("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "front")


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter of a ViT of `depth` blocks: 0 before the blocks, i + 1 in block i, depth + 1 after.

    A relative position table that all blocks share belongs to the last layer, as in BEiT.

    Raises:
        ValueError: the block is not one of the `depth`.
    """
    head, _, rest = name.partition(".")
    if head in _FIRST:
        return 0
    if head != "blocks":
        return depth + 1
    index = int(rest.partition(".")[0])
    if index >= depth:
        raise ValueError(f"{name}: block {index} of a model of {depth} blocks")
    return index + 1


def layer_decay(
    groups: list[ParamGroup],
    *,
    decay: float,
    depth: int,
    prefix: str = "",
    first: Collection[str] = (),
    patch_embed_lr_scale: float = 1.0,
) -> list[ParamGroup]:
    """Cut the groups by layer of the ViT below `prefix` and scale layer i's learning rate by decay^(depth + 1 - i).

    Weight decay, freezing and clip groups stay; parameters outside `prefix` keep their learning rate.

    Args:
        depth: blocks of the ViT. prefix: of its parameters' names, with the dot.
        first: names outside it that count as its layer 0, such as an objective's mask token.
        patch_embed_lr_scale: of the patch embedding, in addition to the decay (DINOv2: 0.2).

    Raises:
        ValueError: decay is not in (0, 1], a name does not exist, or no name below `prefix` is of a block.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer decay {decay}: expected a number above 0, at most 1")
    names = {name for group in groups for name in group["names"]}
    unknown = set(first) - names
    if unknown:
        raise ValueError(f"layer decay: no trained parameter named {', '.join(sorted(unknown))}")
    if not any(name.startswith(f"{prefix}blocks.") for name in names):
        raise ValueError(f"layer decay: no trained parameter is below {prefix}blocks.; it needs a ViT there")

    def place(name: str) -> tuple[int, bool]:
        if name in first:
            return 0, False
        if not name.startswith(prefix):
            return depth + 1, False
        inner = name.removeprefix(prefix)
        return layer_of(inner, depth), inner.startswith("patch_embed.") and patch_embed_lr_scale != 1.0

    def change(source: ParamGroup, at: tuple[int, bool]) -> GroupChange:
        layer, is_patch_embed = at
        scale = decay ** (depth + 1 - layer) * (patch_embed_lr_scale if is_patch_embed else 1.0)
        name = f"{source['name']}_layer{layer}" + ("_patch_embed" if is_patch_embed else "")
        return {"name": name, "lr_scale": source["lr_scale"] * scale}

    return param_groups.divide(groups, place, change)
