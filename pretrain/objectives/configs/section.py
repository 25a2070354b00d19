"""The base of the configurations of the objectives. No torch here."""

from __future__ import annotations

from typing import ClassVar

from pretrain.core.configlib import Config
from pretrain.data.views.specs import InputSpec
from pretrain.objectives.configs.shape import ModelShape


class ObjectiveSection(Config):
    """Base of the objectives' configurations: facts about the method that are not settings.

    has_teacher    it keeps an average of its weights
    needs          what it needs of a backbone, in the words of `pretrain.models.backbones.families`
    step_momenta   its settings that are a momentum per step: `fovea scale` adapts them to the batch
    batch_coupled  what else depends on the batch, for which `fovea scale` has no rule; a sentence each
    clips_modules  its parameter groups name their module, for optim.clip_mode per_module
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
        """The settings that do not fit the model or each other, a line each, by key."""
        del model
        return []

    def batch_problems(self, micro_batch: int, world_size: int) -> list[str]:
        """Settings that cannot work with `micro_batch` images on each of `world_size` ranks."""
        return []
