"""Base class of the objectives: a module that maps a batch to losses, independent of engines and optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core import distributed
from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.activations import ActivationPenalty, PenaltyKind, feed_forwards
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.importers import MatchReport, Weights, load_strict
from pretrain.models.layers.sync_batch_norm import BatchStatistics
from pretrain.models.mechanisms.placement import added_names
from pretrain.models.mechanisms.states import MechanismStates
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.configs.section import ObjectiveSection

ConfigT = TypeVar("ConfigT", bound=ObjectiveSection, covariant=True)


@dataclass(frozen=True)
class Horizon:
    """Length of the run in optimizer steps, from which schedules per step and tables per epoch are computed."""

    total_steps: int
    steps_per_epoch: int

    def epoch(self, step: int) -> int:
        """The epoch that the update after `step` completed steps belongs to."""
        return step // self.steps_per_epoch


class Objective(nn.Module, Generic[ConfigT]):
    """A subclass sets `config` and overrides the methods that differ.

    Attributes:
        config: the objective's section of the configuration.
        backbone_prefixes: prefixes of the copies of the backbone in the state dict; the first copy is `backbone`,
            which a release stores apart from the heads.
        head_prefixes: prefixes of the tensors that keep their initial values when only a backbone is loaded.
        kept_prefixes: prefixes of tensors that are not heads and that loading a backbone does not change: a record of
            the files this objective was built from.
        renewed_prefixes: prefixes of tensors that `begin` sets: no release contains them, earlier runs may lack them.

    A forward pass changes the running statistics of batch norms; a skipped step restores them. Therefore a subclass
    that overrides `after_step` or `discard_pending` calls the method of its base class.
    """

    config: ConfigT
    backbone_prefixes: tuple[str, ...] = ("encoder.",)
    head_prefixes: tuple[str, ...] = ()
    kept_prefixes: tuple[str, ...] = ()
    renewed_prefixes: tuple[str, ...] = ()
    _statistics: BatchStatistics | None = None
    _states: MechanismStates | None = None
    _penalty: tuple[ActivationPenalty, float] | None = None

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        if self.training:
            self._statistics = self._statistics or BatchStatistics(self)
            self._statistics.remember()
        if self._penalty is None or not (self.training and torch.is_grad_enabled()):
            return super().__call__(batch, step)
        penalty, weight = self._penalty
        with penalty.gathered() as terms:
            losses = super().__call__(batch, step)
        totals, counts = zip(*(terms[name] for name in penalty.names if name in terms), strict=True)
        counts = torch.tensor(counts, dtype=torch.float32, device=totals[0].device)
        part = weight * mean_over_ranks(torch.stack(totals), counts).mean()
        return {**losses, "loss": losses["loss"] + part, "activation_penalty": part.detach()}

    def penalize_activations(self, kind: PenaltyKind, weight: float) -> None:
        """From now on the loss has one more part, "activation_penalty": `weight` times the mean over all tokens of the
        penalty `kind` (`models.activations`), over the feed-forward networks of the copies of the backbone that are
        trained.

        Raises:
            ValueError: the backbone has none.
        """
        trained = {
            name: ffn
            for name, ffn in feed_forwards(self).items()
            if name.startswith(self.backbone_prefixes) and any(p.requires_grad for p in ffn.parameters())
        }
        self._penalty = ActivationPenalty(trained, kind), weight

    @property
    def backbone(self) -> ImageEncoder:
        """The encoder that a release contains."""
        raise NotImplementedError

    def averages(self) -> list[tuple[EMA[Any], nn.Module]]:
        """Each EMA of weights with the module it follows; the distance between the two is measured."""
        return []

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of one micro-batch: "loss" is differentiable; the others are detached and logged.

        `step` counts completed optimizer steps. Must not read `.grad`: ZeRO does not provide it.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Update averages and queues, once per optimizer step on every rank; `step` includes that step."""
        if self._statistics is not None:
            self._statistics.keep()
        self._settle(taken=True)

    def discard_pending(self) -> None:
        """Discard what the forward passes of a skipped step kept for `after_step`."""
        if self._statistics is not None:
            self._statistics.restore()
        self._settle(taken=False)

    def _settle(self, *, taken: bool) -> None:
        self._states = self._states or MechanismStates(self)
        self._states.settle(taken=taken)

    def param_groups(self) -> list[ParamGroup]:
        """Every trainable parameter, in one group each."""
        return param_groups.split(self)

    def place_backbone(self, backbone: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of this objective's state dict that a backbone's state dict determines, and its kept tensors."""
        placed = {prefix + name: tensor for prefix in self.backbone_prefixes for name, tensor in backbone.items()}
        return placed | {n: tensor for n, tensor in self.state_dict().items() if n.startswith(self.kept_prefixes)}

    def load_weights(self, weights: Weights) -> MatchReport:
        """Start from a release or an official checkpoint: the backbone, and the heads if they belong to this objective.

        Raises:
            ValueError: the weights do not fit; every name is listed.
        """
        state, allow_missing = self.place_backbone(weights.backbone), self.head_prefixes + self.renewed_prefixes
        allow_missing += added_names(self)
        left_out = weights.left_out
        if weights.heads and weights.kind == self.config.kind():
            state = _apart(state, weights) | weights.heads
            allow_missing = self.renewed_prefixes + added_names(self)
        else:
            left_out += tuple(f"{name} ({weights.kind})" for name in weights.heads)
        return load_strict(
            self,
            state,
            allow_missing=allow_missing,
            grid=weights.grid,
            left_out=left_out,
            converted=weights.converted,
            pos_resize=weights.pos_resize,
            facts=weights.facts,
        )

    def begin(self) -> None:
        """Prepare a new run, once, after its initial weights are loaded and before its first step; not at resume.

        Raises:
            ValueError: a file or release that the configuration names cannot be used.
        """

    def heads_state(self) -> dict[str, Tensor]:
        """The tensors of the state dict that continued pretraining needs in addition to the backbone."""
        left_out = (self.backbone_prefixes[0], *self.renewed_prefixes)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(left_out)}

    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """Images for inspection, uint8 [3, H, W] by name; `mean` and `std` per channel undo the normalization."""
        raise NotImplementedError


def images_of(batch: Batch, name: str) -> Tensor:
    """The single view `name` of a batch, [b, 1, C, H, W] -> [b, C, H, W]."""
    views = batch[name]
    if views.ndim != 5 or views.shape[1] != 1:
        raise ValueError(f"batch[{name!r}] must be [b, 1, C, H, W], got {list(views.shape)}")
    return views[:, 0]


def mean_over_ranks(total: Tensor, count: Tensor | float) -> Tensor:
    """`total / count` of this rank, weighted so that the mean over ranks is sum of totals / sum of counts.

    Where counts differ between ranks, for instance of masked patches, the mean of their means depends on how a batch
    is divided; this one does not. Zero when all counts are 0.
    """
    counts = torch.as_tensor(count, dtype=torch.float32, device=total.device).detach().clone()
    everywhere = distributed.all_reduce_sum(counts).clamp(min=1.0)
    return total * (distributed.world_size() / everywhere)


def pooled(backbone: ImageEncoder, tokens: Tensor) -> Tensor:
    """The feature [b, D] of normalized tokens [b, P + N, D]: the class token, or else the mean of the patches."""
    return tokens[:, 0] if backbone.class_token else tokens[:, backbone.num_prefix_tokens :].mean(dim=1)


def feature_std(features: Tensor) -> Tensor:
    """Standard deviation over the batch of L2-normalized features [b, D], mean over D: near 0 when they collapse."""
    features = F.normalize(features.detach().float(), dim=-1)
    return features.std(dim=0, correction=0).mean()


def _apart(placed: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """The tensors of the backbone, except copies of it (a student, a teacher) that the heads contain.

    Otherwise a tensor missing in the heads would silently be taken from the backbone.
    """
    longest = max(weights.backbone, key=len)
    copies = {name.removesuffix(longest) for name in placed if name.endswith(longest)}
    own = tuple(prefix for prefix in copies if any(name.startswith(prefix) for name in weights.heads))
    return {name: tensor for name, tensor in placed.items() if not own or not name.startswith(own)}
