"""Temporal mechanisms on their golden cases."""

from __future__ import annotations

from pretrain.models.mechanisms.temporal.tam import TAM
from tests.golden.case import Case
from tests.golden.mechanisms.module import run_module


def run_tam(case: Case) -> None:
    ctor = case.take("ctor", "in_channels", "n_segment", "kernel_size", "stride", "padding")
    module = TAM(
        ctor["in_channels"],
        ctor["n_segment"],
        ctor.get("kernel_size", 3),
        stride=ctor.get("stride", 1),
        padding=ctor.get("padding", 1),
    )
    run_module(case, module, {"G.": "kernel.", "L.": "gate."})
