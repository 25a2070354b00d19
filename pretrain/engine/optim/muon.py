"""Muon (Jordan et al. 2024) for the matrices of hidden layers, AdamW for everything else.

The update of a matrix is its momentum, made orthogonal. Scaled as Liu et al. 2025 (Muon is scalable for LLM training,
section 2.2) do, it has the size of AdamW's updates, so that both share learning rate and weight decay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from pretrain.core.configlib import ConfigError
from pretrain.core.trainable import ParamGroup

_IN_BLOCK = re.compile(r"(^|\.)(blocks|layers|stages)\.\d+\.")
_IN_HEAD = re.compile(r"(^|\.)heads?\.")


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer: one list of groups, one state.

    Args:
        groups: those with "hidden" go to Muon; all their parameters are complete matrices.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        momentum: float,
        nesterov: bool,
        betas: tuple[float, float],
        eps: float,
    ):
        hidden, others = ([group for group in groups if group["hidden"] is wanted] for wanted in (True, False))
        zero: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
        muon: dict[str, Any] = {**zero, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
        self._parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, **muon)] if hidden else []
        if others:
            self._parts.append(torch.optim.AdamW(others, betas=betas, eps=eps, fused=True, **zero))
        super().__init__(groups, zero)
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for part in self._parts:
            part.step()


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the weights of linear layers inside numbered blocks, layers or stages, without those of heads."""
    return {
        f"{path}.weight"
        for path, layer in cast(Iterable[tuple[str, nn.Module]], cast(Any, module).named_modules())
        if isinstance(layer, nn.Linear) and _IN_BLOCK.search(f"{path}.") and not _IN_HEAD.search(f"{path}.")
    }


def hidden_apart(module: nn.Module, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """`groups` with the hidden matrices in groups of their own, marked "hidden".

    Raises:
        ConfigError: there are none.
    """
    chosen, result = hidden_matrices(module), list[ParamGroup]()
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for hidden in (True, False):
            part = [pair for pair in pairs if (pair[0] in chosen) is hidden]
            if part:
                kept: ParamGroup = group.copy()
                kept["names"], kept["params"] = [name for name, _ in part], [param for _, param in part]
                kept["name"], kept["hidden"] = ("hidden_" * hidden) + group["name"], hidden
                result.append(kept)
    if not any(group.get("hidden") for group in result):
        raise ConfigError(
            "optim.name",
            [f"muon: {type(module).__name__} trains no matrix of a hidden layer (a network of convolutions?); "
             "use adamw, sgd or lars"],
        )  # fmt: skip
    return result
