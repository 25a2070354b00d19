"""The interface of a model that an engine trains; objectives and tasks implement `Trainable`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class ParamGroup(TypedDict):
    """Parameters that share schedules. `names` are those of `trainable.named_parameters()`.

    The engine multiplies the learning rate and the weight decay of a step by the scales.
    """

    name: str
    names: list[str]
    params: list[nn.Parameter]
    lr_scale: float
    weight_decay_scale: float
    frozen_steps: int  # the first steps, in which neither the parameters nor their optimizer state change
    keeps_moments: NotRequired[bool]  # if True, the optimizer state follows the gradients in the frozen steps too
    clip_group: NotRequired[str]  # clip_mode "per_module" clips the parameters of one clip group together
    hidden: NotRequired[bool]  # set by the engine for Muon: if True, all are matrices of hidden layers


class Trainable(Protocol):
    """An nn.Module with these methods."""

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of one micro-batch: "loss" is differentiated, the others are logged.

        `step` counts completed optimizer steps.
        """
        ...

    def after_step(self, step: int) -> None:
        """Once per applied optimizer step; `step` counts completed steps."""
        ...

    def discard_pending(self) -> None:
        """The step was skipped: discard what forward kept for `after_step`."""
        ...

    def param_groups(self) -> list[ParamGroup]: ...


@runtime_checkable
class Surveying(Protocol):
    """A `Trainable` whose loss is one of all samples of a step, not a mean over its micro-batches."""

    def surveying(self) -> AbstractContextManager[None]:
        """Inside, the engine passes every micro-batch of a step to it without gradient, in order, and ignores what it
        returns. Then it passes them again with gradient, with the same random numbers on the device."""
        ...
