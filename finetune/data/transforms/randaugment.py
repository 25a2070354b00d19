"""RandAugment (Cubuk et al. 2019) with timm's operations, its random numbers keyed by the caller.

The policy is that of DeiT, MAE and BEiT, in timm's notation `rand-m9-mstd0.5-inc1`: two of fifteen operations, each
applied with probability 0.5 at a magnitude drawn around 9 of 10, all of them stronger where the magnitude is higher.
timm draws from Python's global generator; here every number is derived from given uniform random numbers, so that a
sample's augmentation depends only on its position. At level 10 timm posterizes to 0 bits, which Pillow refuses; here
one bit remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

LEVELS = 10.0
APPLIED = 0.5
UNIFORMS = 5  # per operation: which, whether it is applied, two for the magnitude, the sign

_Argument = Callable[[float, float], tuple[float, ...]]  # (level in [0, 1], sign) -> arguments


def _enhanced(level: float, sign: float) -> tuple[float]:
    return (max(0.1, 1.0 + sign * 0.9 * level),)


OPERATIONS: dict[str, _Argument] = {
    "AutoContrast": lambda level, sign: (),
    "Equalize": lambda level, sign: (),
    "Invert": lambda level, sign: (),
    "Rotate": lambda level, sign: (sign * 30.0 * level,),
    "PosterizeIncreasing": lambda level, sign: (max(1, 4 - int(4 * level)),),
    "SolarizeIncreasing": lambda level, sign: (256 - min(256, int(256 * level)),),
    "SolarizeAdd": lambda level, sign: (min(128, int(110 * level)),),
    "ColorIncreasing": _enhanced,
    "ContrastIncreasing": _enhanced,
    "BrightnessIncreasing": _enhanced,
    "SharpnessIncreasing": _enhanced,
    "ShearX": lambda level, sign: (sign * 0.3 * level,),
    "ShearY": lambda level, sign: (sign * 0.3 * level,),
    "TranslateXRel": lambda level, sign: (sign * 0.45 * level,),
    "TranslateYRel": lambda level, sign: (sign * 0.45 * level,),
}
_NAMES = tuple(OPERATIONS)


def rand_augment(
    image: np.ndarray,
    uniforms: np.ndarray,
    *,
    magnitude: float,
    magnitude_std: float,
    fill: tuple[int, ...],
) -> np.ndarray:
    """The image uint8 [H, W, 3] after len(uniforms) operations.

    Args:
        uniforms: [operations, UNIFORMS] in [0, 1).
        magnitude: mean of the levels, of 10. magnitude_std: their standard deviation.
        fill: RGB of pixels that a shear, a shift or a rotation uncovers.
    """
    picture = Image.fromarray(image)
    for which, applied, first, second, sign in uniforms.tolist():
        if applied >= APPLIED:
            continue
        name = _NAMES[int(which * len(_NAMES))]
        level = magnitude + magnitude_std * _gaussian(first, second)
        picture = apply(name, picture, level, 1.0 if sign < 0.5 else -1.0, fill=fill)
    return np.asarray(picture)


def apply(name: str, picture: Image.Image, level: float, sign: float, *, fill: tuple[int, ...]) -> Image.Image:
    """One operation at a level that is clipped to 0 to 10; `sign` is the direction of those that have one."""
    arguments = OPERATIONS[name](min(max(level, 0.0), LEVELS) / LEVELS, sign)
    operation: Any = NAME_TO_OP[name]
    return operation(picture, *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC)


def _gaussian(first: float, second: float) -> float:
    """A standard normal number from two uniform ones (Box & Muller 1958)."""
    return math.sqrt(-2.0 * math.log1p(-first)) * math.cos(2.0 * math.pi * second)
