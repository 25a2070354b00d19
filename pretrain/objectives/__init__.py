"""The table of objectives, from the list in `configs`. Nothing here imports torch until an objective is built.

A new one is a file here, `name.py` with the class `Name`; a file in `configs`, `name.py` with `NameConfig`; a line in
the list; and configs/debug/name.yaml.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, get_args

from pretrain.objectives.configs import ObjectiveConfig

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective
    from pretrain.objectives.configs.section import ObjectiveSection

OBJECTIVES: dict[str, type[ObjectiveSection]] = {config.kind(): config for config in get_args(ObjectiveConfig)}


def build(name: str) -> type[Objective[ObjectiveSection]]:
    """The class of objective `name`. Imports torch.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; one of {', '.join(OBJECTIVES)}")
    class_name = OBJECTIVES[name].__name__.removesuffix("Config")
    return getattr(importlib.import_module(f"pretrain.objectives.{name}"), class_name)
