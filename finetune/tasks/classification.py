"""Image classification: full or partial fine-tuning of a backbone, low-rank updates, or a head on frozen features.

The recipes are those of MAE and BEiT (fine-tuning with learning rates by layer, mixup, CutMix and RandAugment), MAE's
linear probe, DINOv2's linear evaluation and the attentive probe; the heads cite the papers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.examples import Example, Examples
from finetune.data.transforms.images import EvalTransform, TrainTransform
from finetune.heads.pooled import lora
from finetune.heads.pooled.attentive import AttentiveHead
from finetune.heads.pooled.glimpse_head import GlimpseHead
from finetune.heads.pooled.glimpses import glimpse_loss
from finetune.heads.pooled.grid import GridHead
from finetune.heads.pooled.linear import PooledHead
from finetune.heads.pooled.mixing import UNIFORMS, ImageMixer, soft_cross_entropy
from finetune.metrics.accuracy import Accuracy
from finetune.metrics.grid_accuracy import GridAccuracy, GridClassified
from finetune.metrics.metric import Metric
from finetune.predictions import Classes, Classified, Prediction
from finetune.report.labels import classification_picture
from finetune.tasks.base import EXPORTABLE, Task
from finetune.tasks.configs.classification import FROZEN, ClassificationConfig
from finetune.tasks.opened import OpenedBackbone
from finetune.tasks.timm_classifier import CONFIG, from_timm_form, timm_form
from pretrain.core.trainable import ParamGroup
from pretrain.models import param_groups
from pretrain.models.export.outputs import ExportOutput, NotExportableError
from pretrain.models.layers.sync_batch_norm import BatchStatistics, synchronized

_TOP = 5


class Classification(Task):
    """Images to one class each.

    Batch: "image" uint8 or float32 [b, C, h, w], "label" int64 [b]; in training "rng_step" or "mix", and
    "drop" for a backbone with drop path, "glimpses" for a head that looks.

    Raises:
        ValueError: fewer than two classes, or the backbone does not support the configuration.
    """

    head_prefixes = ("head.",)
    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, opened: OpenedBackbone, classes: Classes):
        super().__init__(config, opened, classes)
        if len(classes) < config.fewest_classes:
            raise ValueError(f"data.train: {len(classes)} class; a classifier needs at least {config.fewest_classes}")
        self.backbone = synchronized(opened.backbone)
        self.head = self._head(len(classes))
        self._free()
        augment = config.augment
        self.mixer = ImageMixer(
            len(classes),
            mode=augment.mix_mode,
            **augment.model_dump(include={"mixup", "cutmix", "switch_prob", "smoothing"}),
            prob=augment.mix_prob,
        )
        self._statistics = BatchStatistics(self)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        self._statistics.remember()
        images, targets = self.mixer(self.normalize(batch["image"]), batch["label"], self.mix_uniforms(batch))
        if isinstance(self.head, GlimpseHead):
            look = self.head.look(self.backbone, images, batch["glimpses"])
            losses = glimpse_loss(look, targets)
            top1 = losses["reward"][:, -1].mean()
            found = {"loss": losses["loss"], "top1_train": top1, "baseline_loss": losses["baseline"].detach()}
            return found | {"reinforce_loss": losses["reinforce"].detach()}
        logits = self.logits(images, batch.get("drop"))
        if isinstance(self.head, GridHead):
            losses = torch.stack([soft_cross_entropy(one, targets) for one in logits])
            return {"loss": losses.sum(), "mean_loss": losses.detach().mean(), "best_loss": losses.detach().min()}
        loss = soft_cross_entropy(logits, targets)
        right = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        return {"loss": loss, "top1_train": right}

    def mix_uniforms(self, batch: dict[str, Any]) -> Tensor:
        """The random numbers of the mixer: of each pair, or of the step."""
        return batch["mix"] if self.mixer.mode == "pair" and self.mixer.mixes else batch["rng_step"][None]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the classes, [..., K]."""
        return logits.softmax(-1)

    def logits(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Normalized images [b, C, h, w] to [b, K]; of a grid [G, b, K]."""
        return self.head(self.backbone, images, drop)

    def train(self, mode: bool = True) -> Classification:
        """Frozen parts stay in eval mode: no stochastic depth, no new statistics."""
        super().train(mode)
        if mode and self.config.train in (*FROZEN, "partial"):
            self.backbone.eval()
            for block in self._last_blocks():
                block.train()
        return self

    def after_step(self, step: int) -> None:
        self._statistics.keep()
        super().after_step(step)

    def discard_pending(self) -> None:
        self._statistics.restore()
        super().discard_pending()

    @property
    def noises(self) -> dict[str, tuple[int, ...]]:
        pairs = self.mixer.mixes and self.mixer.mode == "pair"
        looks = {"glimpses": self.head.noise} if isinstance(self.head, GlimpseHead) else {}
        return super().noises | ({"mix": (UNIFORMS,)} if pairs else {}) | looks

    def param_groups(self) -> list[ParamGroup]:
        groups = super().param_groups()
        if not isinstance(self.head, GridHead):
            return groups
        lrs = {f"head.heads.{number}.": cell.lr for number, cell in enumerate(self.head.cells)}
        return param_groups.divide(
            groups,
            lambda name: ".".join(name.split(".")[:3]) + ".",
            lambda source, at: {"name": f"{source['name']}_{at}", "lr_scale": source["lr_scale"] * lrs[at]},
        )

    def train_transform(self) -> TrainTransform:
        augment = self.config.augment
        plain = {"scale", "ratio", "interpolation", "whole", "hflip", "vflip", "color_jitter", "erase"}
        return TrainTransform(
            size=self.bare_backbone.img_size,
            mean=tuple(self.mean.flatten().tolist()),
            std=tuple(self.std.flatten().tolist()),
            operations=augment.rand_augment,
            **augment.model_dump(include=plain | {"magnitude", "magnitude_std"}),
        )

    def eval_transform(self) -> EvalTransform:
        augment = self.config.augment
        return EvalTransform(self.bare_backbone.img_size, self.config.resize, augment.interpolation, augment.whole)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        (logits,) = self.outputs(self.normalize(batch["image"]))
        logits = logits.float()
        if not isinstance(self.head, GridHead):
            return [Classified(row) for row in F.softmax(logits, dim=1).cpu().numpy()]
        chosen = F.softmax(logits[int(self.head.best)], dim=1).cpu().numpy()
        top5 = logits.topk(min(_TOP, logits.shape[2]), dim=2).indices.transpose(0, 1).int().cpu().numpy()
        return [GridClassified(row, top) for row, top in zip(chosen, top5, strict=True)]

    def metric(self, examples: Examples) -> Metric:
        protocol = self.eval_transform().in_words()
        if isinstance(self.head, GridHead):
            titles = [str(cell) for cell in self.head.cells]
            return GridAccuracy(self.classes, titles, protocol=protocol, choose=self.head.choose)
        return Accuracy(self.classes, protocol=protocol)

    def picture(self, example: Example, prediction: Classified | None) -> np.ndarray:
        probabilities = None if prediction is None else prediction.probabilities
        truth = None if example.target is None else int(example.target)
        return classification_picture(example.image, truth, probabilities, self.classes)

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        if isinstance(self.head, GridHead):
            raise NotExportableError(f"task classification with train=grid has several classifiers; {EXPORTABLE}")
        if isinstance(self.head, GlimpseHead):
            raise NotExportableError(
                "task classification with train=glimpses cuts whole pixels where it chooses, and a graph's rounding "
                f"moves them; {EXPORTABLE}"
            )
        return (ExportOutput("logits", "[batch, K]"),)

    def outputs(self, images: Tensor, /) -> tuple[Tensor, ...]:
        return (self.logits(images),)

    @property
    def input_size(self) -> tuple[int, int]:
        return self.bare_backbone.img_size

    def preparation(self) -> str:
        return self.eval_transform().in_words()

    def preparation_facts(self) -> dict[str, Any]:
        how = self.eval_transform()
        side = None if how.whole else how.shorter
        return {"shorter_side": side, "crop": list(how.size), "interpolation": how.interpolation}

    def answer_facts(self) -> dict[str, Any]:
        return {"scores": "softmax", "threshold": None}

    @property
    def example_parts(self) -> tuple[str, ...] | None:
        return "scores", "central", "classification"

    def exported(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """With timm's names if timm has this classifier; a grid keeps all its classifiers and its own names."""
        form = "" if isinstance(self.head, GridHead) else timm_form(self)
        return (state, {}) if isinstance(form, str) else (form[0], {CONFIG: form[1]})

    def imported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = any(name.startswith(self.backbone_prefix) for name in state)
        return state if ours else from_timm_form(self, state)

    def _head(self, num_classes: int) -> PooledHead | AttentiveHead | GridHead | GlimpseHead:
        config, backbone = self.config, self.backbone
        std = config.first_std
        if config.train == "attentive":
            heads, queries = config.attention_heads, config.attention_queries
            return AttentiveHead(backbone, num_classes, num_heads=heads, num_queries=queries, std=std)
        if config.train == "grid":
            return GridHead(backbone, num_classes, **config.grid.model_dump(), std=std)
        if config.train == "glimpses":
            return GlimpseHead(backbone, num_classes, **config.glimpses.model_dump())
        pool = config.pool
        if pool == "auto":
            pool = "token" if backbone.class_token else "mean"
        frozen, standardize = config.train in FROZEN, config.standardizes
        return PooledHead(backbone, num_classes, pool=pool, own_norm=not frozen, standardize=standardize, std=std)

    def _free(self) -> None:
        """Freeze the parameters that are not trained."""
        config = self.config
        if config.train == "lora":
            lora.add_lora(self.backbone, **config.lora.model_dump())
        elif config.train != "full":
            self.backbone.requires_grad_(False)
            for block in self._last_blocks():
                block.requires_grad_(True)

    def _last_blocks(self) -> list[nn.Module]:
        """Of train=partial: the trained blocks, and the norm after them."""
        config, backbone = self.config, self.backbone
        if config.train != "partial":
            return []
        depth = backbone.depth if "layers" in backbone.provides else 0
        if config.partial_blocks > depth:
            raise ValueError(f"task.partial_blocks: {config.partial_blocks}, but the backbone has {depth} blocks")
        return [*backbone.trunk.blocks[-config.partial_blocks :], backbone.trunk.norm]
