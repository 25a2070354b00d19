"""Fine-tuned tasks."""

from __future__ import annotations

from pathlib import Path

from finetune.predictor import Predictor
from finetune.release import open_task
from pretrain.core.machine.device import find_device


def load_task(path: str | Path, *, device: str = "auto") -> Predictor:
    """Load a fine-tuned release or run to predict with; of a run its release, or its newest checkpoint.

    Raises:
        ValueError: it is neither, of a newer format, or its weights are not those of the task it names.
        CheckpointError: a run without a complete checkpoint.
    """
    where = find_device(device)
    task, record = open_task(path)
    return Predictor(task, record, device=where)
