"""Configuration of the task depth: metres for every pixel of an image. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.pixel_heads import DepthHead, LinearPixels
from finetune.tasks.configs.pixels import Factor, PixelSection
from finetune.tasks.configs.values import Size


class DepthConfig(PixelSection):
    """Monocular depth: every pixel is classified into depth bins; the prediction is their expectation (DINOv2)."""

    name: Literal["depth"] = "depth"
    head: DepthHead = Field(default_factory=LinearPixels)  # pyright: ignore[reportArgumentType]

    min_depth: float = Field(
        0.001, gt=0, description="metres; smaller depths are not trained on, predicted or measured"
    )
    max_depth: float = Field(10.0, gt=0, description="metres; larger depths are not")
    units_per_metre: float = Field(1000.0, gt=0, description="of 16-bit depth PNGs (NYU 1000, KITTI 256); 0: unknown")
    bins: Annotated[int, Field(ge=2)] = 256
    bin_spacing: Literal["uniform", "log"] = "uniform"
    silog_lambda: float = Field(0.85, ge=0, le=1, description="1: the scale of the scene does not influence the loss")
    gradient_weight: float = Field(0.5, ge=0, description="weight of the loss on the gradients of log depth; 0: off")

    crop: Size = Field(416, description="height, width of the training crops and of the windows, in pixels")
    scale: tuple[Factor, Factor] = Field(
        (1.0, 1.0), description="range of the random scale in training; depth is divided by it"
    )

    slide: bool = Field(False, description="predict in windows of `crop`; false: complete images")
    eval_crop: Literal["none", "eigen", "garg"] = Field("none", description="eigen: NYU's; garg: KITTI's")

    formats: ClassVar[frozenset[str]] = frozenset({"depth"})
    keys: ClassVar[frozenset[str]] = frozenset({"depth"})

    def problems(self, config: Any) -> list[str]:
        found = super().problems(config)
        if self.min_depth >= self.max_depth:
            found.append(f"task.min_depth: {self.min_depth} is not less than max_depth {self.max_depth}")
        return found

    def source_problems(self, key: str, source: Any) -> list[str]:
        found = super().source_problems(key, source)
        if source.depth is None:
            found.append(f"{key}.depth: missing; give the folder or .tar of depth maps named as the images")
        return found
