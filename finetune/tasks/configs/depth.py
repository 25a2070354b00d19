"""Configuration of the task depth: metres for every pixel of one image. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.pixel_heads import DepthHead, LinearPixels
from finetune.tasks.configs.pixels import Factor, PixelSection
from finetune.tasks.configs.values import Size


class DepthConfig(PixelSection):
    """Monocular depth: every pixel is classified into bins of depth, whose expectation is the answer (DINOv2)."""

    name: Literal["depth"] = "depth"
    head: DepthHead = Field(default_factory=LinearPixels)  # pyright: ignore[reportArgumentType]

    min_depth: float = Field(0.001, gt=0, description="metres; nothing nearer is learnt, predicted or measured")
    max_depth: float = Field(10.0, gt=0, description="metres; nothing farther is")
    units_per_metre: float = Field(1000.0, gt=0, description="of 16-bit depth PNGs (NYU 1000, KITTI 256); 0: unknown")
    bins: Annotated[int, Field(ge=2)] = 256
    bin_spacing: Literal["uniform", "log"] = "uniform"
    silog_lambda: float = Field(0.85, ge=0, le=1, description="1: the loss does not see the scale of the scene")
    gradient_weight: float = Field(0.5, ge=0, description="of the loss of the log depth's gradients; 0: without")

    crop: Size = Field(416, description="height, width of the training crops, and of the windows, in pixels")
    scale: tuple[Factor, Factor] = Field((1.0, 1.0), description="of training; depth is divided by the factor drawn")

    slide: bool = Field(False, description="infer in windows of `crop`; false: whole images")
    eval_crop: Literal["none", "eigen", "garg"] = Field("none", description="eigen: NYU's; garg: KITTI's")

    formats: ClassVar[frozenset[str]] = frozenset({"depth"})
    keys: ClassVar[frozenset[str]] = frozenset({"depth"})

    def problems(self, config: Any) -> list[str]:
        found = super().problems(config)
        if self.min_depth >= self.max_depth:
            found.append(f"task.min_depth: {self.min_depth} is not below max_depth {self.max_depth}")
        return found

    def source_problems(self, key: str, source: Any) -> list[str]:
        found = super().source_problems(key, source)
        if source.depth is None:
            found.append(f"{key}.depth: missing; give the folder or .tar of depth maps named as the images")
        return found
