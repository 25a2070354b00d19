"""Configuration of the task segmentation: a class for every pixel. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.pixel_heads import SegmentationHead, UPerNetPixels
from finetune.tasks.configs.section import TaskSection
from finetune.tasks.configs.values import Positive, Probability, Size, pair

Factor = Annotated[float, Field(gt=0)]
Block = Annotated[int, Field(ge=0)]


class SegmentationConfig(TaskSection):
    """Semantic segmentation. The data: `docs/finetune.md`."""

    name: Literal["segmentation"] = "segmentation"
    head: SegmentationHead = Field(default_factory=UPerNetPixels)  # pyright: ignore[reportArgumentType]
    blocks: tuple[Block, ...] | None = Field(
        None, description="whose maps the head reads, from 0; default: the last of them, or the ends of four parts"
    )
    frozen: bool = Field(False, description="the backbone is not trained: a probe")

    crop: Size = Field(512, description="height, width of the training crops and of the windows, in pixels")
    resize: Positive | None = Field(None, description="shorter side of the images at scale 1; default: as they are")
    scale: tuple[Factor, Factor] = Field((0.5, 2.0), description="between which images are resized in training")
    cat_max_ratio: float = Field(0.75, gt=0, le=1, description="of a crop that one class may fill; 1: all")
    hflip: Probability = 0.5
    photometric: bool = Field(True, description="random brightness, contrast, saturation, hue")

    slide: bool = Field(True, description="infer in windows of `crop`; false: whole images")
    stride: Size | None = Field(None, description="of the windows; default: two thirds of the crop")
    scales: tuple[Factor, ...] = Field((1.0,), min_length=1, description="of inference; probabilities are averaged")
    flip: bool = Field(False, description="infer the mirrored image too")

    reduce_zero_label: bool = Field(False, description="0 in the masks is void, the classes are 1, 2, ... (ADE20K)")
    void_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field((255,), description="in the masks: no class, not learnt")
    background: str | None = Field(None, description="of COCO instances: class of pixels outside them; default: void")

    formats: ClassVar[frozenset[str]] = frozenset({"masks", "ade20k", "cityscapes", "voc", "coco", "coco_panoptic"})
    keys: ClassVar[frozenset[str]] = frozenset({"masks", "annotations", "classes"})

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
        if self.head.name == "eomt" and self.blocks is not None:
            found.append("task.blocks: eomt reads the last block; remove it")
        if self.steps[0] > self.window[0] or self.steps[1] > self.window[1]:
            found.append(f"task.stride: {self.steps} passes over pixels of windows of {self.window}; make it smaller")
        return found


def dense_problems(
    scale: tuple[float, float], blocks: tuple[int, ...] | None, maps: int | None, head: str
) -> list[str]:
    """What is wrong with the keys that dense tasks share; `maps`: so many the head reads, None: any number."""
    found = []
    if scale[0] > scale[1]:
        found.append(f"task.scale: {list(scale)} does not ascend; turn it round")
    if blocks is not None:
        if list(blocks) != sorted(set(blocks)) or not blocks:
            found.append(f"task.blocks: {list(blocks)} are not ascending numbers of blocks, from 0")
        elif maps is not None and len(blocks) != maps:
            found.append(f"task.blocks: {len(blocks)} given, head {head} reads {maps} maps")
    return found
