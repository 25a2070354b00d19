"""The autocast context of a configured precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pretrain.core.configlib import Precision

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision, *, cache: bool = True) -> AbstractContextManager[Any]:
    """Context for a forward pass: computes in `precision` where torch considers it safe; weights are unchanged.

    Args:
        cache: keep converted copies of the weights until the context ends.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_LOW[precision], cache_enabled=cache)
