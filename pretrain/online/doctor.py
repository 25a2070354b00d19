"""The doctor during training: its measurements, its images and its alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.config import Plan, PretrainConfig
from pretrain.core import distributed
from pretrain.core.configlib import Precision
from pretrain.core.distributed import World
from pretrain.core.precision import autocast
from pretrain.data.loader.microbatch import MicroBatches
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views import augment
from pretrain.data.views.specs import ViewSpec
from pretrain.doctor.diagnosis import Diagnosis, Doctor
from pretrain.doctor.history import FIRST, LAST
from pretrain.doctor.measure import (
    WeightSamples,
    attention_entropy,
    average_distance,
    block_norms,
    layer_measures,
    rank_me,
    spreads,
)
from pretrain.doctor.signs import GRADIENT
from pretrain.engine.protocol import StepResult
from pretrain.loader import loader_spec
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.objectives.base import Objective
from pretrain.online.examine import facts_of
from pretrain.probes.features import backbone_features

_ATTENTION_IMAGES = 4
_LAYER_IMAGES = 16  # for the sparsity of activations and attention


class AlarmError(RuntimeError):
    """An alarm with `doctor.reaction: stop`; the message has one line per diagnosis."""


class OnlineDoctor:
    """Called on every rank after every step; uses the numbers of rank 0, so that all ranks take the same decision.

    Attributes:
        measured: measurements of the latest step, by name; empty in steps without.
    """

    def __init__(
        self,
        config: PretrainConfig,
        steps: Plan,
        dataset: Dataset,
        world: World,
        objective: Objective,
        *,
        start_step: int,
        rows: Sequence[dict[str, float]] = (),
    ):
        assert config.doctor is not None
        self.settings, self.world, self.objective = config.doctor, world, objective
        self.global_batch = config.optim.global_batch_size
        self.measured: dict[str, float] = {}
        self.doctor = Doctor(facts_of(config, steps), off=config.doctor.off)
        known = list(rows)
        for row in distributed.broadcast_object(known if len(known) <= FIRST + LAST else known[:FIRST] + known[-LAST:]):
            self.doctor.observe(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        self.doctor.say_again()
        # Under ZeRO-3 no rank holds complete weights: only the losses and the gradients by block are measured.
        self._is_whole = not config.engine.is_zero3
        self._precision: Precision = config.engine.precision
        self._images = _fixed_images(config, dataset, world) if self._is_whole else None
        self._reset(start_step)

    def __call__(self, step: int, result: StepResult) -> list[Diagnosis]:
        """New diagnoses at the step of `result`; `step` counts completed steps including this one."""
        self.measured = {}
        if result.skipped:
            return []
        every = self.settings.every_steps
        found: dict[str, float] = {}
        if step % max(1, every // 4) == 0:
            found |= self._of_weights(step)
        if step % every == 0:
            found |= self._of_gradients(result) | self._of_averages() | self._of_features()
        if found:
            self.measured = distributed.broadcast_object(found)
        row = {**result.losses, "grad_norm": result.grad_norm, "lr": result.lr, **self.measured}
        return self.doctor.observe(step, row)

    def suspects(self, step: int) -> tuple[int, list[int]]:
        """Where the problem reported at `step` may have begun, by the previous measurement: that step, and the sample
        positions since. They are skipped after a rewind: on the same images the run would fail again.
        """
        batch, begin = self.global_batch, max(0, step - self.settings.every_steps)
        return begin, list(range(begin * batch, step * batch))

    def _reset(self, step: int) -> None:
        """Start measuring changes from the current weights."""
        if not self._is_whole:
            return
        trained = {name: tensor for name, tensor in self.objective.named_parameters() if tensor.requires_grad}
        followed = {}
        for index, (ema, source) in enumerate(self.objective.averages()):
            names = {name for name, _ in source.named_parameters()}
            followed |= {f"{index}.{name}": value for name, value in ema.average.named_buffers() if name in names}
        self._weights, self._followed, self._since = WeightSamples(trained), WeightSamples(followed), step

    def _of_weights(self, step: int) -> dict[str, float]:
        """How far sampled weights moved since the last time, per step and as a part of their length."""
        if not self._is_whole:
            return {}
        span = max(1, step - self._since)
        self._since = step
        found = {}
        if change := sorted(self._weights.change()):
            found["doctor/weight_change"] = change[len(change) // 2] / span
            found["doctor/weight_change_max"] = change[-1] / span
        if change := self._followed.change():
            found["doctor/average_change_max"] = max(change) / span
        return found

    def _of_gradients(self, result: StepResult) -> dict[str, float]:
        return {GRADIENT + block: norm for block, norm in block_norms(result.norms).items()}

    def _of_averages(self) -> dict[str, float]:
        distance = average_distance(self.objective.averages()) if self._is_whole else None
        return {} if distance is None else {"doctor/average_distance": distance}

    @torch.no_grad()
    def _of_features(self) -> dict[str, float]:
        if self._images is None:
            return {}
        backbone = self.objective.backbone
        was_training = backbone.training
        backbone.eval()
        try:
            with autocast(self.world.device, self._precision):
                features, attention = self._encode(backbone, self._images)
                layers = layer_measures(backbone, self._images[:_LAYER_IMAGES])
        finally:
            backbone.train(was_training)
        every = torch.cat(distributed.all_gather_object(features.cpu()))
        found = {"doctor/rankme": rank_me(every), **{f"doctor/{name}": value for name, value in spreads(every).items()}}
        if attention is not None:
            found["doctor/attention_entropy"] = attention
        return found | {f"doctor/{name}": value for name, value in layers.items()}

    def _encode(self, backbone: ImageEncoder, images: Tensor) -> tuple[Tensor, float | None]:
        """One vector per image: the class token, else the mean patch; and the entropy of a vision transformer's
        last attention."""
        kinds = backbone_features(backbone, images)
        features = next(iter(kinds.values()))
        attention = backbone.last_attention(images[:_ATTENTION_IMAGES])
        if attention is None:
            return features, None
        return features, attention_entropy(attention, class_token=backbone.class_token)


def _fixed_images(config: PretrainConfig, dataset: Dataset, world: World) -> Tensor | None:
    """This rank's share of the measured images [n, C, H, W] or clips [n, T, C, H, W], the first in the order of the
    data, so that they are the same after a resume; None if no view has the image size of the model."""
    assert config.doctor is not None
    views = [view for view in config.objective.views(config.model) if isinstance(view, ViewSpec)]
    view = next((view for view in views if view.size == config.model.size and view.normalize), None)
    if view is None:
        return None
    view = replace(view, name="image", count=1, same_as=None)
    batch = config.optim.global_batch_size
    wanted = min(config.doctor.images or max(32, min(256, batch // 4)), dataset.num_samples)
    share = max(1, wanted // world.world_size)
    spec = replace(
        loader_spec(config, rank=world.rank, world_size=world.world_size),
        views=[view],
        global_batch=share * world.world_size,
        micro_batch=share,
    )
    micro_batches = MicroBatches(dataset, spec)
    found = augment.apply([view], micro_batches[0], config.mean, config.std, world.device)["image"]
    return found if view.frames else found[:, 0]
