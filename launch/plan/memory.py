"""The memory of a run on each GPU, from one step in which every tensor is only a shape.

The objective is built and its step is taken with tensors that have a size and no storage (torch's FakeTensor), in the
run's precision; what is alive at one time is counted, activations and gradients included. So a ViT-H is measured in
seconds on a machine without a GPU. Not included: kernel workspaces, the allocator's fragmentation and the
buckets of NCCL; `RESERVE` is added for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import PretrainConfig
from pretrain.core.machine.resources import GIB
from pretrain.data.views.maskdraw import BatchPosition, draw
from pretrain.data.views.specs import Mask, Noise, stacks
from pretrain.engine.optim.optimizer import state_bytes
from pretrain.engine.optim.table import KINDS
from pretrain.models.layers import attention
from pretrain.objectives.base import Horizon
from pretrain.start import build_objective

RESERVE = 1.5 * 2**30  # bytes: context, libraries' workspaces, communication buckets


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step on one device, before anything is divided among ranks.

    Attributes:
        trained: parameters that are trained, fp32. fixed: the rest of the model's state, mostly averages.
        optimizer: the optimizer's state, fp32.
        per_batch, per_image: the most that a micro-batch keeps alive in addition to state and gradients:
            per_batch + per_image * images.
    """

    trained: int
    fixed: int
    optimizer: int
    per_batch: int
    per_image: int

    def total(self, *, images: int, zero_stage: int = 0, world_size: int = 1) -> float:
        """Bytes on each GPU with DeepSpeed's stage (0: also plain DDP)."""
        weights = self.trained / (world_size if zero_stage == 3 else 1)
        gradients = self.trained / (world_size if zero_stage >= 2 else 1)
        master = self.trained if zero_stage else 0  # DeepSpeed's own fp32 copy, divided with the optimizer
        optimizer_share = (self.optimizer + master) / (world_size if zero_stage else 1)
        activations = self.per_batch + self.per_image * images
        return weights + self.fixed + gradients + optimizer_share + activations + RESERVE


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive: `live` now, `peak` at most.

    Operations on `real` tensors alone (masks) are executed and not counted: the number of hidden patches is a shape of
    later tensors.
    """

    def __init__(self, *, real: bool = False) -> None:
        super().__init__()
        self.real = real
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self.real and given and not any(isinstance(leaf, FakeTensor) or leaf.is_meta for leaf in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not self.real and func is torch.ops.aten.index.Tensor:
            args = (args[0], _places(args[1]))
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks as the indices of their true entries."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def footprint(config: PretrainConfig) -> Footprint:
    """Measure the step of a configuration, without data and without its weights."""
    small, large = (_step_peak(config, images) for images in (2, 4))
    per_image = (large.activations - small.activations) / 2
    per_batch = max(0.0, small.activations - 2 * per_image)
    if config.optim.sam is not None:
        per_batch += small.trained  # the weights from before the second pass
    return Footprint(small.trained, small.fixed, small.optimizer, round(per_batch), round(per_image))


@dataclass(frozen=True)
class _Measured:
    trained: int
    fixed: int
    optimizer: int
    activations: int


def _step_peak(config: PretrainConfig, images: int) -> _Measured:
    with torch.device("meta"):
        objective = build_objective(config, Horizon(total_steps=1000, steps_per_epoch=100))
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision != "fp32")
    with FakeTensorMode(allow_non_fake_inputs=True), fused_attention(), LiveBytes() as memory:
        objective.to_empty(device="cpu")
        for tensor in objective.state_dict().values():
            memory.add(tensor)
        state = memory.live
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        batch = empty_batch(config, images)
        start = memory.peak = memory.live
        with bf16:
            loss = objective(batch, 0)["loss"]
        loss.backward()
        size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        optimizer = state_bytes(config.optim, objective)
        return _Measured(trained=size, fixed=state - size, optimizer=optimizer, activations=memory.peak - start)


def empty_batch(config: PretrainConfig, images: int) -> dict[str, Tensor]:
    """The loader's batch of `images` images: pixels and noises as shapes only, masks drawn as in training."""
    specs, channels = config.objective.views(config.model), config.model.in_chans
    batch = {
        name: torch.empty(images, sum(view.num_images for _, view in views), channels, *views[0][1].size)
        for name, views in stacks(specs).items()
    }
    noises = {spec.name: torch.empty(images, *spec.shape) for spec in specs if isinstance(spec, Noise)}
    at = BatchPosition(seed=0, positions=np.arange(images), first=0, global_batch=images, epoch_length=images)
    masks = [draw(spec, at) for spec in specs if isinstance(spec, Mask)]
    with unset_fake_temporarily():
        drawn = {name: torch.from_numpy(array) for entry in masks for name, array in entry.items()}
    return batch | noises | drawn


@contextmanager
def fused_attention() -> Iterator[None]:
    """A GPU never keeps the attention map; on a CPU short sequences do."""
    chosen = attention.choose
    attention.choose = lambda *_: "sdpa"
    try:
        yield
    finally:
        attention.choose = chosen


def possible_stages(config: PretrainConfig) -> range:
    """The ZeRO stages that can train it: those of its optimizer; 3 without a teacher; 0 for sharpness-aware steps."""
    most = 0 if config.optim.sam is not None else 2 if config.objective.has_teacher else 3
    return range(min(most, KINDS[config.optim.name].max_zero_stage) + 1)


def describe(config: PretrainConfig, *, gpus: int, batch: int) -> str:
    """The estimate for each ZeRO stage, as text."""
    found = footprint(config)
    head = (
        f"memory per GPU, estimated for {batch} images of {config.model.size[0]} x {config.model.size[1]} px in "
        f"{config.engine.precision} (trained {found.trained / GIB:.2f} GiB, averages and other state "
        f"{found.fixed / GIB:.2f} GiB, {found.per_image / 2**20:.0f} MiB per image; not checked on a GPU yet)"
    )
    stages = possible_stages(config)
    rows = [
        f"  ZeRO-{stage} on {gpus}: {found.total(images=batch, zero_stage=stage, world_size=gpus) / GIB:.1f} GiB"
        for stage in stages
    ]
    return "\n".join([head, *rows])
