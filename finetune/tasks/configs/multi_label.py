"""Configuration of the task multi_label. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from finetune.tasks.configs.classification import ClassificationConfig
from finetune.tasks.configs.values import Probability


class MultiLabelConfig(ClassificationConfig):
    """Any number of labels for an image."""

    formats: ClassVar[frozenset[str]] = frozenset({"csv"})
    keys: ClassVar[frozenset[str]] = frozenset({"annotations", "classes"})
    fewest_classes: ClassVar[int] = 1

    name: Literal["multi_label"] = "multi_label"  # pyright: ignore[reportIncompatibleVariableOverride]
    train: Literal["full", "partial", "lora", "linear", "attentive"] = Field(  # pyright: ignore
        "full", description="what is trained, as in classification"
    )
    threshold: Probability = Field(
        0.5, description="probability from which a label counts as predicted, in predictions and F1; AP needs none"
    )
