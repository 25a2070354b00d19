"""Configuration of optimizer, engine, checkpoints and log. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from pretrain.core.configlib import Config, Positive, Precision
from pretrain.core.schedule import PhasesConfig
from pretrain.engine.optim.table import KINDS, OPTIONS, OptimizerName, option_problems, with_defaults, zero_problem

OWNED_DEEPSPEED_KEYS = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler"}
    | {"fp16", "bf16", "torch_autocast", "gradient_clipping"}
)
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
ClipMode = Literal["global", "per_tensor", "per_module"]


class SAMConfig(Config):
    """Sharpness-aware steps (Foret et al. 2021): two passes each, so about twice the time."""

    rho: float = Field(0.05, gt=0, description="distance at which the gradient is taken (its authors: 2.0 if adaptive)")
    adaptive: bool = Field(False, description="measure the distance of a weight in units of its size (ASAM)")


class OptimConfig(Config):
    """Optimizer and schedules. Durations in epochs or in steps, never both."""

    name: OptimizerName = Field("adamw", description="docs/optimizers.md compares them")
    global_batch_size: Positive = Field(description="images per optimizer step, over all ranks")
    epochs: float | None = Field(None, gt=0, description="passes over the data, or total_steps")
    total_steps: Positive | None = Field(None, description="optimizer steps, or epochs")
    lr: float | None = Field(None, gt=0, description="peak learning rate, not scaled by the batch size")
    blr: float | None = Field(None, gt=0, description="base learning rate; lr is computed from it by blr_rule")
    blr_rule: Literal["linear", "sqrt"] = Field("linear", description="lr = blr * (global_batch_size / blr_batch), or")
    blr_batch: Positive = Field(256, description="... blr * sqrt(global_batch_size / blr_batch) (DINOv2: 1024)")
    min_lr: float = Field(0.0, ge=0, description="final learning rate of the cosine or polynomial schedule")
    schedule: Literal["cosine", "cosine_whole", "multistep", "poly", "constant"] = Field(
        "cosine", description="after the warm-up; cosine_whole: the cosine counts from step 0 (timm, SimMIM)"
    )
    cosine_form: Literal["open", "closed"] = Field(
        "open",
        description="open: the step after the last would be at min_lr (MAE); closed: the last one is (DINOv3); also of "
        "weight decay",
    )
    cosine_epochs: float | None = Field(
        None, gt=0, description="epochs of the cosine of lr, then min_lr; default: to the end of the run"
    )
    cosine_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="part of an open cosine of lr that the run passes; below 1 it ends above min_lr (CAPI)",
    )
    cosine_extra: float = Field(
        0.0, ge=0, description="of closed: cut off a cosine longer by this share, as DINOv3's schedule_trunc_extra"
    )
    power: float | None = Field(None, gt=0, description="of poly: (1 - t)^power (segmentation); default: 1")
    milestone_epochs: tuple[float, ...] = Field((), description="of multistep: where lr is multiplied by gamma")
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: float | None = Field(None, ge=0)
    warmup_steps: int | None = Field(None, ge=0)
    warmup_lr: float = Field(0.0, ge=0, description="learning rate at which the warm-up starts")
    warmup_form: Literal["open", "closed"] = Field("open", description="open: step/W (MAE); closed: step/(W-1) (DINO)")
    first_step: Literal[0, 1] = Field(0, description="step of the schedules at the first update; 1: I-JEPA")
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0, description="cosine to this value; default: constant")
    weight_decay_schedule: PhasesConfig | None = Field(
        None, description="instead of both; a cosine whose last step is at its end"
    )
    betas: Betas | None = Field(
        None, description="of adamw, adam, lamb, muon, schedule_free_adamw (0.9, 0.999) and lion (0.9, 0.99)"
    )
    eps: float | None = Field(None, gt=0, description="of those of betas except lion; default: 1e-8, lamb 1e-6")
    momentum: float | None = Field(None, ge=0, lt=1, description="of sgd and lars (0.9) and muon (0.95)")
    nesterov: bool | None = Field(None, description="of sgd (false) and muon (true)")
    trust_coefficient: float | None = Field(None, gt=0, description="of lars; default: 0.001")
    clip_grad: float | None = Field(None, gt=0, description="maximum gradient norm; default: no clipping")
    clip_mode: ClipMode = Field(
        "global",
        description="per_tensor: each tensor separately (DINO); per_module: backbone and heads separately (DINOv2)",
    )

    sam: SAMConfig | None = Field(None, description="sharpness-aware steps; default: none")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return with_defaults(cast(Mapping[str, Any], values)) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _one_of_each(self) -> OptimConfig:
        problems: list[str] = []
        for a, b in (("epochs", "total_steps"), ("lr", "blr"), ("warmup_epochs", "warmup_steps")):
            missing = [getattr(self, key) is None for key in (a, b)]
            if not any(missing):
                problems.append(f"give one of {a} and {b}, not both; set optim.{a}=null or optim.{b}=null")
            if all(missing) and a != "warmup_epochs":
                problems.append(f"give one of {a} and {b}, got neither")
        problems += self._schedule_problems()
        problems += option_problems(self.name, {key: getattr(self, key) for key in (*OPTIONS, "schedule")})
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _schedule_problems(self) -> list[str]:
        found: list[str] = []
        milestones = self.milestone_epochs
        if (self.schedule == "multistep") != bool(milestones):
            found.append(
                f"milestone_epochs: {list(milestones)} with schedule {self.schedule}; "
                "multistep requires them, other schedules do not accept them"
            )
        if list(milestones) != sorted(set(milestones)) or any(epoch <= 0 for epoch in milestones):
            found.append(f"milestone_epochs: {list(milestones)} must be positive and ascending")
        cosines = self.schedule in ("cosine", "cosine_whole")
        if self.cosine_epochs is not None and not cosines:
            found.append(f"cosine_epochs: {self.cosine_epochs} with schedule {self.schedule}; only cosines use it")
        if self.cosine_share < 1 and (not cosines or self.cosine_form == "closed" or self.cosine_epochs is not None):
            found.append(f"cosine_share: {self.cosine_share} is of an open cosine to the end of the run; remove it")
        if self.cosine_extra and self.cosine_form == "open":
            found.append(f"cosine_extra: {self.cosine_extra}, but cosine_form is open; set cosine_form=closed")
        if self.weight_decay_schedule is not None and self.weight_decay_end is not None:
            found.append(f"weight_decay_end: {self.weight_decay_end}, but weight_decay_schedule has its own; remove it")
        if self.power is not None and self.schedule != "poly":
            found.append(f"power: {self.power} with schedule {self.schedule}; only poly uses it, remove it")
        if self.min_lr and self.schedule not in ("cosine", "cosine_whole", "poly"):
            found.append(f"min_lr: {self.min_lr}, but schedule {self.schedule} does not end there; remove it")
        warms_up = bool(self.warmup_epochs or self.warmup_steps)
        if self.warmup_lr and not warms_up:
            found.append(f"warmup_lr: {self.warmup_lr} without a warm-up; give warmup_epochs or warmup_steps")
        return found

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        assert self.blr is not None
        ratio = self.global_batch_size / self.blr_batch
        return self.blr * (ratio if self.blr_rule == "linear" else math.sqrt(ratio))


class WatchConfig(Config):
    """Detection of hangs and of ranks whose weights drift. Limits in seconds are minimums, extended by `patience`."""

    enabled: bool = Field(
        True, description="one process per node ends the run when no rank makes progress within the limits"
    )
    patience: float = Field(
        5.0, ge=2, description="limit as a multiple of the slowest of the last 64 steps (saves, probes)"
    )
    start_seconds: float = Field(
        3600, gt=0, description="limit before the first step is complete, and after the last one"
    )
    step_seconds: float = Field(600, gt=0, description="limit of one part of a step: data, forward, backward, update")
    save_seconds: float = Field(1800, gt=0, description="limit of writing a checkpoint")
    probe_seconds: float = Field(3600, gt=0, description="limit between two batches of a probe or an evaluation")
    replicas_every_steps: int = Field(
        500, ge=0, description="steps between checks that all ranks have equal weights, also before each save; 0: none"
    )


class EngineConfig(Config):
    """Settings of the training engine. They affect speed and memory; results are equal up to rounding."""

    name: Literal["accelerate", "deepspeed"] = "accelerate"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = Field("fp32", description="of forward and backward; weights are fp32")
    accumulation_steps: Positive = Field(1, description="number of micro-batches per step")
    compile: bool = Field(False, description="torch.compile")
    deterministic: bool = Field(True, description="use only deterministic GPU kernels; false may be faster")
    max_nonfinite_steps: Positive = Field(
        3, description="rewind after this many non-finite (skipped) steps within nonfinite_window"
    )
    nonfinite_window: Positive = Field(
        100, description="number of most recent steps in which non-finite steps are counted"
    )
    max_rewinds: int = Field(
        3, ge=0, description="rewinds of a run to its last healthy checkpoint; after them it stops"
    )
    capture_weights: bool = Field(True, description="store the weights in captures of non-finite steps (the first 8)")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage of the deepspeed engine")
    watch: WatchConfig = WatchConfig()  # pyright: ignore[reportCallIssue]
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="DeepSpeed configuration, passed on unchanged")

    @field_validator("deepspeed")
    @classmethod
    def _can_be_passed_on(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if problems := deepspeed_problems(raw):
            raise ValueError("\n".join(problems))
        return raw

    @model_validator(mode="after")
    def _fits_together(self) -> EngineConfig:
        if self.compile and self.is_zero3:
            raise ValueError("compile: not possible with zero_stage 3; use zero_stage 0, 1 or 2, or compile=false")
        return self

    @property
    def is_zero3(self) -> bool:
        """Under ZeRO-3 no rank holds all the weights."""
        return self.name == "deepspeed" and self.zero_stage == 3


def deepspeed_problems(raw: Mapping[str, Any]) -> list[str]:
    """Problems of raw DeepSpeed keys: keys that Fovea sets itself, and unsupported options."""
    zero = _section(raw, "zero_optimization")
    if zero is None:
        return [f"zero_optimization: is a section, got the value {raw['zero_optimization']!r}"]
    found: list[str] = []
    if owned := sorted(OWNED_DEEPSPEED_KEYS & set(raw)) + ["zero_optimization.stage"] * ("stage" in zero):
        found.append(f"{', '.join(owned)}: set by optim and engine of this file; remove from engine.deepspeed")
    if "offload_param" in zero:
        found.append("zero_optimization.offload_param: not supported; offload the optimizer only")
    offload = _section(zero, "offload_optimizer")
    if offload is None:
        given = zero["offload_optimizer"]
        found.append(f"zero_optimization.offload_optimizer: is a section, got the value {given!r} (device: cpu)")
    elif offload.get("device", "none") not in ("none", "cpu") or offload.get("ratio", 1.0) != 1.0:
        found.append("zero_optimization.offload_optimizer: works with device cpu and ratio 1 only")
    unsupported = [key for key in ("round_robin_gradients", "zenflow") if zero.get(key)]
    return found + [f"zero_optimization.{key}: not supported; remove it" for key in unsupported]


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The section `key` of `values`, empty where it is missing or null; None where the value is no section."""
    given: Any = values.get(key)
    if given is None:
        return {}
    return cast(Mapping[str, Any], given) if isinstance(given, Mapping) else None


def optimizer_problems(optim: OptimConfig, engine: EngineConfig, *, averaged: str | None) -> list[str]:
    """Why the engine cannot run the optimizer, or take sharpness-aware steps.

    Args:
        averaged: what else averages the weights, by its key or name; None: nothing does.
    """
    found = zero_problem(optim.name, engine.zero_stage) if engine.name == "deepspeed" else []
    if averaged and KINDS[optim.name].averages:
        found.append(
            f"optim.name: {optim.name} evaluates its own average of the weights, and {averaged} keeps another one, "
            "of weights that are only trained; use adamw"
        )
    return found + _sam_problems(optim, engine)


def _sam_problems(optim: OptimConfig, engine: EngineConfig) -> list[str]:
    """Sharpness-aware steps move complete weights by unscaled gradients."""
    if optim.sam is None:
        return []
    found: list[str] = []
    if engine.name == "deepspeed" and engine.zero_stage > 0:
        found.append(
            f"optim.sam: not possible with ZeRO-{engine.zero_stage}, where no rank holds all gradients; "
            "use engine.zero_stage=0 or engine.name=accelerate"
        )
    if engine.precision == "fp16":
        found.append("optim.sam: not possible in fp16, whose gradients are scaled; use engine.precision=bf16 or fp32")
    return found


class CheckpointConfig(Config):
    """When checkpoints are saved. A checkpoint resumes this run; a release contains weights for other programs."""

    every_steps: Positive = Field(
        1000, description="steps between checkpoints; one is also saved at the end and on a request to stop"
    )
    keep: Positive = Field(3, description="number of newest checkpoints to keep")
    milestone_every_steps: Positive | None = Field(
        None, description="keep the checkpoints of multiples of this step permanently"
    )


class LogConfig(Config):
    """What is logged during training."""

    every_steps: Positive = 10
    pictures_every_steps: int = Field(500, ge=0, description="0: none")
    tensorboard: bool = True
