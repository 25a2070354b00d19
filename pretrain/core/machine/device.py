"""Finds a device by its name."""

from __future__ import annotations

import torch


def find_device(name: str) -> torch.device:
    """The device `name` ("cpu", "cuda", "cuda:1", ...); "auto": CUDA if available, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}; use cpu, or auto") from error
