"""GPUs by their vendors' data sheets, and assumptions for what was not measured. Every figure has a unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory: GiB. bf16, fp32: dense TFLOP/s of matrix products (fp32: TF32 where there is one). bandwidth: TB/s."""

    memory: float
    bf16: float
    fp32: float
    bandwidth: float


# Vendors' data sheets; dense, without sparsity. Memory in GiB: drivers report 1-3 % less.
GPUS = {
    "b200": Gpu(167.6, 2250, 1125, 8.0),
    "h200": Gpu(131.3, 989, 494, 4.8),
    "h100": Gpu(74.5, 989, 494, 3.35),
    "a100-80g": Gpu(74.5, 312, 156, 2.0),
    "a100": Gpu(37.3, 312, 156, 1.56),
    "l40s": Gpu(44.7, 362, 183, 0.864),
    "a10g": Gpu(22.4, 70, 35, 0.6),
    "v100": Gpu(29.8, 125, 15.7, 0.9),
    "rtx4090": Gpu(22.4, 165, 82.6, 1.01),
    "mi300x": Gpu(178.8, 1307, 653, 5.3),
}
# Share of the peak that training reaches; published runs have 25-50 % (DINOv2 about 45, DINOv3 25, MAE 37).
UTILIZATION = 0.35


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. ValueError: it is not in the table."""
    if name.lower() not in GPUS:
        raise ValueError(f"--gpu {name}: not known; one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
