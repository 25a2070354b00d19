"""Distillation: the student's features, through an adaptor for each teacher, match those of frozen networks.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; features of several teachers: Ranzinger et al. 2024,
"AM-RADIO"; Sariyildiz et al. 2024, "UNIC", section 3, whose loss this is; similarities of patches: Siméoni et al. 2025,
"DINOv3", section 4.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.configlib import ConfigError
from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.layers.initialize import initialize_linears
from pretrain.models.layers.patches import grid_of
from pretrain.models.pictures import drawing, feature_pictures
from pretrain.models.teachers.feature_teacher import FeatureTeacher, open_teacher
from pretrain.models.teachers.gram_teacher import gram_loss, to_grid
from pretrain.models.teachers.standardize import Standardize
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of, pooled
from pretrain.objectives.configs.distill import DistillConfig, teacher_size, view_name


class Lesson(nn.Module):
    """What the student learns from one teacher: adaptors to its features, which are standardized.

    Args:
        weights: of its terms, by name. student_dim, teacher_dim: channels of their features.
    """

    def __init__(self, weights: dict[str, float], config: DistillConfig, *, student_dim: int, teacher_dim: int):
        super().__init__()
        self.weights, self.config = weights, config
        kinds = [kind for kind, weight in self.weights.items() if weight and kind != "gram"]
        self.adaptors = nn.ModuleDict({kind: _adaptor(student_dim, config.adaptor_dim, teacher_dim) for kind in kinds})
        self.targets = nn.ModuleDict({kind: Standardize(teacher_dim, config.statistics_steps) for kind in kinds})

    @property
    def reads_patches(self) -> bool:
        return self.weights["patch"] > 0 or self.weights["gram"] > 0

    def forward(self, features: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the loss whose weight is not 0, by name.

        Args:
            features, target: "class" [b, D], and if they are read "patch" [b, N, D], of student and teacher.
        """
        terms: dict[str, Tensor] = {}
        for kind in self.adaptors:
            terms[kind] = self._distance(self.predict(features, kind), self.standardized(kind, target[kind]))
        if self.weights["gram"]:
            terms["gram"] = gram_loss(features["patch"], target["patch"])
        return terms

    def predict(self, features: dict[str, Tensor], kind: str) -> Tensor:
        """The standardized features of the teacher, as the student predicts them, fp32."""
        return self.adaptors[kind](features[kind]).float()

    def standardized(self, kind: str, target: Tensor) -> Tensor:
        """The features of the teacher by their mean and spread, fp32."""
        return self.targets[kind](target)

    def after_step(self, step: int) -> None:
        for standardize in cast(list[Standardize], list(self.targets.values())):
            standardize.after_step(step)

    def discard_pending(self) -> None:
        for standardize in cast(list[Standardize], list(self.targets.values())):
            standardize.discard_pending()

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        angle = 1 - F.cosine_similarity(found, wanted, dim=-1).mean()
        return self.config.cosine_weight * angle + self.config.smooth_l1_weight * F.smooth_l1_loss(found, wanted)


class Distill(Objective[DistillConfig]):
    """Batch: "image" [b, 1, C, H, W]; the same crop in [0, 1] at the sizes of the teachers, "teacher_HxW"
    [b, 1, C, h, w]; with drop path its uniform random numbers "drop_path" [b, depth, 2].

    State: `encoder`, `lessons` (adaptors and the statistics of targets), fingerprints of the teachers, whose weights no
    checkpoint holds. The loss is the mean over teachers of their weighted terms.

    Raises:
        ConfigError: a teacher cannot be read, or its features do not fit.
    """

    head_prefixes = ("lessons.",)
    kept_prefixes = ("fingerprints.",)

    def __init__(self, config: DistillConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        del horizon
        self.config, self.encoder = config, backbone
        self.sizes = [teacher_size(given, backbone.img_size) for given in config.teachers]
        opened = [
            open_teacher(
                given.weights,
                num_heads=given.heads,
                size=size,
                grid=None,
                in_chans=backbone.in_chans,
                key=f"objective.teachers.{index}",
            )
            for index, (given, size) in enumerate(zip(config.teachers, self.sizes, strict=True))
        ]
        self.teachers = nn.ModuleList(teacher for teacher, _ in opened)
        self.fingerprints = nn.ModuleList(fingerprint for _, fingerprint in opened)
        self.lessons = nn.ModuleList()
        for index, (given, (teacher, _)) in enumerate(zip(config.teachers, opened, strict=True)):
            weights = given.weights_on(backbone.provides & teacher.network.provides)
            lesson = Lesson(weights, config, student_dim=backbone.embed_dim, teacher_dim=teacher.embed_dim)
            if lesson.reads_patches and not teacher.has_patches:
                raise ConfigError(
                    f"objective.teachers.{index}.patch_weight",
                    [f"{given.weights} gives one vector per image and no patches; set it and gram_weight to 0"],
                )
            self.lessons.append(lesson)

    @property
    def backbone(self) -> Backbone:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        features = self.student(batch)
        targets = [self.target(batch, index) for index in range(len(self.teachers))]
        sums: dict[str, list[Tensor]] = {}
        losses: list[Tensor] = []
        for lesson, target in zip(self._lessons, targets, strict=True):
            terms = lesson(features, target)
            losses.append(torch.stack([lesson.weights[kind] * term for kind, term in terms.items()]).sum())
            for kind, term in terms.items():
                sums.setdefault(kind, []).append(term.detach())
        return {
            "loss": torch.stack(losses).mean(),
            **{f"loss_{kind}": torch.stack(terms).mean() for kind, terms in sums.items()},
            "feature_std": feature_std(features["class"]),
            "target_std": feature_std(targets[0]["class"]),
        }

    def student(self, batch: Batch) -> dict[str, Tensor]:
        """Features of the student: "class" [b, D], and if a teacher's patches are read "patch" [b, N, D]."""
        images, drop = images_of(batch, "image"), batch.get("drop_path")
        if not any(lesson.reads_patches for lesson in self._lessons):
            return {"class": self.encoder.forward_cls(images, drop)}
        tokens = self.encoder(images, drop=drop)
        return {"class": pooled(self.encoder, tokens), "patch": tokens[:, self.encoder.num_prefix_tokens :]}

    def target(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """Features of a teacher, its patches on the student's grid."""
        teacher, images = self._teachers[index], images_of(batch, view_name(self.sizes[index]))
        of_image, patches = teacher.both(images)
        if patches is None or not self._lessons[index].reads_patches:
            return {"class": of_image}
        return {"class": of_image, "patch": to_grid(patches, grid_of(images, teacher.stride), self.encoder.grid_size)}

    def after_step(self, step: int) -> None:
        super().after_step(step)
        for lesson in self._lessons:
            lesson.after_step(step)

    def discard_pending(self) -> None:
        super().discard_pending()
        for lesson in self._lessons:
            lesson.discard_pending()

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input; of the first teacher whose patches are predicted, these and the
        prediction."""
        given = {name: value[:8] for name, value in batch.items()}
        images = images_of(given, "image")
        rgb = drawing.to_rgb(images, mean=mean, std=std)
        index = next((i for i, lesson in enumerate(self._lessons) if lesson.weights["patch"]), None)
        if index is None:
            return {"input": drawing.sheet(rgb[:, None])}
        was_training = self.training
        self.eval()  # drawing must not count for the statistics
        lesson, size = self._lessons[index], (images.shape[2], images.shape[3])
        target = lesson.standardized("patch", self.target(given, index)["patch"])
        shown = [target, lesson.predict(self.student(given), "patch")]
        self.train(was_training)
        colours = feature_pictures.pca_rgb(shown, self.encoder.grid_size, size)
        return {"input | teacher | student": drawing.sheet(torch.stack([rgb, *colours], dim=1))}

    @property
    def _teachers(self) -> list[FeatureTeacher]:
        return cast(list[FeatureTeacher], list(self.teachers))

    @property
    def _lessons(self) -> list[Lesson]:
        return cast(list[Lesson], list(self.lessons))


def _adaptor(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    adaptor = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))
    initialize_linears(adaptor, "trunc_normal")
    return adaptor
