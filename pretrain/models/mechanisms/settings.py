"""`model.attention`: which mechanisms stand where in a backbone. No torch here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from pretrain.core.configlib import Config, ConfigError, validate
from pretrain.models import mechanisms
from pretrain.models.mechanisms import Mechanism, Reads, Slot

GENERAL, NO_BRANCH = "general", "none"
IMAGES, BRANCH = "images", "branch"  # the places of a front, and of a branch of a general block
_NO_BRANCHES = (mechanisms.ATTENTION, GENERAL)
_ON_OUTPUTS: tuple[Slot, ...] = ("gate", "stage")


class Placed(Config):
    """A mechanism at some places of a backbone; the other keys are the options of its kind."""

    kind: str
    places: str = Field(description="modules by name, * matches a part of a name: blocks.*.mlp, layer[34].*")
    start: Literal["identity", "paper"] = Field(
        "identity", description="identity: exactly the network without it at step 0, then as far as it helps"
    )
    slot: Slot | None = Field(None, description="null: the usual one of its kind")
    placebo: bool = Field(False, description="a control: each image is changed by what the next one of its batch gives")

    @model_validator(mode="after")
    def _fits_its_slot(self) -> Placed:
        entry = mechanisms.find(self.kind)
        if self.slot is not None and self.slot not in entry.slots:
            raise ValueError(f"slot: {self.kind} is no {self.slot}; it is a {' or a '.join(entry.slots)}")
        if self.start == "identity" and self.where in ("conv", "front"):
            raise ValueError(f"start: a {self.where} has no start as the network without it; set start: paper")
        if self.where == "front" and self.places != IMAGES:
            raise ValueError(f"places: {self.kind} stands before the network; set places: {IMAGES}")
        if self.placebo and (self.where in ("conv", "front") or (self.where == "mixer" and self.start == "paper")):
            raise ValueError("placebo: for a gate, a stage, or a mixer with start: identity; remove it")
        if self.placebo and self.options.get("choice") == "uniform":
            raise ValueError("placebo: with choice: uniform the shares depend on no image; remove one of the two")
        kinds = [branch.kind for branch in self.alternatives]
        if self.kind == GENERAL and not kinds:
            raise ValueError("branches: at least one besides none")
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ValueError(f"branches: {twice} is given twice; each once, beside the others")
        return self

    @property
    def entry(self) -> Mechanism:
        return mechanisms.find(self.kind)

    @property
    def where(self) -> Slot:
        """The slot it stands in."""
        return self.slot or self.entry.slots[0]

    @property
    def changes_outputs(self) -> bool:
        """Whether it changes the output of a module; else it stands in place of one."""
        return self.where in _ON_OUTPUTS

    @property
    def options(self) -> dict[str, Any]:
        """The options of its kind."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in Placed.model_fields}

    @property
    def alternatives(self) -> tuple[Placed, ...]:
        """What a general block chooses from beside the attention; else nothing."""
        return tuple(_branch(given) for given in self.options.get("branches", ()) if given != NO_BRANCH)

    @property
    def reads(self) -> Reads:
        """What it reads, with its branches."""
        found = (self, *self.alternatives)
        return "grid" if any(e.entry.reads == "grid" or e._grid_by_option for e in found) else "set"

    @property
    def _grid_by_option(self) -> bool:
        return self.entry.grid_option is not None and bool(self.options[self.entry.grid_option])

    def arguments(self) -> dict[str, Any]:
        """As JSON keeps it: all keys that say something."""
        return self.model_dump(mode="json", exclude_none=True, exclude=None if self.placebo else {"placebo"})

    def matching(self, names: Sequence[str]) -> list[str]:
        """Those of the module names that `places` means.

        Raises:
            ValueError: none.
        """
        parts = re.split(r"(\*)", self.places)
        pattern = "".join("[^.]+" if part == "*" else re.sub(r"\.", r"\\.", part) for part in parts)
        try:
            found = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"places: {self.places!r} is no pattern of module names ({error})") from error
        if not found:
            near = difflib.get_close_matches(self.places, names, n=1, cutoff=0.0)
            raise ValueError(f"places: no module is called {self.places!r}; the nearest name is {''.join(near)!r}")
        return found


def _branch(given: Any) -> Placed:
    branch = parse({"kind": given, "places": BRANCH} if isinstance(given, str) else {**given, "places": BRANCH})
    if "mixer" not in branch.entry.slots or branch.kind in _NO_BRANCHES:
        known = (k for k, e in mechanisms.MECHANISMS.items() if "mixer" in e.slots and k not in _NO_BRANCHES)
        raise ValueError(f"branches: {branch.kind} is no branch; choose from {', '.join([*known, NO_BRANCH])}")
    return branch


@cache
def _settings(kind: str, entry: Mechanism) -> type[Placed]:
    fields: dict[str, Any] = dict(entry.options)
    return create_model(f"Placed_{kind}", __base__=Placed, **fields)


def parse(given: Any) -> Placed:
    """An entry of `model.attention`.

    Raises:
        ValueError: there is no such kind, or an option is unknown or wrong; every problem on a line of its own.
    """
    if isinstance(given, Placed):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        raise ValueError(
            f"each entry needs its kind and places, such as {{kind: se, places: blocks.*.mlp}}; got {given!r}"
        )
    kind = given["kind"]
    entry = mechanisms.find(kind)
    try:
        return validate(_settings(kind, entry), dict(given), source=kind)
    except ConfigError as error:
        raise ValueError("\n".join(f"{kind}: {problem}" for problem in error.problems)) from None


def parse_all(given: Iterable[Any]) -> tuple[Placed, ...]:
    """The entries of `model.attention`, in their order.

    Raises:
        ValueError: one is wrong.
    """
    return tuple(parse(entry) for entry in given)


def reading_grid(entries: Iterable[Placed]) -> str:
    """The kinds that read the grid of all patches, for a message."""
    return ", ".join(entry.kind for entry in entries if entry.reads == "grid")


def refuse_relative(entries: Iterable[Placed]) -> None:
    """Raises ValueError if a mixer has no relative positions and rotates nothing; one beside the attention need not."""
    for entry in entries:
        replaces = entry.where == "mixer" and entry.start == "paper" and not entry.alternatives
        if replaces and not entry.entry.relative_positions:
            raise ValueError(f"{entry.kind} adds no relative positions and rotates nothing; use a position table")
