"""Configuration of the task depth: metres for every pixel of one image. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.pixel_heads import DepthHead, LinearPixels
from finetune.tasks.configs.section import TaskSection
from finetune.tasks.configs.segmentation import Block, Factor, dense_problems
from finetune.tasks.configs.values import Positive, Probability, Size, pair


class DepthConfig(TaskSection):
    """Monocular depth: every pixel is classified into bins of depth, whose expectation is the answer (DINOv2)."""

    name: Literal["depth"] = "depth"
    head: DepthHead = Field(default_factory=LinearPixels)  # pyright: ignore[reportArgumentType]
    blocks: tuple[Block, ...] | None = Field(
        None, description="whose maps the head reads, from 0; default: the last of them, or the ends of four parts"
    )
    frozen: bool = Field(False, description="the backbone is not trained: a probe")

    min_depth: float = Field(0.001, gt=0, description="metres; nothing nearer is learnt, predicted or measured")
    max_depth: float = Field(10.0, gt=0, description="metres; nothing farther is")
    units_per_metre: float = Field(1000.0, gt=0, description="of 16-bit depth PNGs (NYU 1000, KITTI 256); 0: unknown")
    bins: Annotated[int, Field(ge=2)] = 256
    bin_spacing: Literal["uniform", "log"] = "uniform"
    silog_lambda: float = Field(0.85, ge=0, le=1, description="1: the loss does not see the scale of the scene")
    gradient_weight: float = Field(0.5, ge=0, description="of the loss of the log depth's gradients; 0: without")

    crop: Size = Field(416, description="height, width of the training crops, and of the windows, in pixels")
    resize: Positive | None = Field(None, description="shorter side of the images at scale 1; default: as they are")
    scale: tuple[Factor, Factor] = Field((1.0, 1.0), description="of training; depth is divided by the factor drawn")
    hflip: Probability = 0.5
    photometric: bool = True

    slide: bool = Field(False, description="infer in windows of `crop`; false: whole images")
    stride: Size | None = Field(None, description="of the windows; default: two thirds of the crop")
    scales: tuple[Factor, ...] = Field((1.0,), min_length=1, description="of inference; depths are averaged")
    flip: bool = Field(False, description="infer the mirrored image too")
    eval_crop: Literal["none", "eigen", "garg"] = Field("none", description="eigen: NYU's; garg: KITTI's")

    formats: ClassVar[frozenset[str]] = frozenset({"depth"})
    keys: ClassVar[frozenset[str]] = frozenset({"depth"})

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of crops and windows in pixels."""
        return pair(self.crop)

    @property
    def steps(self) -> tuple[int, int]:
        """The windows' stride, (down, across) in pixels."""
        if self.stride is not None:
            return pair(self.stride)
        return max(self.window[0] * 2 // 3, 1), max(self.window[1] * 2 // 3, 1)

    def problems(self, config: Any) -> list[str]:
        found = dense_problems(self.scale, self.blocks, self.head.maps, self.head.name)
        if self.min_depth >= self.max_depth:
            found.append(f"task.min_depth: {self.min_depth} is not below max_depth {self.max_depth}")
        if self.steps[0] > self.window[0] or self.steps[1] > self.window[1]:
            found.append(f"task.stride: {self.steps} passes over pixels of windows of {self.window}; make it smaller")
        return found

    def source_problems(self, key: str, source: Any) -> list[str]:
        found = super().source_problems(key, source)
        if source.depth is None:
            found.append(f"{key}.depth: missing; give the folder or .tar of depth maps named as the images")
        return found
