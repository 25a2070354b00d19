"""Geometry of a view: the box of a random crop, and its resize on uint8.

The crop follows torchvision's RandomResizedCrop (Inception, Szegedy et al. 2014): ten tries of a log-uniform aspect
ratio, then the largest central crop of an allowed ratio. It takes uniform random numbers as arguments, so that they can
be keyed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.views.specs import JITTER_ORDERS, NUM_PARAMS, ColorJitter, Param, ViewSpec

_TRIES = 10
BOX_UNIFORMS = 2 * _TRIES + 2
_COLOUR_UNIFORMS = 11
UNIFORMS = BOX_UNIFORMS + _COLOUR_UNIFORMS  # per view instance

_RESIZE = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}


def crop_box(
    uniforms: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop from BOX_UNIFORMS numbers in [0, 1)."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * attempt])
        aspect = math.exp(log_low + (log_high - log_low) * uniforms[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniforms[2 * _TRIES] * (height - h + 1))
            left = int(uniforms[2 * _TRIES + 1] * (width - w + 1))
            return top, left, h, w
    return _central_box(height, width, ratio)


def resize_into(out: Tensor, image: Tensor, box: tuple[int, int, int, int], interpolation: str) -> None:
    """Write the box of `image` [1, C, H, W], resized with antialiasing, into `out` [1, C, h, w]; both uint8 or float32.

    Equals `torch.nn.functional.interpolate(..., antialias=True)` on the cropped pixels; writing into the batch avoids
    the page faults of a new result (1.4x at 224 px). Within 1/255 of PIL's resize on natural images;
    Lanczos is PIL's.
    """
    top, left, height, width = box
    crop = image[:, :, top : top + height, left : left + width]
    if interpolation == "lanczos":
        for channel, pixels in enumerate(crop[0].numpy()):
            resized = Image.fromarray(pixels).resize((out.shape[3], out.shape[2]), Image.Resampling.LANCZOS)
            out[0, channel] = torch.from_numpy(np.array(resized).clip(0, 255))
        return
    _RESIZE[interpolation](crop, out.shape[2:], False, None, None, out=out)
    if out.is_floating_point():
        out.clamp_(0, 255)  # bicubic overshoots; the kernel for uint8 clips


def colour_params(uniforms: np.ndarray, view: ViewSpec) -> np.ndarray:
    """Parameters float32 [..., NUM_PARAMS] of view instances from uniform random numbers [..., UNIFORMS] in [0, 1)."""
    flip, jittered, order, brightness, contrast, saturation, hue, gray, blurred, sigma, solarized = np.moveaxis(
        uniforms[..., BOX_UNIFORMS:], -1, 0
    )
    params = np.zeros((*uniforms.shape[:-1], NUM_PARAMS), np.float32)
    params[..., Param.FLIP] = flip < view.hflip
    jitter = view.jitter or ColorJitter(prob=0.0)
    params[..., Param.JITTER] = jittered < jitter.prob
    params[..., Param.ORDER] = np.floor(order * len(JITTER_ORDERS))
    params[..., Param.BRIGHTNESS] = _factor(brightness, jitter.brightness)
    params[..., Param.CONTRAST] = _factor(contrast, jitter.contrast)
    params[..., Param.SATURATION] = _factor(saturation, jitter.saturation)
    params[..., Param.HUE] = (2 * hue - 1) * jitter.hue
    params[..., Param.GRAY] = gray < view.grayscale
    if view.blur is not None:
        low, high = view.blur.sigma_min, view.blur.sigma_max
        params[..., Param.SIGMA] = np.where(blurred < view.blur.prob, low + (high - low) * sigma, 0.0)
    params[..., Param.SOLARIZE] = solarized < view.solarize
    return params


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def _factor(uniforms: np.ndarray, spread: float) -> np.ndarray:
    low = max(0.0, 1.0 - spread)
    return low + (1.0 + spread - low) * uniforms
