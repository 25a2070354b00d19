"""Configuration of the task classification. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.section import TaskSection
from finetune.tasks.configs.values import Probability, Strength, pair
from pretrain.core.configlib import Config, Positive

FROZEN = ("linear", "attentive", "grid", "glimpses")
# DINOv2's linear evaluation (Oquab et al. 2023, official code), before the batch size's rule
GRID_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
Interpolation = Literal["bicubic", "bilinear"]
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class AugmentConfig(Config):
    """Augmentation of training images and batches; the defaults are those of a linear probe."""

    scale: Range = Field((0.08, 1.0), description="area of a crop, as a share of the image")
    ratio: Range = Field((3 / 4, 4 / 3), description="aspect ratio of a crop")
    whole: bool = Field(False, description="no crop: the complete image is resized, in evaluation too")
    interpolation: Interpolation = "bicubic"
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    color_jitter: Probability = Field(
        0.0, description="largest relative change of brightness and contrast, and of the saturation of 3 channels"
    )
    rand_augment: int = Field(0, ge=0, le=4, description="number of operations on an image (MAE, BEiT: 2)")
    magnitude: float = Field(9.0, ge=0, le=10, description="of RandAugment's operations")
    magnitude_std: Strength = 0.5
    erase: Probability = Field(0.0, description="probability of random erasing (MAE, BEiT: 0.25)")
    mixup: Strength = Field(0.0, description="parameter of the Beta distribution (MAE, BEiT: 0.8); 0: off")
    cutmix: Strength = Field(0.0, description="as mixup (MAE, BEiT: 1)")
    mix_prob: Probability = Field(1.0, description="probability of mixing")
    switch_prob: Probability = Field(0.5, description="probability of CutMix if both are enabled")
    mix_mode: Literal["batch", "pair"] = Field("batch", description="one random draw for a step, or one for each pair")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing (MAE, BEiT: 0.1)")


class LoRAConfig(Config):
    """Low-rank updates of frozen weights (Hu et al. 2021)."""

    rank: Positive = 8
    alpha: float = Field(16.0, gt=0, description="the update is multiplied by alpha / rank")
    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(
        ("qkv",), min_length=1, description="layers of a block that get an update"
    )


class GridConfig(Config):
    """Many linear classifiers trained in one pass; the best on data.val predicts (DINOv2's linear evaluation)."""

    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        GRID_LRS, min_length=1, description="factors of optim.lr, which should be 1 or follow from optim.blr=1"
    )
    blocks: tuple[Positive, ...] = Field(
        (1, 4), min_length=1, description="numbers of last blocks whose tokens are concatenated"
    )
    pools: tuple[Literal["token", "token_mean", "mean"], ...] = Field(
        ("token", "token_mean"), min_length=1, description="class token; class token and last mean patch; mean patch"
    )


class GlimpsesConfig(Config):
    """A recurrent network that looks at parts of an image, one after the other (Mnih et al. 2014)."""

    count: Positive = Field(6, description="number of glimpses at an image")
    scales: Positive = Field(2, description="squares of a glimpse: half the side of an image, and twice as much each")
    hidden: Positive = Field(128, description="width of the layers of squares and of locations")
    std: float = Field(0.1, gt=0, description="of the choice of a location; 1 is half an image")


class ClassificationConfig(TaskSection):
    """One class for an image."""

    formats: ClassVar[frozenset[str]] = frozenset({"shards", "folder", "tar", "csv"})
    keys: ClassVar[frozenset[str]] = frozenset({"classes"})
    fewest_classes: ClassVar[int] = 2

    name: Literal["classification"] = "classification"
    train: Literal["full", "partial", "lora", "linear", "attentive", "grid", "glimpses"] = Field(
        "full", description="what is trained: everything; the last blocks; low-rank updates; a head on frozen features"
    )
    pool: Literal["token", "mean", "auto"] = Field(
        "auto", description="token: normalized class token; mean: of patches, then a norm; auto: token if it exists"
    )
    partial_blocks: Positive = Field(2, description="number of trained last blocks, for train=partial")
    lora: LoRAConfig = LoRAConfig()  # pyright: ignore[reportCallIssue]
    grid: GridConfig = GridConfig()  # pyright: ignore[reportCallIssue]
    glimpses: GlimpsesConfig = GlimpsesConfig()  # pyright: ignore[reportCallIssue]
    attention_heads: Positive | None = Field(None, description="for train=attentive; default: one per 64 channels")
    attention_queries: Positive = 1
    batch_norm: bool | None = Field(
        None, description="before the classifier, without affine parameters; default: only if train=linear"
    )
    head_std: float | None = Field(
        None, gt=0, description="of the classifier's initial weights; default: 2e-5, on frozen features 0.01"
    )
    augment: AugmentConfig = AugmentConfig()  # pyright: ignore[reportCallIssue]
    resize: Positive | None = Field(
        None, description="evaluation: shorter side before the crop; default: 256/224 of the size"
    )

    @property
    def standardizes(self) -> bool:
        return self.train == "linear" if self.batch_norm is None else self.batch_norm

    @property
    def first_std(self) -> float:
        """Standard deviation of the classifier's initial weights: MAE's fine-tuning, MAE's and DINO's linear probes."""
        return self.head_std or (0.01 if self.train in FROZEN else 2e-5)

    def channel_problems(self, channels: int, *, deep: bool) -> list[str]:
        count, images = self.augment.rand_augment, f"{channels} channels" if channels != 3 else "more bits (data.range)"
        if not count or (channels == 3 and not deep):
            return []
        return [f"task.augment.rand_augment: {count}, but its operations are those of 8-bit RGB; the images have "
                f"{images}; set it to 0"]  # fmt: skip

    def class_problems(self, classes: Sequence[str]) -> list[str]:
        if len(classes) >= self.fewest_classes:
            return []
        return [f"{len(classes)} class ({', '.join(classes)}); a classifier needs at least {self.fewest_classes}"]

    def problems(self, config: Any) -> list[str]:
        found, augment, optim = [], self.augment, config.optim
        given = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        for key, needed in (
            ("partial_blocks", "partial"),
            ("lora", "lora"),
            ("grid", "grid"),
            ("glimpses", "glimpses"),
        ):
            if key in given and self.train != needed:
                found.append(f"task.{key}: given, but task.train is {self.train}; set task.train={needed} or remove it")
        for key in ("attention_heads", "attention_queries"):
            if key in given and self.train != "attentive":
                found.append(f"task.{key}: given, but task.train is {self.train}; it belongs to task.train=attentive")
        if "pool" in given and self.train in ("attentive", "grid", "glimpses"):
            found.append(f"task.pool: {self.pool}, but task.train={self.train} has its own pooling; remove it")
        for key in ("scale", "ratio"):
            low, high = getattr(augment, key)
            if low > high or (key == "scale" and high > 1):
                found.append(f"task.augment.{key}: [{low}, {high}] is not a range" + " up to 1" * (key == "scale"))
        mixes = augment.mix_prob > 0 and (augment.mixup > 0 or augment.cutmix > 0)
        if mixes and self.train == "glimpses":
            found.append("task.augment: glimpses are rewarded for one class, which a mixture of images does not have; "
                         "set mixup and cutmix to 0")  # fmt: skip
        accumulation = config.engine.accumulation_steps
        if mixes and optim.global_batch_size // accumulation % 2:
            found.append(
                f"optim.global_batch_size: {optim.global_batch_size} in {accumulation} micro-batches leaves an image "
                "without a partner for mixup or cutmix; make it even"
            )
        if self.standardizes and optim.global_batch_size // accumulation == 1:
            found.append(
                "optim.global_batch_size: the batch norm before the classifier has no variance in a micro-batch of one "
                "image; make it larger, or set task.batch_norm=false"
            )
        if self.train in FROZEN and config.model.drop_path_rate:
            found.append(f"model.drop_path_rate: {config.model.drop_path_rate}, but with task.train={self.train} the "
                         "backbone is frozen; set it to 0")  # fmt: skip
        if self.train in (*FROZEN, "lora") and optim.layer_decay != 1:
            found.append(f"optim.layer_decay: {optim.layer_decay}, but task.train={self.train} trains no layer of it; "
                         "set optim.layer_decay=1")  # fmt: skip
        if self.train == "grid" and optim.ema_decay is not None:
            found.append("optim.ema_decay: no average is kept of the classifiers of a grid; remove it")
        size = config.model.size
        if self.resize is not None and size is not None and self.resize < max(pair(size)):
            found.append(f"task.resize: {self.resize} is smaller than the crop of {max(size)} pixels")
        return found
