"""What all tasks share: weights, batch, length, learning rate, engine, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.config import ModelSource
from launch.init.machine import Target
from launch.init.text import Choice

TINY, SMALL = 256, 512  # widths of backbones up to which small heads and large learning rates were measured
_RATES = {"tiny": (1e-3, 0.8), "small": (3e-4, 0.75), "large": (1e-4, 0.7)}


@dataclass(frozen=True)
class Backbone:
    """Facts about the weights.

    Attributes:
        strides: pixels per cell of its maps; one of a plain transformer. size: (height, width) it was trained with.
        objective: that a release was trained with; "" if unknown.
    """

    title: str
    strides: tuple[int, ...]
    size: tuple[int, int]
    width: int
    depth: int
    objective: str = ""

    @property
    def plain(self) -> bool:
        """One map, or several of one stride."""
        return len(self.strides) == 1 or len(set(self.strides)) < len(self.strides)

    @property
    def kind(self) -> str:
        return "tiny" if self.width <= TINY else "small" if self.width <= SMALL else "large"


def open_backbone(model: ModelSource) -> Backbone:
    """Facts about a source of weights, which are read. Imports torch.

    Raises:
        ConfigError: it cannot be read.
        ValueError: it gives no maps.
    """
    from finetune.dense.build import dense_backbone
    from finetune.weights import open_source

    opened = open_source(model)
    network = opened.backbone
    try:
        strides = tuple(dense_backbone(network).strides)
    except ValueError:  # no maps: a classifier needs none
        strides = ()
    objective = str(opened.source.get("objective") or "")
    return Backbone(opened.title, strides, network.img_size, network.embed_dim, network.depth, objective)


@dataclass(frozen=True)
class Length:
    """Optimizer steps of `batch` images, and how often the run evaluates and saves."""

    batch: int
    steps: int
    why: str


def length(images: int, batch: int, *, views: int, epochs: float, gpu: bool) -> Length:
    """Enough steps for `views` views and `epochs` passes; three times as many on a GPU, where they cost little."""
    batch = max(1, min(batch, images))
    factor = 3 if gpu else 1
    count = factor * max(views, epochs * images)
    steps = max(20, round(count / batch / 10) * 10)
    few = "few images are seen more often" if views > epochs * images else f"{epochs:g} passes"
    long = ", three times as long on a GPU" if gpu else ""
    why = f"{images} images: {steps} steps of {batch} are {steps * batch / images:.3g} passes ({few}{long})."
    return Length(batch, steps, why)


def shared(backbone: Backbone, where: Target, found: Length, *, frozen: bool = False) -> list[Choice]:
    """Sections optim, engine, checkpoint and evaluate."""
    rate, decay = _RATES[backbone.kind]
    why = f"A backbone {backbone.width} channels wide; wider ones take smaller steps (ViTDet: 1e-4 for ViT-B)."
    if frozen:
        rate, why = 1e-3, "Of the classifier alone, on standardized features."
    precision = "bf16" if where.bf16 else "fp32"
    choices = [
        Choice("optim.lr", rate, why),
        Choice("optim.weight_decay", 0.0 if frozen else 0.05),
        Choice("optim.global_batch_size", found.batch),
        Choice("optim.total_steps", found.steps, found.why),
        Choice("optim.warmup_steps", max(5, round(0.06 * found.steps))),
        Choice("optim.clip_grad", 1.0),
    ]
    if not frozen:
        text = (
            "Lower blocks keep more of their pretraining: each takes steps smaller by this factor than the one above."
        )
        choices.insert(1, Choice("optim.layer_decay", decay, text))
    engine = f"{where.name}: " + (
        "fast in bf16." if where.bf16 else "bf16 is slow on CPUs without instructions for it."
    )
    quarter = max(1, found.steps // 4)
    return [
        *choices,
        Choice("engine.precision", precision, engine),
        Choice("checkpoint.every_steps", quarter),
        Choice("evaluate.every_steps", 2 * quarter),
        Choice("evaluate.batch_size", min(8, found.batch)),
        Choice("evaluate.precision", precision),
    ]


def data_choices(train: dict[str, Any], val: dict[str, Any], where: Target, why: str) -> list[Choice]:
    """Section data."""
    return [
        Choice("data.train", train, why),
        Choice("data.val", val),
        Choice("data.num_workers", where.workers, f"{where.cores} cores."),
    ]


def multiple(pixels: float, unit: int) -> int:
    """`pixels` up to a multiple of `unit`."""
    return max(1, -(-round(pixels) // unit)) * unit
