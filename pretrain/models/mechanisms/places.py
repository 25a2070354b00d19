"""The places of our own vision transformer, and what is wrong with entries of `model.attention` there. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pretrain.models.mechanisms.settings import IMAGES, Placed


def block_places(depth: int) -> list[str]:
    """The places of our own vision transformer of `depth` blocks, in the order of computation."""
    return [f"blocks.{i}{part}" for i in range(depth) for part in (".attn", ".mlp", "")]


def mixer_of(entries: Sequence[Placed], index: int, depth: int) -> Placed | None:
    """The entry that stands in place of the attention of block `index`; None: the attention itself."""
    for entry in entries:
        if entry.where == "mixer" and f"blocks.{index}.attn" in entry.matching(block_places(depth)):
            return entry
    return None


def problems(entries: Sequence[Placed], depth: int) -> Iterator[str]:
    """What is wrong with the places of entries in our own vision transformer of `depth` blocks."""
    names, taken = [*block_places(depth), IMAGES], {}
    for entry in entries:
        try:
            found = entry.matching(names)
        except ValueError as error:
            yield f"{entry.kind}: {error}"
            continue
        if entry.where == "conv":
            yield (
                f"{entry.kind}: a block of attention and MLP has no convolution it could replace; use a convolutional "
                "network of timm's, such as timm/resnet50 with places: layer[34].*.conv2"
            )
        if entry.where == "mixer" and not all(name.endswith(".attn") for name in found):
            yield f"{entry.kind}: places: {entry.places}: it stands in place of attention; set places: blocks.*.attn"
        if entry.changes_outputs and IMAGES in found:
            yield f"{entry.kind}: places: {IMAGES}: it changes tokens; set places: blocks.*.mlp"
        for name in found:
            key = (name, entry.where) if entry.where in ("mixer", "front") else (name, entry.kind)
            if key in taken:
                yield f"{entry.kind}: places: {name} has {taken[key]} already; one of the two at a place"
            taken[key] = entry.kind


def untrained_last(entries: Sequence[Placed], depth: int) -> str | None:
    """What is wrong where only the class token of the last block is read: a mechanism that changes the patches there
    alone has no effect, and its weights no gradient."""
    last = f"blocks.{depth - 1}"
    for entry in entries:
        places = entry.matching(block_places(depth)) if entry.changes_outputs and entry.reads == "grid" else []
        if any(place == last or place == f"{last}.mlp" or place == f"{last}.attn" for place in places):
            parts = "" if entry.places.count(".") < 2 else "." + entry.places.split(".")[2]
            return (
                f"{entry.kind}: places: {entry.places}: in the last block only the class token is read, and it changes "
                f"patches; set places: blocks.{_all_but_last(depth)}{parts}"
            )
    return None


def _all_but_last(depth: int) -> str:
    """A pattern of the numbers 0 to depth - 2."""
    if depth <= 2:
        return "0"
    if depth <= 11:
        return f"[0-{depth - 2}]"
    return f"({'|'.join(str(i) for i in range(depth - 1))})"
