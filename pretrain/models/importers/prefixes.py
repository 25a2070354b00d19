"""The part of a state that a known form reads, where a framework saved it below a prefix or in several copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pretrain.models.importers.weights import Source, State, below, some

T = TypeVar("T")


def candidates(state: State, anchors: Sequence[str]) -> list[str]:
    """Prefixes, with their dots, above the weights that `anchors` name; shorter ones first.

    Args:
        anchors: names of weights that a form has, of its first layer for instance.
    """
    found: set[str] = set()
    for name in state:
        for anchor in anchors:
            if name.endswith(f".{anchor}"):
                parts = name.removesuffix(f".{anchor}").split(".")
                found |= {".".join(parts[: end + 1]) + "." for end in range(len(parts))}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def part_below(state: State, prefix: str, anchors: Sequence[str], source: Source) -> tuple[str, State]:
    """The prefix with its dot, and the state below it.

    Raises:
        ValueError: no name in the file starts with it.
    """
    prefix = prefix.rstrip(".") + "."
    chosen = below(state, prefix)
    if not chosen:
        others = candidates(state, anchors)
        hint = (
            f"prefixes above a first layer: {some(others)}" if others else f"its first keys are {some(sorted(state))}"
        )
        raise ValueError(f"{source}: no name in it starts with the chosen prefix {prefix} ({hint})")
    return prefix, chosen


def search(state: State, anchors: Sequence[str], read: Callable[[State], T | None], source: Source) -> dict[str, T]:
    """What `read` makes of the state below each prefix that leaves something it can read.

    Raises:
        ValueError: of `read`, where nothing can be read and one prefix shows why.
    """
    found: dict[str, T] = {}
    problems: list[ValueError] = []
    for prefix in candidates(state, anchors):
        try:
            if (result := read(below(state, prefix))) is not None:
                found[prefix] = result
        except ValueError as error:
            problems.append(ValueError(f"{error} (below {prefix})"))
    if not found and problems:
        raise problems[-1]
    return found


def the_only(found: dict[str, T], source: Source) -> tuple[str, T]:
    """The prefix that fits, and what was read there.

    Raises:
        ValueError: several fit; they are listed.
    """
    if len(found) > 1:
        raise ValueError(f"{source}: holds several networks; {choose_among(list(found))}")
    return next(iter(found.items()))


def choose_among(prefixes: Sequence[str]) -> str:
    """The way out, in words."""
    return f"choose one by model.prefix, init.prefix or --prefix: {', '.join(prefixes)}"
