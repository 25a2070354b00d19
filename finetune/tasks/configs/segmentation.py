"""Configuration of the task segmentation: a class for every pixel. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.pixel_heads import SegmentationHead, UPerNetPixels
from finetune.tasks.configs.pixels import PixelSection


class SegmentationConfig(PixelSection):
    """Semantic segmentation. Data: see `docs/segmentation.md`."""

    name: Literal["segmentation"] = "segmentation"
    head: SegmentationHead = Field(default_factory=UPerNetPixels)  # pyright: ignore[reportArgumentType]

    cat_max_ratio: float = Field(0.75, gt=0, le=1, description="largest share of a crop that one class may fill")
    reduce_zero_label: bool = Field(False, description="0 in the masks is void, the classes are 1, 2, ... (ADE20K)")
    void_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (255,), description="ids in the masks that are no class and not trained on"
    )
    background: str | None = Field(
        None, description="of COCO instances: class of the pixels outside them; default: void"
    )

    formats: ClassVar[frozenset[str]] = frozenset({"masks", "ade20k", "cityscapes", "voc", "coco", "coco_panoptic"})
    keys: ClassVar[frozenset[str]] = frozenset({"masks", "mask_names", "image_names", "annotations", "classes"})

    def problems(self, config: Any) -> list[str]:
        found, images = super().problems(config), config.optim.global_batch_size // config.engine.accumulation_steps
        if self.head.name == "upernet" and images == 1:
            found.append(
                "optim.global_batch_size: the batch norm of upernet's 1 x 1 map has no variance in a micro-batch of "
                "one image; make it larger, or engine.accumulation_steps smaller"
            )
        if self.head.name == "eomt" and self.blocks is not None:
            found.append("task.blocks: eomt reads the last block; remove it")
        return found
