"""What the configurations of the objectives share: types of values, the shape of a model, checks. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from pretrain.configlib import Config
from pretrain.data.view import Mask

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
HueShift = Annotated[float, Field(ge=0, le=0.5)]
Sigma = Annotated[float, Field(gt=0)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]


class ModelShape(Protocol):
    """What the views depend on."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def drop_path_rate(self) -> float: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def class_token(self) -> bool: ...
    @property
    def provides(self) -> frozenset[str]: ...


class ObjectiveSection(Config):
    """Base of the objectives' configurations: facts about the method that are not settings.

    has_teacher    it keeps an average of its weights
    needs          what it asks of a backbone, in the words of `pretrain.models.families`
    step_momenta   its settings that are a momentum per step: `fovea scale` adapts them to the batch
    batch_coupled  what else depends on the batch, for which `fovea scale` has no rule; a sentence each
    clips_modules  its parameters say which module they belong to, for optim.clip_mode per_module
    """

    has_teacher: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    step_momenta: ClassVar[tuple[str, ...]] = ()
    batch_coupled: ClassVar[tuple[str, ...]] = ()
    clips_modules: ClassVar[bool] = False

    def batch_problems(self, micro_batch: int, world_size: int) -> list[str]:
        """What cannot work with so many images at a time on each of so many processes."""
        return []


def patch_grid(model: ModelShape) -> tuple[int, int]:
    """Rows and columns of patches of an image of the model's size."""
    return model.size[0] // model.patch_size, model.size[1] // model.patch_size


def num_patches(model: ModelShape) -> int:
    """Patches of an image of the model's size."""
    rows, columns = patch_grid(model)
    return rows * columns


def scale_problems(key: str, scale: tuple[float, float]) -> list[str]:
    """A range the wrong way round."""
    return [] if scale[0] <= scale[1] else [f"objective.{key}: {scale[0]} is larger than {scale[1]}; give (low, high)"]


def jitter_problems(jitter: tuple[float, float, float, float], model: ModelShape) -> list[str]:
    """Saturation or hue of images that have none."""
    if model.in_chans == 3 or not any(jitter[2:]):
        return []
    return [f"objective.color_jitter: needs RGB, but model.in_chans is {model.in_chans}; set its last two values to 0"]


def mask_problems(key: str, make: Callable[[], Mask]) -> list[str]:
    """What a mask says against the settings it would be made with, said of the one of them that most often decides."""
    try:
        make()
    except ValueError as error:
        return [f"objective.{key}: {error}"]
    return []
