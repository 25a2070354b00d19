"""What can replace the attention in a block, by name. No torch here: an unsuitable one is refused before
training.

A new mechanism is one file in this folder, a subclass of `pretrain.models.layers.mixer.Mixer`, and one line here.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pretrain.models.layers.mixer import Mixer

Kind = Literal["channel", "spatial", "channel and spatial", "branch"]
Slot = Literal["mixer", "gate"]


@dataclass(frozen=True)
class Mechanism:
    """An entry of the table.

    Attributes:
        kind: what its weights tell apart. slot: "mixer" replaces the attention.
        reads: "set": any of the tokens, in any order; "grid": all patches, each at its position.
        relative_positions: whether it adds a relative-position bias and rotates; else positions are in the tokens only.
        module: "module:Class".
    """

    kind: Kind
    slot: Slot
    reads: Literal["set", "grid"]
    module: str
    relative_positions: bool = False


ATTENTION = "attention"
MECHANISMS = {
    ATTENTION: Mechanism("spatial", "mixer", "set", "pretrain.models.layers.attention:Attention", True),
}


def find(name: str, slot: Slot) -> Mechanism:
    """The entry `name` of a slot.

    Raises:
        ValueError: there is none.
    """
    known = [key for key, entry in MECHANISMS.items() if entry.slot == slot]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else f"; one of {', '.join(known)}"
        raise ValueError(f"no {slot} is called {name!r}{hint}")
    return MECHANISMS[name]


def mixer_class(name: str) -> type[Mixer]:
    """The class of the mixer `name`; imports it.

    Raises:
        ValueError: there is none.
    """
    module, _, class_name = find(name, "mixer").module.partition(":")
    return getattr(importlib.import_module(module), class_name)
