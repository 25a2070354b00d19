import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.views import augment
from pretrain.data.views.crops import UNIFORMS, colour_params
from pretrain.data.views.specs import JITTER_ORDERS, NUM_PARAMS, Blur, ColorJitter, Noise, Param, ViewSpec

MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
RICH = ViewSpec(
    "crops", (48, 40), jitter=ColorJitter(0.4, 0.4, 0.2, 0.1, prob=0.8), grayscale=0.2, blur=Blur(0.5), solarize=0.2
)


def images(
    batch: int = 6, n: int = 2, channels: int = 3, size: tuple[int, int] = (48, 40), seed: int = 0
) -> torch.Tensor:
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (batch, n, channels, *size))
    flat = random.integers(0, 256, (batch, n, channels, 1, 1))
    half = np.where(np.arange(size[1]) < size[1] // 2, noise, flat)  # flat areas: equal channels, zero chroma
    half[..., :4, :] = half[..., :1, :4, :]
    return torch.from_numpy(half.astype(np.uint8))


def parameters(batch: int = 6, n: int = 2, view: ViewSpec = RICH, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(colour_params(np.random.default_rng(seed).random((batch, n, UNIFORMS)), view))


def plain(batch: int = 6, n: int = 2, **changes: float) -> torch.Tensor:
    params = torch.zeros((batch, n, NUM_PARAMS))
    params[..., [Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION]] = 1.0
    for name, value in changes.items():
        params[..., Param[name]] = value
    return params


def torchvision_view(image: torch.Tensor, numbers: list[float]) -> torch.Tensor:
    """One image [C, H, W] in [0, 1] through torchvision's tensor functions; the blur kernel holds every tail."""
    if numbers[Param.FLIP]:
        image = v2.horizontal_flip(image)
    if numbers[Param.JITTER]:
        for op in JITTER_ORDERS[int(numbers[Param.ORDER])]:
            adjust = {
                Param.BRIGHTNESS: v2.adjust_brightness,
                Param.CONTRAST: v2.adjust_contrast,
                Param.SATURATION: v2.adjust_saturation,
                Param.HUE: v2.adjust_hue,
            }[op]
            image = adjust(image, numbers[op])
    if numbers[Param.GRAY]:
        image = v2.rgb_to_grayscale(image, num_output_channels=3)
    if numbers[Param.SIGMA]:
        image = v2.gaussian_blur(image, [31, 31], [numbers[Param.SIGMA]] * 2)
    if numbers[Param.SOLARIZE]:
        image = v2.solarize(image, 128 / 255)
    return image


def test_every_image_equals_torchvision_with_its_own_parameters():
    # Solarize is discontinuous: the blur's missing tail may move a value over its threshold. It has its own test.
    view = ViewSpec("crops", (48, 40), jitter=RICH.jitter, grayscale=0.2, blur=Blur(0.5))
    pixels, params = images(24, 4), parameters(24, 4, view)
    ours = augment.augment(pixels, params, ZERO, ONE, sigma_max=2.0)
    for b in range(24):
        for n in range(4):
            theirs = torchvision_view(pixels[b, n].float() / 255, params[b, n].tolist())
            tolerance = 1e-3 if params[b, n, Param.SIGMA] else 1e-5
            assert (ours[b, n] - theirs).abs().max() < tolerance, params[b, n]


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.01, 2.0])
def test_the_blur_is_a_gaussian_to_a_thousandth(sigma):
    pixels = images(2)
    ours = augment.augment(pixels, plain(2, SIGMA=sigma), ZERO, ONE, sigma_max=2.0)
    theirs = v2.gaussian_blur(pixels.float() / 255, [31, 31], [sigma, sigma])
    assert (ours - theirs).abs().max() < 1e-3


def test_the_convolution_of_a_gpu_blurs_as_the_shifts_of_a_cpu_do():
    x = images(3)[:, 0].float() / 255
    sigma = torch.tensor([0.3, 1.0, 2.0]).view(3, 1, 1, 1)
    assert (augment.blur_by_convolution(x, sigma, 7) - augment.blur_by_shifts(x, sigma, 7)).abs().max() < 1e-6


@pytest.mark.parametrize("hue", [-0.5, -0.3, -0.01, 0.01, 0.25, 0.5])
def test_hue_is_shifted_as_torchvision_does_on_every_kind_of_colour(hue):
    levels = torch.tensor([0, 1, 60, 127, 128, 254, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 1, 3, 7, 49)
    ours = augment.augment(colours, plain(1, 1, JITTER=1, HUE=hue), ZERO, ONE, sigma_max=0.0)
    assert (ours - v2.adjust_hue(colours.float() / 255, hue)).abs().max() < 1e-5


def test_solarize_inverts_from_128_on():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 1, 3, 16, 16)
    ours = augment.augment(pixels, plain(1, 1, SOLARIZE=1), ZERO, ONE, sigma_max=0.0) * 255
    theirs = ImageOps.solarize(Image.fromarray(pixels[0, 0, 0].numpy()))
    assert (ours[0, 0, 0].round().numpy() == np.asarray(theirs)).all()


def test_normalize_is_torchvisions():
    pixels = images()
    ours = augment.augment(pixels, plain(), MEAN, STD, sigma_max=0.0)
    assert (ours - v2.normalize(pixels.float() / 255, list(MEAN), list(STD))).abs().max() < 1e-6


def test_an_image_does_not_depend_on_its_company():
    pixels, params = images(8, 3), parameters(8, 3)
    together = augment.augment(pixels, params, MEAN, STD, sigma_max=2.0)
    alone = [augment.augment(pixels[b : b + 1], params[b : b + 1], MEAN, STD, sigma_max=2.0) for b in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_a_batch_equals_its_images_one_by_one(monkeypatch):
    pixels, params = images(8, 3), parameters(8, 3)
    one_by_one = augment.augment(pixels, params, MEAN, STD, sigma_max=2.0)
    monkeypatch.setattr(augment, "_one_by_one", augment._together)
    assert (augment.augment(pixels, params, MEAN, STD, sigma_max=2.0) - one_by_one).abs().max() < 1e-5


def test_the_host_batch_is_not_changed():
    pixels, params = images(), parameters()
    before = pixels.clone(), params.clone()
    augment.augment(pixels, params, MEAN, STD, sigma_max=2.0)
    assert torch.equal(pixels, before[0])
    assert torch.equal(params, before[1])


def test_channels_last_memory_gives_the_same():
    pixels, params = images(), parameters()
    last = pixels.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    ours = augment.augment(last, params, MEAN, STD, sigma_max=2.0)
    assert ours.is_contiguous()
    assert torch.equal(ours, augment.augment(pixels, params, MEAN, STD, sigma_max=2.0))


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_channels_have_flip_brightness_contrast_blur_and_solarize(channels):
    view = ViewSpec("crops", (48, 40), jitter=ColorJitter(0.4, 0.4), blur=Blur(1.0), solarize=0.5)
    batch = {
        "position": torch.arange(4),
        "crops": images(4, channels=channels),
        "crops.params": parameters(4, view=view),
    }
    made = augment.apply([view], batch, [0.5] * channels, [0.2] * channels, "cpu")["crops"]
    assert made.shape == (4, 2, channels, 48, 40)
    assert made.isfinite().all()


@pytest.mark.parametrize(
    ("view", "named"),
    [
        (ViewSpec("v", (8, 8), grayscale=0.1), "grayscale"),
        (ViewSpec("v", (8, 8), jitter=ColorJitter(saturation=0.1)), "saturation"),
        (ViewSpec("v", (8, 8), jitter=ColorJitter(hue=0.1)), "hue"),
    ],
)
def test_colour_operations_that_need_rgb_are_refused_for_other_channels(view, named):
    batch = {"position": torch.arange(2), "v": images(2, channels=4, size=(8, 8)), "v.params": plain(2)}
    with pytest.raises(ValueError, match=rf"'v'.*{named}.*have 4"):
        augment.apply([view], batch, [0.5] * 4, [0.2] * 4, "cpu")


def test_a_mean_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"mean has 3 .* 1 channels"):
        augment.augment(images(channels=1), plain(), MEAN, STD, sigma_max=0.0)


def test_apply_moves_noises_and_positions_and_keeps_views_augmented_by_a_worker():
    floats = torch.randn(2, 1, 3, 8, 8)
    batch = {"position": torch.arange(2), "v": floats, "mask": torch.rand(2, 4), "bad": []}
    made = augment.apply([ViewSpec("v", (8, 8)), Noise("mask", (4,))], batch, MEAN, STD, "cpu")
    assert set(made) == {"position", "v", "mask"}
    assert torch.equal(made["v"], floats)


def pil_view(image: Image.Image, numbers: list[float]) -> Image.Image:
    """The same on uint8 PIL images, as the official DINO code does it."""
    if numbers[Param.FLIP]:
        image = v1.hflip(image)
    if numbers[Param.JITTER]:
        for op in JITTER_ORDERS[int(numbers[Param.ORDER])]:
            adjust = {
                Param.BRIGHTNESS: v1.adjust_brightness,
                Param.CONTRAST: v1.adjust_contrast,
                Param.SATURATION: v1.adjust_saturation,
                Param.HUE: v1.adjust_hue,
            }[op]
            image = adjust(image, numbers[op])
    if numbers[Param.GRAY]:
        image = v1.rgb_to_grayscale(image, num_output_channels=3)
    if numbers[Param.SIGMA]:
        image = image.filter(ImageFilter.GaussianBlur(numbers[Param.SIGMA]))
    return image


@pytest.mark.parametrize(
    ("view", "mean", "most"),
    [
        (ViewSpec("v", (96, 96), jitter=RICH.jitter, grayscale=0.2), 1.5, 20),
        (ViewSpec("v", (96, 96), blur=Blur(1.0)), 0.6, 8),
    ],
)
def test_an_image_is_close_to_the_official_pil_pipeline_that_rounds_after_every_step(view, mean, most):
    y, x = np.mgrid[:96, :96]
    waves = [110 + 60 * np.sin(x / 9), 100 + 50 * np.cos(y / 11 + x / 23), 140 - x / 2 + 30 * np.sin(y / 7)]
    base = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 4, (96, 96, 3))
    pixels = torch.from_numpy(base.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    params = parameters(64, 1, view)
    ours = augment.augment(pixels.expand(64, 1, 3, 96, 96), params, ZERO, ONE, sigma_max=2.0) * 255
    differences = []
    for made, numbers in zip(ours[:, 0], params[:, 0].tolist(), strict=True):
        theirs = pil_view(Image.fromarray(pixels.permute(1, 2, 0).numpy()), numbers)
        differences.append(np.abs(made.permute(1, 2, 0).numpy() - np.asarray(theirs)))
    assert np.mean(differences) < mean
    assert np.max(differences) < most
