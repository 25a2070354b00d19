import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as v2

from pretrain.data.views.crops import BOX_UNIFORMS, UNIFORMS, colour_params, crop_box, resize_into
from pretrain.data.views.specs import JITTER_ORDERS, Blur, ColorJitter, Param, ViewSpec

uniform = st.floats(0, 1, exclude_max=True)
uniforms = st.lists(uniform, min_size=BOX_UNIFORMS, max_size=BOX_UNIFORMS)


def photo(height: int = 375, width: int = 500) -> np.ndarray:
    """Smooth shading, edges and some grain, as a photo has."""
    y, x = np.mgrid[:height, :width]
    shade = 110 + 80 * np.sin(x / 37 + 1) * np.cos(y / 53) + 40 * ((x // 60 + y // 45) % 2)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return (shade[..., None] + np.array([10, -5, 0]) + grain).clip(0, 255).astype(np.uint8)


@given(
    uniforms,
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from([(0.08, 1.0), (0.2, 1.0), (0.05, 0.4), (1.0, 1.0), (0.9, 1.0)]),
)
def test_a_crop_is_inside_the_image(numbers, height, width, scale):
    top, left, h, w = crop_box(numbers, height, width, scale, (3 / 4, 4 / 3))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


def torchvision_box(numbers, height, width, scale, ratio, monkeypatch):
    """torchvision's own code, fed with our numbers in place of its generator."""
    tries, corner = iter(numbers[:-2]), iter(numbers[-2:])
    draw = lambda self, low, high: self.fill_(low + (high - low) * next(tries))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda n: torch.zeros(n, dtype=torch.float64))
        patch.setattr(torch.Tensor, "uniform_", draw)
        patch.setattr(torch, "randint", lambda low, high, size: torch.tensor([int(next(corner) * high)]))
        return v1.RandomResizedCrop.get_params(torch.zeros(3, height, width), list(scale), list(ratio))


def test_the_box_is_torchvisions_for_equal_random_numbers(monkeypatch):
    random = np.random.default_rng(0)
    central = 0
    for _ in range(600):
        height, width = (int(n) for n in random.integers(1, 700, 2))
        scale = [(0.08, 1.0), (0.2, 1.0), (0.05, 0.4), (0.9, 1.0)][random.integers(4)]
        numbers = random.random(BOX_UNIFORMS).tolist()
        theirs = torchvision_box(numbers, height, width, scale, (3 / 4, 4 / 3), monkeypatch)
        assert crop_box(numbers, height, width, scale, (3 / 4, 4 / 3)) == tuple(theirs)
        central += max(height / width, width / height) > 3
    assert central > 50


def test_boxes_reach_all_of_the_image_and_areas_are_uniform():
    random = np.random.default_rng(1)
    boxes = np.array(
        [crop_box(random.random(BOX_UNIFORMS).tolist(), 300, 400, (0.2, 0.6), (3 / 4, 4 / 3)) for _ in range(3000)]
    )
    area = boxes[:, 2] * boxes[:, 3] / (300 * 400)
    assert abs(area.mean() - 0.4) < 0.01
    assert abs(area.std() - 0.4 / math.sqrt(12)) < 0.01
    assert boxes[:, 0].min() == 0
    assert (boxes[:, 0] + boxes[:, 2]).max() == 300


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("box", "size"), [((10, 20, 300, 280), (224, 224)), ((3, 5, 40, 50), (96, 64)), ((0, 0, 375, 500), (32, 48))]
)
def test_resizing_into_the_batch_equals_torchs_interpolate(channels, interpolation, box, size):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (375, 500, channels), dtype=np.uint8))
    image = pixels.permute(2, 0, 1)[None]
    batch = torch.full((2, 3, *size, channels), 7, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    resize_into(batch[1, 2:3], image, box, interpolation)
    top, left, height, width = box
    crop = image[:, :, top : top + height, left : left + width].contiguous()
    expected = F.interpolate(crop, size=size, mode=interpolation, antialias=True)
    assert (batch[1, 2].int() - expected[0].int()).abs().max() <= (0 if channels <= 4 else 1)
    assert (batch[0] == 7).all()
    assert (batch[1, :2] == 7).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("box", "size"), [((10, 20, 300, 280), 224), ((40, 60, 200, 230), 224), ((30, 50, 120, 130), 96)]
)
def test_a_resized_crop_is_pils_to_one_step_of_255(interpolation, box, size):
    image = photo()
    pil = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    top, left, height, width = box
    theirs = Image.fromarray(image[top : top + height, left : left + width]).resize((size, size), pil)
    ours = torch.empty((1, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(ours, torch.from_numpy(image).permute(2, 0, 1)[None], box, interpolation)
    difference = np.abs(ours[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1
    mode = v1.InterpolationMode(interpolation)
    tensors = v2.resized_crop(
        torch.from_numpy(image).permute(2, 0, 1), *box, size=[size, size], interpolation=mode, antialias=True
    )
    assert (ours[0].int() - tensors.int()).abs().max() == 0


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_lanczos_is_pils_on_the_crop_alone(channels):
    image = np.concatenate([photo(), photo()[::-1]], axis=2)[..., :channels]
    box, size = (10, 20, 300, 280), (112, 96)
    ours = torch.empty((1, *size, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(ours, torch.from_numpy(image.copy()).permute(2, 0, 1)[None], box, "lanczos")
    for channel in range(channels):
        crop = Image.fromarray(np.ascontiguousarray(image[10:310, 20:300, channel]))
        theirs = np.asarray(crop.resize((96, 112), Image.Resampling.LANCZOS))
        assert (ours[0, channel].numpy() == theirs).all()


def test_colour_parameters_have_the_distribution_of_their_view():
    view = ViewSpec(
        "a",
        (8, 8),
        hflip=0.5,
        jitter=ColorJitter(0.4, 0.4, 0.2, 0.1, prob=0.8),
        grayscale=0.2,
        blur=Blur(0.3, 0.1, 2.0),
        solarize=0.1,
    )
    params = colour_params(np.random.default_rng(0).random((20_000, UNIFORMS)), view)
    shares = {Param.FLIP: 0.5, Param.JITTER: 0.8, Param.GRAY: 0.2, Param.SOLARIZE: 0.1}
    for param, share in shares.items():
        assert abs(params[:, param].mean() - share) < 0.015
        assert set(np.unique(params[:, param])) == {0.0, 1.0}
    for param, spread in {Param.BRIGHTNESS: 0.4, Param.CONTRAST: 0.4, Param.SATURATION: 0.2}.items():
        assert 1 - spread <= params[:, param].min() < params[:, param].max() <= 1 + spread
        assert abs(params[:, param].mean() - 1) < 0.01
    assert np.abs(params[:, Param.HUE]).max() <= 0.1
    blurred = params[:, Param.SIGMA] > 0
    assert abs(blurred.mean() - 0.3) < 0.015
    assert abs(params[blurred, Param.SIGMA].mean() - 1.05) < 0.03
    counts = np.bincount(params[:, Param.ORDER].astype(int), minlength=24)
    assert len(counts) == len(JITTER_ORDERS) == 24
    assert counts.min() > 20_000 / 24 * 0.8


def test_parameters_do_not_depend_on_each_other():
    view = ViewSpec(
        "a", (8, 8), jitter=ColorJitter(0.4, 0.4, 0.4, 0.1, prob=0.5), grayscale=0.5, blur=Blur(0.5), solarize=0.5
    )
    params = colour_params(np.random.default_rng(0).random((20_000, UNIFORMS)), view)
    correlation = np.corrcoef(params.T) - np.eye(params.shape[1])
    assert np.abs(correlation).max() < 0.03


def test_a_view_without_colours_leaves_the_image_alone():
    params = colour_params(np.random.default_rng(0).random((50, UNIFORMS)), ViewSpec("a", (8, 8), hflip=0.0))
    for param in (Param.FLIP, Param.JITTER, Param.GRAY, Param.SIGMA, Param.SOLARIZE):
        assert (params[:, param] == 0).all()


def test_the_decoded_array_may_be_any_size():
    tiny = torch.full((1, 1, 1, 3), 9, dtype=torch.uint8).permute(0, 3, 1, 2)
    out = torch.empty((1, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(out, tiny, (0, 0, 1, 1), "bicubic")
    assert (out == 9).all()
