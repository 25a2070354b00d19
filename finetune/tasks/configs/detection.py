"""Configuration of the task detection: boxes of objects, and masks. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.detection_heads import HeadConfig, RCNNHead
from finetune.tasks.configs.section import TaskSection
from finetune.tasks.configs.values import Probability, Size, pair
from pretrain.core.configlib import Positive

Block = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(gt=0)]
MASK_HEADS = ("mask_rcnn", "eomt")


class DetectionConfig(TaskSection):
    """Detection and instance segmentation. Data: images and a COCO json of objects, see `docs/detection.md`."""

    name: Literal["detection"] = "detection"
    head: HeadConfig = Field(default_factory=RCNNHead)  # pyright: ignore[reportArgumentType]
    window: Positive | None = Field(
        None, description="tokens along a side of the attention windows; default: no windows"
    )
    global_blocks: tuple[Block, ...] | None = Field(
        None, description="numbers of the blocks without windows, from 0; default: four"
    )
    rel_pos: bool = Field(False, description="add decomposed relative positions to every block (ViTDet)")
    final_norm: bool = Field(False, description="apply the backbone's last norm before an R-CNN (ViTDet: no)")

    size: Size = Field(1024, description="height, width of the network's input in pixels; images are padded to it")
    scale: tuple[Factor, Factor] = Field(
        (0.1, 2.0), description="range of the random scale of the fitted image in training: large-scale jitter"
    )
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    photometric: bool = Field(False, description="random brightness and contrast, and of 3 channels saturation and hue")
    test_size: Size | None = Field(None, description="size that images are fitted into for prediction; default: `size`")
    max_detections: Positive = Field(100, description="per image, best first; AP uses this number")
    empty_images: Literal["report", "keep", "drop"] = Field(
        "report", description="training images without objects: report: listed and kept; keep; drop"
    )

    formats: ClassVar[frozenset[str]] = frozenset({"coco"})
    keys: ClassVar[frozenset[str]] = frozenset({"annotations"})

    @property
    def with_masks(self) -> bool:
        """Whether masks are trained, so that every object needs one."""
        return self.head.name in MASK_HEADS

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) in training, in pixels."""
        return pair(self.size)

    @property
    def test_canvas(self) -> tuple[int, int]:
        """(height, width) in prediction, in pixels."""
        return self.canvas if self.test_size is None else pair(self.test_size)

    def source_problems(self, key: str, source: Any) -> list[str]:
        found = super().source_problems(key, source)
        if source.annotations is None:
            found.append(
                f"{key}.annotations: missing; detection needs the COCO json of these images (YOLO, VOC, "
                "labelme, VIA, CVAT, Label Studio: fovea data convert makes it)"
            )
        if source.per_class is not None:
            found.append(f"{key}.per_class: {source.per_class}: an image has objects of many classes; use fraction")
        return found

    def problems(self, config: Any) -> list[str]:
        found = []
        if self.scale[0] > self.scale[1]:
            found.append(f"task.scale: {list(self.scale)} does not ascend; swap the two")
        if self.window is None and self.global_blocks is not None:
            found.append("task.global_blocks: given without task.window; every block is global anyway")
        if isinstance(self.head, RCNNHead):
            found += _rcnn_problems(self.head)
        return found


def _rcnn_problems(head: RCNNHead) -> list[str]:
    found = []
    wrong = [scale for scale in head.scales if scale not in (4, 2, 1, 0.5)]
    if wrong or list(head.scales) != sorted(set(head.scales), reverse=True):
        found.append(f"task.head.scales: {list(head.scales)}: expected some of 4, 2, 1, 0.5, in this order")
    return found
