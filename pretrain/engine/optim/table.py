"""The optimizers by name: their options, and which engines can run them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

OptimizerName = Literal["adamw", "adam", "sgd", "lars", "lamb", "lion", "muon", "schedule_free_adamw"]


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        options: the keys of `optim` that it has, with their defaults.
        max_zero_stage: the highest ZeRO stage that can run it. why: what is missing above.
        averages: evaluation and releases take an average of its weights, not those that are trained.
    """

    options: Mapping[str, Any]
    max_zero_stage: int = 3
    why: str = ""
    averages: bool = False


_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
KINDS: dict[OptimizerName, Kind] = {
    "adamw": Kind(_ADAM),
    "adam": Kind(_ADAM),
    "sgd": Kind({"momentum": 0.9, "nesterov": False}),
    "lars": Kind({"momentum": 0.9, "trust_coefficient": 0.001}),
    "lamb": Kind({"betas": (0.9, 0.999), "eps": 1e-6}, 0, "where no rank has the norm of a whole tensor's update"),
    "lion": Kind({"betas": (0.9, 0.99)}),
    "muon": Kind({"momentum": 0.95, "nesterov": True, **_ADAM}, 0, "where no rank holds a whole matrix"),
    "schedule_free_adamw": Kind(_ADAM, 2, "where no rank holds all averaged weights to evaluate them", averages=True),
}
OPTIONS = ("betas", "eps", "momentum", "nesterov", "trust_coefficient")
# A run's config.yaml that was written before `nesterov` existed lists these for every optimizer.
_EARLIER = frozenset({"betas", "eps", "momentum", "trust_coefficient"})


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section `optim` with the options of its optimizer that are not given."""
    found = dict(values)
    kind = KINDS.get(found.get("name", "adamw"))
    if kind is None:
        return found
    if "nesterov" not in found and found.keys() >= _EARLIER:
        found = {key: value for key, value in found.items() if key not in _EARLIER - kind.options.keys()}
    for key, default in kind.options.items():
        if found.get(key) is None:
            found[key] = default
    return found


def option_problems(name: OptimizerName, values: Mapping[str, Any]) -> list[str]:
    """Options of other optimizers, and values that this one cannot have."""
    own, found = KINDS[name].options, list[str]()
    for key in OPTIONS:
        if key not in own and values[key] is not None:
            others = ", ".join(other for other, kind in KINDS.items() if key in kind.options)
            found.append(
                f"{key}: {name} does not have it; remove it (optim.{key}=null). It belongs to {others}; {name} has "
                + ", ".join(own)
            )
    if name == "sgd" and values["nesterov"] and not values["momentum"]:
        found.append("nesterov: needs a momentum above 0; give optim.momentum, or set optim.nesterov=false")
    if KINDS[name].averages:
        if not values["betas"][0]:
            found.append(f"betas: {name} needs a first value above 0, the share of the average; its authors: 0.9")
        if values["schedule"] != "constant":
            found.append(
                f"schedule: {values['schedule']} with {name}, whose average replaces a falling learning rate; "
                "set optim.schedule=constant (a warm-up is kept)"
            )
    return found


def zero_problem(name: OptimizerName, stage: int) -> list[str]:
    """Why ZeRO at this stage cannot run it."""
    kind = KINDS[name]
    if stage <= kind.max_zero_stage:
        return []
    fits = "0" if kind.max_zero_stage == 0 else f"0 to {kind.max_zero_stage}"
    return [
        f"optim.name: {name} is not possible with ZeRO-{stage}, {kind.why}; use engine.zero_stage={fits} or "
        "engine.name=accelerate"
    ]
