"""The configuration of a pretraining run, and its plan for a given data set and number of processes.

No torch here: a mistake is reported before torch is imported and before any process group or GPU is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field, field_validator, model_validator

from pretrain.core.configlib import Config, ConfigError, Positive
from pretrain.core.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    ChannelRule,
    Orientation,
    ValueRange,
    name_problems,
    range_problems,
)
from pretrain.data.views.specs import ViewSpec, stacks
from pretrain.doctor.config import DoctorConfig
from pretrain.engine.config import CheckpointConfig, EngineConfig, LogConfig, OptimConfig, optimizer_problems
from pretrain.engine.plan import Plan, plan_steps
from pretrain.models.config import ModelConfig
from pretrain.objectives.configs import ObjectiveConfig
from pretrain.probes.config import ProbeConfig

Weight = Annotated[float, Field(ge=0, le=1e9)]
INIT_SOURCES = ("release", "official", "checkpoint")


class MixtureSet(Config):
    """One data set of a mixture."""

    name: str = Field(pattern=r"^[\w.-]+$", description="in logs and lists: letters, digits, _, - and .")
    shards: str | list[str] = Field(description="as data.shards")
    index: str | None = Field(None, description="as data.index")
    exclude: str | None = Field(None, description="as data.exclude")
    weight: Weight | dict[Annotated[int, Field(ge=0)], Weight] | None = Field(
        None,
        description="share of the samples, relative to the other sets; {0: 1, 10000: 0.2}: from step 0 and step 10000 "
        "on; default: the number of its samples",
    )

    @field_validator("weight")
    @classmethod
    def _begins(cls, weight: Any) -> Any:
        if isinstance(weight, dict) and 0 not in weight:
            raise ValueError("give a weight from step 0 on, for instance {0: 1, 10000: 0.2}")
        return cast(Any, weight)

    def weight_at(self, step: int, samples: int) -> float:
        """From an optimizer step on, of a set with this number of samples."""
        if self.weight is None:
            return samples
        return self.weight[max(k for k in self.weight if k <= step)] if isinstance(self.weight, dict) else self.weight


class DataConfig(Config):
    """Where the images are and how they are read."""

    shards: str | list[str] | None = Field(None, description="shard names: a folder, a brace pattern or a list")
    mixture: list[MixtureSet] | None = Field(
        None, description="in place of shards: several data sets with weights, docs/mixtures.md"
    )
    temperature: float = Field(
        1.0, gt=0, description="of mixture: shares follow weight ** (1 / temperature); above 1 they are more equal"
    )
    index: str | None = Field(None, description="folder of the index; default: next to the shards")
    exclude: str | None = Field(
        None,
        description="file of samples that are left out, a line SHARD/KEY each (train-000000/dog1); no shard is written "
        "again",
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel of [0, 1] pixels; default: ImageNet's")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    orientation: Orientation = Field(
        "exif",
        description="exif: photos are turned upright by their EXIF orientation; stored: it is ignored, as in most "
        "official codes",
    )
    range: ValueRange | None = Field(
        None,
        description="[low, high]: stored values that become black and white, or such a pair per channel; needed for "
        "images of more than 8 bits, whose bits are kept; `fovea data stats` measures them",
    )
    channels: tuple[str, ...] | None = Field(
        None,
        description="names of the channels, in order, which releases record; default: channels.json next to the shards",
    )
    max_pixels: Positive = Field(
        MAX_PIXELS, description="a larger image is a bad sample: a decoded one takes 3 bytes a pixel in its worker"
    )
    block_shards: Positive = Field(
        8, description="number of shards that are shuffled together and read at the same time"
    )
    num_workers: int = Field(4, ge=0, description="reading processes per rank; affects the speed, not the images")
    prefetch: Positive = Field(4, description="batches that each worker prepares in advance")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="stop when a larger fraction of the samples is unreadable"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.shards is None) == (self.mixture is None):
            raise ValueError("give shards, or mixture")
        if self.mixture is None:
            if self.temperature != 1:
                raise ValueError("temperature: only of a mixture")
            return self
        if self.index is not None or self.exclude is not None:
            raise ValueError("index, exclude: of a mixture, give them to each of its sets")
        names = [one.name for one in self.mixture]
        if not names or len(set(names)) < len(names):
            raise ValueError("mixture: give at least one set, and each a name of its own")
        for step in self.mixture_steps:
            if not any(one.weight_at(step, 1) for one in self.mixture):
                raise ValueError(f"mixture: from step {step} on every weight is 0")
        return self

    @property
    def key(self) -> str:
        """Of the configuration, that says where the images are."""
        return "data.shards" if self.mixture is None else "data.mixture"

    @property
    def sources(self) -> list[str | list[str]]:
        """The shards of each set."""
        return [cast(Any, self.shards)] if self.mixture is None else [one.shards for one in self.mixture]

    @property
    def mixture_steps(self) -> list[int]:
        """Optimizer steps at which weights change, in order, from 0 on."""
        given = (one.weight for one in self.mixture or [])
        return sorted({0}.union(*(weight for weight in given if isinstance(weight, dict))))


class InitConfig(Config):
    """Initial weights: exactly one source. A run that has checkpoints resumes from them instead."""

    release: str | None = Field(None, description="folder written by `fovea release`")
    official: str | None = Field(
        None, description="checkpoint file of official code, timm or Hugging Face: docs/weights.md"
    )
    checkpoint: str | None = Field(
        None, description="folder of a checkpoint: all weights, including EMA and heads; new optimizer state"
    )
    prefix: str | None = Field(
        None, description="for `official`: prefix of the names to read, where the file holds several networks"
    )
    grid: tuple[Positive, Positive] | None = Field(
        None, description="for `official`: rows and columns of its position tables; default: they are square"
    )
    fresh_heads: bool = Field(
        False, description="load the backbone only, even if the source has this objective's heads"
    )
    channels_from: ChannelRule | None = Field(
        None,
        description="first layer of a release or official file for other model.in_chans: mean: of its channels; "
        "repeat: they in turn; both keep the sum; zero: further channels start at 0",
    )
    head_warmup_steps: int = Field(
        0, ge=0, description="steps during which the backbone is frozen and only the heads train"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> InitConfig:
        if self.checkpoint is not None and self.fresh_heads:
            raise ValueError("fresh_heads: a checkpoint is loaded with its heads; start from the run's release instead")
        given = [key for key in INIT_SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of release, official and checkpoint, got {', '.join(given) or 'none'}")
        if self.official is None and (self.prefix is not None or self.grid is not None):
            raise ValueError("prefix, grid: only for official; the other sources record theirs")
        if self.checkpoint is not None and self.channels_from is not None:
            raise ValueError("channels_from: only for release and official; a checkpoint is loaded as it is")
        return self

    @property
    def source(self) -> tuple[str, str]:
        """Key and path of the source."""
        return next((key, value) for key in INIT_SOURCES if (value := getattr(self, key)) is not None)


class ReleasedCheckpoints(CheckpointConfig):
    """When checkpoints are saved. A checkpoint resumes this run; a release contains weights for other programs."""

    release_graphs: bool = Field(
        True, description="a release that timm cannot open also holds its backbone as torch.export and ONNX graphs"
    )


class PretrainConfig(Config):
    """One pretraining run."""

    run_dir: str = Field(description="the run's folder: configuration, logs, checkpoints, release")
    seed: int = Field(0, ge=0, lt=2**63)
    objective: ObjectiveConfig = Field(discriminator="name")
    model: ModelConfig = ModelConfig()  # pyright: ignore[reportCallIssue]
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: ReleasedCheckpoints = ReleasedCheckpoints()  # pyright: ignore[reportCallIssue]
    log: LogConfig = LogConfig()  # pyright: ignore[reportCallIssue]
    probe: ProbeConfig | None = None
    doctor: DoctorConfig | None = DoctorConfig()  # pyright: ignore[reportCallIssue]
    init: InitConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_of_pretraining(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "task" in given and "objective" not in given:
            raise ValueError(
                "a configuration of fine-tuning (it has task, and no objective): read by fovea finetune (--check tries "
                "it), fovea launch check, local and hosts, and fovea launch slurm finetune; doctor, scale and launch "
                "plan are for pretraining"
            )
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainConfig:
        problems = self.model.problems() or self._view_problems()
        problems += self._channel_problems() + self._engine_problems() + self._probe_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _view_problems(self) -> list[str]:
        """Problems of a backbone that does not support the objective, or the sizes of its crops."""
        model, patch = self.model, self.model.patch_size
        if lacking := model.lacking(self.objective.name, self.objective.needs):
            return [lacking]
        found = []
        for view in self.objective.views(model):
            # A view with `same_as` is the input of another model, with its own patch size.
            if not isinstance(view, ViewSpec) or view.same_as is not None:
                continue
            if any(side % patch for side in view.size):
                near = tuple(max(1, round(side / patch)) * patch for side in view.size)
                found.append(
                    f"objective: the {view.name} crops are {view.size[0]} x {view.size[1]} px, "
                    f"not multiples of model.patch_size {patch}; try {near[0]} x {near[1]}"
                )
            if view.size != model.size and not model.other_sizes:
                found.append(
                    f"objective: the {view.name} crops are {view.size[0]} x {view.size[1]} px, but {model.name} takes "
                    f"images of model.img_size {model.size[0]} x {model.size[1]} px only; give the crops that size, or "
                    "choose a backbone that takes any"
                )
        return found + self.objective.problems(model)

    def _channel_problems(self) -> list[str]:
        channels, found = self.model.in_chans, []
        for key in ("mean", "std"):
            given = getattr(self.data, key)
            if given is None and channels != 3:
                found.append(f"data.{key}: give {channels} values (model.in_chans); `fovea data stats` measures them")
            elif given is not None and len(given) != channels:
                found.append(f"data.{key}: {len(given)} values for model.in_chans {channels}")
        found += name_problems(self.data.channels, channels, model="model.in_chans")
        return found + range_problems(self.data.range, channels)

    def _probe_problems(self) -> list[str]:
        if self.probe is None:
            return []
        found, side = [], max(self.model.size)
        if self.probe.resize is not None and self.probe.resize < side:
            found.append(f"probe.resize: {self.probe.resize} is smaller than model.img_size {side}")
        if self.engine.is_zero3:
            found.append("probe: not possible under ZeRO-3, no rank holds complete weights; remove it or use stage 0-2")
        return found

    def _engine_problems(self) -> list[str]:
        found, zero3 = [], self.engine.is_zero3
        if self.engine.deepspeed and self.engine.name != "deepspeed":
            found.append("engine.deepspeed: given, but engine.name is accelerate; set engine.name=deepspeed")
        if zero3 and self.objective.has_teacher:
            found.append(
                f"engine.zero_stage: {self.objective.name} keeps an EMA teacher, which is not proved equal "
                "under ZeRO-3; use stage 0, 1 or 2"
            )
        if zero3 and self.optim.clip_grad and self.optim.clip_mode == "per_tensor":
            found.append("optim.clip_mode: per_tensor is not possible under ZeRO-3; use stage 0-2 or clip_mode=global")
        if self.optim.clip_grad and self.optim.clip_mode == "per_module" and not self.objective.clips_modules:
            found.append(
                f"optim.clip_mode: per_module is for objectives that name their modules, {self.objective.name} does "
                "not; use global or per_tensor"
            )
        if self.engine.compile and self.model.activation_penalty is not None:
            found.append("model.activation_penalty: is not possible in a compiled model; set engine.compile=false")
        if self.engine.device == "cpu" and self.engine.precision == "fp16":
            found.append("engine.precision: fp16 needs a GPU; use bf16 or fp32 with engine.device=cpu")
        averaged = f"the teacher of {self.objective.name}" if self.objective.has_teacher else None
        return found + optimizer_problems(self.optim, self.engine, averaged=averaged)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.data.mean or IMAGENET_MEAN

    @property
    def std(self) -> tuple[float, ...]:
        return self.data.std or IMAGENET_STD


def plan(config: PretrainConfig, *, num_samples: int, world_size: int) -> Plan:
    """Convert epochs to steps and the global batch to micro-batches.

    Raises:
        ConfigError: the batch does not divide, or one step asks for more samples than there are.
    """
    steps, problems = plan_steps(config.optim, config.engine, num_samples=num_samples, world_size=world_size)
    if not problems:
        problems += config.objective.batch_problems(steps.micro_batch, world_size)
    if problems:
        raise ConfigError(config.run_dir, problems)
    return steps


def batch_bytes(config: PretrainConfig, images: int, *, augmented: bool = False) -> int:
    """Bytes of a micro-batch as a worker sends it: pixels in uint8, under `data.range` or `augmented` in float32."""
    views = stacks(config.objective.views(config.model)).values()
    pixels = sum(view.num_images * view.size[0] * view.size[1] for stack in views for _, view in stack)
    return images * config.model.in_chans * pixels * (4 if augmented or config.data.range is not None else 1)
