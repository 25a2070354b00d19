"""The device part of the augmentation: flip, colour jitter, grayscale, blur, solarize, normalize.

A pure function of a host batch: every random number was drawn on the host (`view.Param`), so it runs the same in a
worker and on a GPU, without a generator and without waiting for the device. Each operation is torchvision's tensor
formula (`torchvision.transforms.v2.functional`) on float images in [0, 1]; the blur's tail is cut where it holds less
than 1e-3 of the weight. Contrast of other than 3 channels blends with the mean of all channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.view import JITTER_OPS, JITTER_ORDERS, Noise, Param, View, check_channels, stacks

_LUMA = (0.2989, 0.587, 0.114)
_TAIL_SIGMAS = 3.3


def apply(
    views: Sequence[View | Noise],
    host_batch: dict,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The tensors of a host batch on `device`: views float32 [b, n, C, H, W] normalized, the rest as it is.

    Views that a worker has augmented already (no "<name>.params" in the batch) are only moved. Raises ValueError for
    saturation, hue or grayscale on other than 3 channels, and for mean or std of another length than the channels.
    """
    noises = [spec.name for spec in views if isinstance(spec, Noise)]
    batch = {name: host_batch[name].to(device, non_blocking=True) for name in ("position", *noises)}
    for name, entry in stacks(views).items():
        images = host_batch[name].to(device, non_blocking=True)
        if f"{name}.params" in host_batch:
            check_channels(views, images.shape[2])
            sigma_max = max((view.blur.sigma_max for _, view in entry if view.blur is not None), default=0.0)
            images = augment(images, host_batch[f"{name}.params"], mean, std, sigma_max=sigma_max)
        batch[name] = images
    return batch


def augment(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], *, sigma_max: float) -> Tensor:
    """uint8 [b, n, C, H, W] on any device and its parameters float32 [b, n, P] on the host, to normalized float32."""
    channels = images.shape[2]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean has {len(mean)} and std {len(std)} numbers for images of {channels} channels")
    pixels = images.flatten(0, 1)
    x = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for step in _moved(_plan(params.flatten(0, 1), sigma_max), x.device):
        x.index_copy_(0, step.index, step.op(x.index_select(0, step.index), step.value[:, None, None, None]))
    shift, scale = torch.tensor([mean, std], dtype=torch.float32).to(x.device, non_blocking=True)
    x.sub_(shift[:, None, None]).div_(scale[:, None, None])
    return x.view(images.shape)


class _Step(NamedTuple):
    """One operation on some of the images: `index` int64 [k], `value` float32 [k]."""

    op: Callable[[Tensor, Tensor], Tensor]
    index: Tensor
    value: Tensor


def _plan(params: Tensor, sigma_max: float) -> list[_Step]:
    """What to do in which order, known on the host, so that no operation has to wait for the device."""
    steps: list[_Step] = []

    def add(op: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, param: Param) -> None:
        index = chosen.nonzero().flatten()
        if len(index):
            steps.append(_Step(op, index, params[index, param]))

    add(_flip, params[:, Param.FLIP] > 0, Param.FLIP)
    jittered = params[:, Param.JITTER] > 0
    order = _ORDERS[params[:, Param.ORDER].long()]
    for slot in range(len(JITTER_OPS)):
        for param in JITTER_OPS:
            leaves = 0.0 if param is Param.HUE else 1.0
            add(_JITTER[param], jittered & (order[:, slot] == param) & (params[:, param] != leaves), param)
    add(_grayscale, params[:, Param.GRAY] > 0, Param.GRAY)

    def blur(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_blur(x, sigma, sigma_max)

    add(blur, params[:, Param.SIGMA] > 0, Param.SIGMA)
    add(_solarize, params[:, Param.SOLARIZE] > 0, Param.SOLARIZE)
    return steps


def _moved(steps: list[_Step], device: torch.device) -> list[_Step]:
    """The same plan on `device`, sent as two tensors."""
    if device.type == "cpu" or not steps:
        return steps
    sizes = [len(step.index) for step in steps]
    indices = torch.cat([step.index for step in steps]).pin_memory().to(device, non_blocking=True).split(sizes)
    values = torch.cat([step.value for step in steps]).pin_memory().to(device, non_blocking=True).split(sizes)
    return [_Step(step.op, index, value) for step, index, value in zip(steps, indices, values, strict=True)]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x [k, C, H, W] in [0, 1], factor [k, 1, 1, 1]; so do all operations below."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    gray = luma(x) if x.shape[1] == 3 else x
    return torch.lerp(gray.mean((1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by a fraction of a turn in HSV, where value and chroma stay as they are.

    A channel at offset n (5, 3, 1 for red, green, blue) is value - chroma * clamp(min(k, 4 - k), 0, 1), with
    k = (n + 6 hue) mod 6 (A. R. Smith 1978, "Color gamut transform pairs", in its closed form).
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    turn = (chroma > 0) / chroma.clamp_min(1e-12)
    sixths = torch.where(
        value == red,
        (green - blue) * turn,
        torch.where(value == green, 2 + (blue - red) * turn, 4 + (red - green) * turn),
    )
    offset = torch.tensor([5.0, 3.0, 1.0]).to(x.device, non_blocking=True)
    k = torch.remainder(sixths[:, None] + 6 * shift + offset[:, None, None], 6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Grayscale of RGB [k, 3, H, W]: [k, 1, H, W] (ITU-R 601-2)."""
    red, green, blue = x.split(1, 1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def gaussian_blur(x: Tensor, sigma: Tensor, sigma_max: float) -> Tensor:
    """Separable Gaussian blur with one sigma per image, in pixels; the image is mirrored at its edges."""
    radius = min(math.ceil(_TAIL_SIGMAS * sigma_max - 0.5), x.shape[-2] - 1, x.shape[-1] - 1)
    count, channels, height, width = x.shape
    taps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    weights = torch.exp(-0.5 * (taps / sigma[:, 0, 0]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    x = F.pad(x, [radius] * 4, mode="reflect").view(1, count * channels, height + 2 * radius, width + 2 * radius)
    x = F.conv2d(x, weights[..., None], groups=count * channels)
    return F.conv2d(x, weights[..., None, :], groups=count * channels).view(count, channels, height, width)


def solarize(x: Tensor, threshold: float = 128 / 255) -> Tensor:
    return torch.where(x >= threshold, 1 - x, x)


def _flip(x: Tensor, _: Tensor) -> Tensor:
    return x.flip(-1)


def _grayscale(x: Tensor, _: Tensor) -> Tensor:
    return luma(x).expand_as(x)


def _solarize(x: Tensor, _: Tensor) -> Tensor:
    return solarize(x)


_ORDERS = torch.tensor(JITTER_ORDERS)
_JITTER = {
    Param.BRIGHTNESS: adjust_brightness,
    Param.CONTRAST: adjust_contrast,
    Param.SATURATION: adjust_saturation,
    Param.HUE: adjust_hue,
}
