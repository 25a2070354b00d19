"""Configuration that the pixel tasks share: training on crops, inference in windows. No torch here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from finetune.tasks.configs.section import TaskSection
from finetune.tasks.configs.values import Probability, Size, pair
from pretrain.core.configlib import Positive

Factor = Annotated[float, Field(gt=0)]
Block = Annotated[int, Field(ge=0)]


class PixelSection(TaskSection):
    """Base of the tasks that predict every pixel; a subclass has the `head`."""

    head: Any
    blocks: tuple[Block, ...] | None = Field(
        None, description="blocks whose maps the head reads, from 0; default: the last, or the last of each quarter"
    )
    frozen: bool = Field(False, description="train only the head: a probe")

    crop: Size = Field(512, description="height, width of the training crops and of the windows, in pixels")
    resize: Positive | None = Field(None, description="shorter side of the images at scale 1; default: unchanged")
    scale: tuple[Factor, Factor] = Field((0.5, 2.0), description="range of the random scale in training")
    hflip: Probability = 0.5
    photometric: bool = Field(True, description="random brightness and contrast, and of 3 channels saturation and hue")

    slide: bool = Field(True, description="predict in windows of `crop`; false: complete images")
    stride: Size | None = Field(None, description="of the windows; default: two thirds of the crop")
    scales: tuple[Factor, ...] = Field((1.0,), min_length=1, description="of inference; the predictions are averaged")
    flip: bool = Field(False, description="average with the prediction of the mirrored image")

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
        found, blocks, maps = [], self.blocks, self.head.maps
        if self.scale[0] > self.scale[1]:
            found.append(f"task.scale: {list(self.scale)} does not ascend; swap the two")
        if self.steps[0] > self.window[0] or self.steps[1] > self.window[1]:
            found.append(f"task.stride: {self.steps} skips pixels between windows of {self.window}; make it smaller")
        if blocks is not None:
            if list(blocks) != sorted(set(blocks)) or not blocks:
                found.append(f"task.blocks: {list(blocks)} are not ascending numbers of blocks from 0")
            elif maps is not None and len(blocks) != maps:
                found.append(f"task.blocks: {len(blocks)} given, head {self.head.name} reads {maps} maps")
        return found
