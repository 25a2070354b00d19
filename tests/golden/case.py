"""One golden case: its numbers, its tolerances, and the account of what has been compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.models.layers.rel_pos import RelPosKind

UNKNOWN = "that the runner does not know, or refuses as tests/golden/README.md says"
# Entries at the top of a config that say how inputs and state were drawn: the case holds both, no runner reads these.
HOW_IT_WAS_DRAWN = re.compile(r"(.*_)?(seed|scale|std|small|noise|perturb\w*)|center(_\w+)?|save_\w*|draws?")


def discover(folder: Path) -> list[Path]:
    """The JSON files of a folder of cases, sorted. Raises ValueError when there is none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: no golden case (*.json) there")
    return paths


class Case:
    """Tensors by their key (input/, draw/, state/, expect/, grad/), and `mismatches` as they are found."""

    def __init__(self, path: Path):
        self.path = path
        self.facts: dict[str, Any] = json.loads(path.read_text())
        self.name: str = self.facts.get("case", path.stem)
        self.config: dict[str, Any] = self.facts["config"]
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.due = {key for key in self.tensors if key.startswith(("expect/", "grad/"))}
        self.mismatches: list[str] = []

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose key starts with `prefix/`, without it."""
        return {key[len(prefix) + 1 :]: value for key, value in self.tensors.items() if key.startswith(prefix + "/")}

    def take(self, section: str, *known: str, neutral: dict[str, Any] | None = None) -> dict[str, Any]:
        """A mapping of the config, refusing options this runner would otherwise leave out.

        Args:
            known: options the runner applies. neutral: options it lacks, and the value at which they do nothing.
        """
        values = self.config[section]
        same = {name for name, value in (neutral or {}).items() if name in values and values[name] == value}
        unknown = set(values) - set(known) - same
        assert not unknown, f"{self.name}: config.{section} has options {UNKNOWN}: {sorted(unknown)}"
        return values

    def only(self, *known: str) -> None:
        """Refuse options at the top of the config that this runner would otherwise leave out."""
        unknown = {name for name in self.config if name not in known and not HOW_IT_WAS_DRAWN.fullmatch(name)}
        assert not unknown, f"{self.name}: config has options {UNKNOWN}: {sorted(unknown)}"

    def tolerance(self, key: str) -> tuple[float, float]:
        """(atol, rtol) of a tensor."""
        entry = self.facts["tolerance"][key]
        return (0.0, 0.0) if entry.get("exact") else (entry["atol"], entry["rtol"])

    def check(self, key: str, got: Tensor, *, zero: Tensor | None = None) -> None:
        """Compare with the tensor `key` of the case.

        `zero` marks entries whose gradient is zero in exact arithmetic: rounding is all they hold, so they get at
        least 1e-6 of the largest gradient of the case.
        """
        expect = self.tensors[key]
        self.due.discard(key)
        if got.shape != expect.shape:
            self.mismatches.append(f"{key}: shape {list(got.shape)}, expected {list(expect.shape)}")
            return
        atol, rtol = self.tolerance(key)
        expect = expect.double()
        limit = atol + rtol * expect.abs()
        if zero is not None:
            limit = torch.where(zero, limit.clamp(min=1e-6 * self.largest_gradient), limit)
        excess = (got.detach().double() - expect).abs() - limit
        if not bool((excess <= 0).all()):  # also catches NaN
            worst = (got.detach().double() - expect).abs().max().item()
            self.mismatches.append(f"{key}: off by {worst:.3g}, allowed {limit.max().item():.3g}")

    def check_statistics(self, module_state: Mapping[str, Tensor]) -> None:
        """Compare the batch-norm statistics after a pass, `expect/.../NAME`, with those of `module_state`."""
        for key in sorted(self.due):
            name = key.rpartition("/")[2]
            if key.startswith("expect/") and is_statistic(name) and name in module_state:
                self.check(key, module_state[name])

    @property
    def largest_gradient(self) -> float:
        return max(float(value.abs().max()) for value in self.below("grad").values())

    def finish(self) -> None:
        """Fail on any mismatch, and on any tensor that nobody compared."""
        problems = [*self.mismatches, *(f"{key}: never compared" for key in sorted(self.due))]
        assert not problems, f"{self.name}: {len(problems)} problem(s)\n  " + "\n  ".join(problems)


def is_statistic(name: str) -> bool:
    """Whether a tensor of a state dict is a running statistic of a batch norm."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def key_third(name: str, tensor: Tensor) -> Tensor | None:
    """Marks the key part of a qkv bias, whose gradient is zero: softmax does not see a shift. None for other names."""
    if not name.endswith("qkv.bias"):
        return None
    mark = torch.zeros_like(tensor, dtype=torch.bool)
    third = len(tensor) // 3
    mark[third : 2 * third] = True
    return mark


def rel_pos_kind(ctor: Mapping[str, Any]) -> RelPosKind:
    """Of the flags of BEiT's and SimMIM's constructors."""
    shared, own = bool(ctor.get("use_shared_rel_pos_bias")), bool(ctor.get("use_rel_pos_bias"))
    kinds: dict[tuple[bool, bool], RelPosKind] = {
        (False, False): "none",
        (True, False): "shared",
        (False, True): "per_block",
    }
    return kinds.get((shared, own), "both")
