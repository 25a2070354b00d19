"""The configuration of a fine-tuning run. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.tasks.configs import TaskConfig
from finetune.tasks.configs.values import Size, pair
from pretrain.core.configlib import Config, Positive
from pretrain.core.images import MAX_PIXELS, ChannelRule, DataOrientation, ValueRange
from pretrain.engine.config import CheckpointConfig, EngineConfig, LogConfig, OptimConfig, optimizer_problems

Fraction = Annotated[float, Field(gt=0, le=1)]
Channel = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
SOURCES = ("release", "official", "timm", "huggingface")


class ModelSource(Config):
    """The backbone and where its weights come from: exactly one of release, official, timm, huggingface."""

    release: str | None = Field(None, description="folder written by `fovea release`")
    official: str | None = Field(None, description="checkpoint of an official code, see docs/weights.md")
    timm: str | None = Field(None, description="name in timm's registry, with `weights` or random=true")
    huggingface: str | None = Field(None, description="folder with config.json and model.safetensors")
    weights: str | None = Field(None, description="for `timm`: a local file or folder; nothing is downloaded")
    prefix: str | None = Field(
        None,
        description="for `official` and `weights`: prefix of the names to read, where the file holds several networks",
    )
    grid: tuple[Positive, Positive] | None = Field(
        None, description="for `official` and `huggingface`: rows and columns of position tables that are not square"
    )
    random: bool = Field(False, description="the control: the same architecture with random weights")
    img_size: Size | None = Field(None, description="position tables are resampled to it; default: that of the source")
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    activation_checkpointing: bool = False
    in_chans: Positive | None = Field(None, description="channels of the images; default: those of the source")
    channels_from: ChannelRule | None = Field(
        None,
        description="first layer for other in_chans than the source's: mean: of its channels; repeat: they in turn; "
        "both keep the sum; zero: further channels start at 0",
    )
    mean: tuple[Share, ...] | None = Field(
        None, description="per channel, of pixels in [0, 1]; default: those of the source"
    )
    std: tuple[Fraction, ...] | None = None
    args: dict[str, Any] = Field(
        {}, description="arguments that the source does not contain: num_heads, norm_eps, pos_embed, ..."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSource:
        problems = []
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            problems.append(f"give exactly one of {', '.join(SOURCES)}, got {', '.join(given) or 'none'}")
        if self.weights is not None and self.timm is None:
            problems.append("weights: only for a timm model; the other sources contain theirs")
        if self.channels_from is not None and self.in_chans is None:
            problems.append("channels_from: needs in_chans, the channels of the images")
        if self.timm is not None and self.weights is None and not self.random:
            problems.append("weights: give a local file or folder for the timm model, or random: true")
        if self.prefix is not None and self.official is None and self.weights is None:
            problems.append("prefix: only for official, or weights of a timm model")
        if self.grid is not None and self.official is None and self.huggingface is None:
            problems.append("grid: only for official and huggingface; a release records its own, timm takes img_size")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, where it is given."""
        return None if self.img_size is None else pair(self.img_size)

    @property
    def source(self) -> tuple[str, str]:
        """The key of the given source, and its value."""
        return next((key, value) for key in SOURCES if (value := getattr(self, key)) is not None)


class DataSource(Config):
    """A set of labelled images. The documentation of a task lists the keys it reads; paths are local."""

    images: str | list[str] = Field(description="shards (folder, brace pattern, list), a .tar, a folder, a .csv")
    annotations: str | None = Field(None, description="COCO json, of instances or panoptic; csv of labels")
    masks: str | None = Field(None, description="folder or .tar of label maps named as the images")
    mask_names: str | None = Field(
        None, description='names of the masks: "{name}_mask.gif", where {name} is that of the image without its suffix'
    )
    image_names: str | None = Field(
        None, description='names of the images of `mask_names`, where only a part of them is common: "img_{name}.jpg"'
    )
    depth: str | None = Field(None, description="folder or .tar of depth maps named as the images")
    classes: str | None = Field(
        None,
        description="json of class names; of masks of colours labelmap.txt or a csv of name, r, g, b; default: "
        "classes.json or labelmap.txt next to the images",
    )
    format: str = Field("auto", description="auto: detected from the files")
    fraction: Fraction | None = Field(
        None, description="share of the images, the same in each class if there are classes"
    )
    per_class: Positive | None = Field(None, description="number of images of each class (k-shot)")
    limit: Positive | None = Field(None, description="number of images, the first of the set")
    without_fraction: float | None = Field(
        None, gt=0, lt=1, description="the other images: without those that `fraction` of this value selects"
    )
    subset_seed: int = Field(0, ge=0, lt=2**63, description="of the random choice of these parts")

    @model_validator(mode="after")
    def _fits_together(self) -> DataSource:
        parts = ("fraction", "per_class", "limit", "without_fraction")
        given = [key for key in parts if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(parts)}, got {', '.join(given)}")
        for key in ("mask_names", "image_names"):
            pattern = getattr(self, key)
            if pattern is not None and (pattern.count("{name}") != 1 or "/" in pattern):
                raise ValueError(
                    f"{key}: {pattern!r}: expected a file name with {{name}} in it, such as {{name}}_mask.png"
                )
        return self


class FinetuneDataConfig(Config):
    """The images for training and for evaluation."""

    train: DataSource
    val: DataSource
    orientation: DataOrientation = Field(
        "auto",
        description="pixels that annotations refer to: exif: the photo turned upright by its EXIF orientation; stored: "
        "as it lies in the file; auto: whichever has the annotated width and height, exif where both have",
    )
    range: ValueRange | None = Field(
        None,
        description="as in pretraining: [low, high] of stored values, or such a pair per channel; default: that of the "
        "source, if it is a release",
    )
    channels: tuple[str, ...] | None = Field(
        None,
        description="names of the channels, in order, which releases record; default: channels.json next to the "
        "images, or those of the source",
    )
    max_pixels: Positive = Field(
        MAX_PIXELS, description="a larger image is unusable: a decoded one takes 3 bytes a pixel in its worker"
    )
    num_workers: int = Field(4, ge=0, description="reading processes per rank; affects only the speed")
    prefetch: Positive = Field(4, description="batches that each worker prepares in advance")
    strict: bool = Field(
        False, description="stop if annotations have problems; default: list, count and leave them out"
    )
    max_lost_fraction: float = Field(
        0.05, ge=0, le=1, description="stop before training if a larger share of a set's labels cannot be used"
    )
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="stop if a larger share of the images is unreadable")


class FinetuneOptim(OptimConfig):
    """Optimizer and schedules as in pretraining, and the settings of fine-tuning."""

    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from each layer of the backbone to the one below"
    )
    head_lr_scale: float = Field(1.0, gt=0, description="factor of the learning rate outside the backbone")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep an exponential moving average of all weights, and evaluate it"
    )


class EvaluateConfig(Config):
    """When the task is evaluated on data.val, in addition to the end."""

    every_steps: Positive | None = None
    every_epochs: float | None = Field(None, gt=0)
    batch_size: Positive = Field(16, description="images per batch on each process")
    pictures: int = Field(8, ge=0, description="number of best and of worst predictions that are drawn")
    explain: int = Field(
        2, ge=0, description="number of images whose predictions the report explains, as `fovea explain` does; 0: none"
    )
    picture_channels: tuple[Channel, Channel, Channel] | None = Field(
        None,
        description="channels, from 0, that are red, green and blue in pictures; default: the first three, of fewer "
        "the first in gray",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the network in evaluation, whatever engine.precision; predictions of the release have it too",
    )

    @model_validator(mode="after")
    def _one_period(self) -> EvaluateConfig:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("give every_steps or every_epochs, not both")
        return self

    def period(self, steps_per_epoch: int) -> int:
        """In steps; 0: only at the end."""
        if self.every_epochs is not None:
            return max(1, round(self.every_epochs * steps_per_epoch))
        return self.every_steps or 0


class FinetuneConfig(Config):
    """One fine-tuning run."""

    run_dir: str = Field(description="the run's folder: configuration, logs, checkpoints, results, report, release")
    seed: int = Field(0, ge=0, lt=2**63)
    task: TaskConfig = Field(discriminator="name")
    model: ModelSource
    data: FinetuneDataConfig
    optim: FinetuneOptim
    engine: EngineConfig = EngineConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportCallIssue]
    log: LogConfig = LogConfig()  # pyright: ignore[reportCallIssue]
    evaluate: EvaluateConfig = EvaluateConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="before")
    @classmethod
    def _is_of_fine_tuning(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "objective" in given and "task" not in given:
            raise ValueError("a configuration of pretraining (it has objective, and no task): fovea pretrain reads it")
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        problems = [line for key in ("train", "val") for line in self._source_problems(key)]
        problems += self._engine_problems() + self.task.problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _source_problems(self, key: str) -> list[str]:
        return self.task.source_problems(f"data.{key}", getattr(self.data, key))

    def _engine_problems(self) -> list[str]:
        found, engine, optim = [], self.engine, self.optim
        if engine.deepspeed and engine.name != "deepspeed":
            found.append("engine.deepspeed: given, but engine.name is accelerate; set engine.name=deepspeed")
        if engine.is_zero3:
            found.append(
                "engine.zero_stage: under ZeRO-3 no rank holds all weights for evaluation; use stage 0, 1 or 2"
            )
        if optim.clip_grad and optim.clip_mode == "per_module":
            found.append("optim.clip_mode: per_module is for pretraining objectives; use global or per_tensor")
        if engine.device == "cpu" and engine.precision == "fp16":
            found.append("engine.precision: fp16 needs a GPU; use bf16 or fp32 with engine.device=cpu")
        averaged = "optim.ema_decay" if optim.ema_decay is not None else None
        return found + optimizer_problems(optim, engine, averaged=averaged)
