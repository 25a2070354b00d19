"""EoMT as its section of a configuration asks for it."""

from __future__ import annotations

from typing import Any

from finetune.heads.queries.eomt import EoMT
from finetune.heads.queries.mask_loss import MaskSetLoss
from finetune.tasks.configs.queries import EoMTSection


def build_eomt(section: EoMTSection, dense: Any, num_classes: int) -> EoMT:
    """With its loss, on a plain dense backbone."""
    weights = section.model_dump(include={"mask_weight", "dice_weight", "class_weight", "no_object_weight"})
    loss = MaskSetLoss(num_classes, num_points=section.num_points, **weights)
    return EoMT(dense, loss, **section.model_dump(include={"num_queries", "num_blocks", "masked_attention"}))
