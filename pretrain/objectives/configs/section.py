"""Base class of the configurations of objectives. No torch here."""

from __future__ import annotations

from typing import ClassVar

from pretrain.core.configlib import Config
from pretrain.data.views.specs import InputSpec
from pretrain.objectives.configs.shape import ModelShape


class ObjectiveSection(Config):
    """Class attributes are properties of the method, not settings:

    has_teacher    the method keeps an EMA of its weights
    needs          required properties of the backbone, named as in `pretrain.models.backbones.families`
    step_momenta   settings that are a momentum per step: `fovea scale` adapts them to the batch
    batch_coupled  other effects of the batch, for which `fovea scale` has no rule; one sentence each
    clips_modules  parameter groups name their module, for optim.clip_mode per_module
    """

    has_teacher: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    step_momenta: ClassVar[tuple[str, ...]] = ()
    batch_coupled: ClassVar[tuple[str, ...]] = ()
    clips_modules: ClassVar[bool] = False

    @classmethod
    def kind(cls) -> str:
        """The only value of the subclass's key `name`."""
        return str(cls.model_fields["name"].default)

    def views(self, model: ModelShape) -> list[InputSpec]:
        """The entries of a batch: crops, random numbers and masks.

        Raises:
            ValueError: a mask does not fit the grid of patches.
        """
        raise NotImplementedError

    def problems(self, model: ModelShape) -> list[str]:
        """Messages on settings that do not fit the model or each other, one line each, starting with the key."""
        del model
        return []

    def batch_problems(self, micro_batch: int, world_size: int) -> list[str]:
        """Messages on settings that fail with `micro_batch` images on each of `world_size` ranks."""
        return []
