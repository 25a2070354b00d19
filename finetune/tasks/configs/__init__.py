"""The configurations of the tasks, a union discriminated by `name`. No torch here."""

from __future__ import annotations

from finetune.tasks.configs.classification import ClassificationConfig
from finetune.tasks.configs.depth import DepthConfig
from finetune.tasks.configs.detection import DetectionConfig
from finetune.tasks.configs.multi_label import MultiLabelConfig
from finetune.tasks.configs.section import TaskSection
from finetune.tasks.configs.segmentation import SegmentationConfig

TaskConfig = ClassificationConfig | MultiLabelConfig | DetectionConfig | SegmentationConfig | DepthConfig

__all__ = [
    "ClassificationConfig",
    "DepthConfig",
    "DetectionConfig",
    "MultiLabelConfig",
    "SegmentationConfig",
    "TaskConfig",
    "TaskSection",
]
