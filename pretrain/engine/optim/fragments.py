"""The part of each parameter that this rank updates, and its optimizer state by parameter name.

A fragment is a range [start, stop) of a flattened parameter. In one process and under DDP it is the complete parameter;
under ZeRO a rank owns partitions, packed in flat tensors. State that is saved by these names can be loaded by any
engine at any world size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.core.tensorfile import open_tensors

COUNTERS = frozenset({"step", "weight_sum"})  # optimizer state that is one number per parameter
TRAINED = "trained"  # key of the weights that are trained, saved where `MODEL_FILE` has an average of them


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter `name`, held at `offset` of `owner`.

    Attributes:
        owner: the tensor the optimizer updates: the parameter itself, or a flat fp32 partition.
        group: index of its param group.
        numel: elements of the complete parameter.
    """

    name: str
    group: int
    numel: int
    start: int
    stop: int
    owner: Tensor
    offset: int

    def of(self, flat_like_owner: Tensor) -> Tensor:
        """A view of the elements of this fragment in a tensor of the shape of `owner`."""
        return flat_like_owner.view(-1).narrow(0, self.offset, self.stop - self.start)


def state_tensors(optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment]) -> dict[str, Tensor]:
    """`key/name` -> flat tensor of the fragment; counters (Adam's step) have one element."""
    found: dict[str, Tensor] = {}
    for fragment in fragments:
        for key, value in optimizer.state.get(fragment.owner, {}).items():
            if not isinstance(value, Tensor):
                continue
            found[f"{key}/{fragment.name}"] = value.reshape(1) if key in COUNTERS else fragment.of(value)
    return found


def state_ranges(fragments: Sequence[Fragment]) -> dict[str, str]:
    """Metadata of the file of `state_tensors`: start of each fragment, and number of elements of its parameter."""
    return {"starts": json.dumps({f.name: [f.start, f.numel] for f in fragments})}


class SavedState:
    """Optimizer state of all ranks of a checkpoint, read by ranges.

    Args:
        files: the files of all ranks; any number of ranks.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = [open_tensors(path) for path in files]
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # key/name -> (start, stop, file)
        self.numels: dict[str, int] = {}
        for index, file in enumerate(self._files):
            starts: Mapping[str, list[int]] = json.loads(file.metadata()["starts"])
            self.numels.update({name: numel for name, (_, numel) in starts.items()})
            for full in file.keys():  # noqa: SIM118
                start = starts[full.partition("/")[2]][0]
                length = file.get_slice(full).get_shape()[0]
                self._pieces.setdefault(full, []).append((start, start + length, index))

    def keys_of(self, name: str) -> list[str]:
        return sorted({full.partition("/")[0] for full in self._pieces if full.partition("/")[2] == name})

    def read(self, key: str, fragment: Fragment) -> Tensor:
        """The elements of `fragment`, gathered from the files that contain them.

        Raises:
            ValueError: elements are missing in the files.
        """
        wanted = torch.empty(fragment.stop - fragment.start)
        filled = 0
        for start, stop, index in self._pieces[f"{key}/{fragment.name}"]:
            low, high = max(start, fragment.start), min(stop, fragment.stop)
            if low < high:
                source = self._files[index].get_slice(f"{key}/{fragment.name}")[low - start : high - start]
                wanted[low - fragment.start : high - fragment.start] = source
                filled += high - low
        if filled != len(wanted):
            raise ValueError(f"optimizer state {key}/{fragment.name}: only {filled} of {len(wanted)} elements found")
        return wanted

    def whole(self, key: str, name: str) -> Tensor:
        """All elements of the parameter, flat."""
        numel = self.numels[name]
        return self.read(key, Fragment(name, 0, numel, 0, numel, torch.empty(0), 0))

    def counter(self, key: str, name: str) -> Tensor:
        _, _, index = self._pieces[f"{key}/{name}"][0]
        return self._files[index].get_tensor(f"{key}/{name}")


def restore_state(optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment], saved: SavedState) -> None:
    """Fill the optimizer's state from `saved`. A parameter without saved state (no step yet) gets none."""
    optimizer.state.clear()
    for fragment in fragments:
        for key in saved.keys_of(fragment.name):
            if key == TRAINED:
                continue
            state = optimizer.state[fragment.owner]
            if key in COUNTERS:
                # Fused optimizers keep the counter on the device of the parameter, others on the CPU.
                fused = optimizer.param_groups[fragment.group].get("fused")
                state[key] = saved.counter(key, fragment.name).reshape(()).to(fragment.owner.device if fused else "cpu")
                continue
            if key not in state:
                state[key] = torch.zeros_like(fragment.owner, requires_grad=False)
            fragment.of(state[key]).copy_(saved.read(key, fragment))
