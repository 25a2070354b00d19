"""Crops of images with a map: pixel and label stay together, whatever is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.transforms.dense import DenseEval, DenseTrain, nearest, photometric, saturate, scaled_size

PLAIN = DenseTrain(
    crop=(32, 24),
    resize=None,
    scale=(1.0, 1.0),
    hflip=0.0,
    photometric=False,
    cat_max_ratio=1.0,
    void=255,
    fill=(1, 2, 3),
)


def striped(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's colour says its class: blocks of 8 pixels."""
    classes = ((np.arange(height)[:, None] // 8) * 5 + np.arange(width) // 8).astype(np.uint8) % 40
    return np.repeat(classes[..., None], 3, axis=2) * 5, classes


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 1000))
def test_a_crop_without_resizing_is_a_part_of_the_image_with_its_labels(height: int, width: int, seed: int):
    image, target = striped(height, width)
    pixels, labels = replace(PLAIN, hflip=0.5)(image, target, np.random.default_rng(seed))
    assert pixels.shape == (3, 32, 24) and labels.shape == (32, 24)
    known = labels != 255
    assert (pixels[0][known] == labels[known] * 5).all()
    assert known.sum() == min(height, 32) * min(width, 24)
    for channel, value in enumerate(PLAIN.fill):
        assert (pixels[channel][~known] == value).all()


def test_resized_labels_remain_on_their_pixels():
    image, target = striped(64, 80)
    transform = replace(PLAIN, scale=(0.5, 2.0), crop=(40, 40))
    off = []
    for seed in range(20):
        pixels, labels = transform(image, target, np.random.default_rng(seed))
        known = labels != 255
        off.append(((pixels[0].float() - labels * 5).abs()[known] > 2).float().mean().item())
    assert np.mean(off) < 0.4, "only pixels at the edges of the blocks are mixed"
    inner = replace(PLAIN, scale=(2.0, 2.0), crop=(128, 160))(image, target, np.random.default_rng(0))
    centres = [t[..., 8::16, 8::16] for t in inner]
    assert (centres[0][0] == centres[1] * 5).all()


def test_the_scale_is_of_the_shorter_side():
    assert scaled_size((300, 400), 150, 1.0) == (150, 200)
    assert scaled_size((300, 400), 150, 2.0) == (300, 400)
    assert scaled_size((300, 400), None, 0.5) == (150, 200)
    assert scaled_size((1, 400), None, 0.1) == (1, 40)


@given(st.integers(1, 300), st.integers(1, 300))
def test_nearest_pixels_ascend_within_the_side_and_are_all_pixels_when_nothing_is_resized(length: int, resized: int):
    places = nearest(length, resized)
    assert len(places) == resized and places.min() >= 0 and places.max() < length and (np.diff(places) >= 0).all()
    if length == resized:
        assert (places == np.arange(length)).all()


def test_the_nearest_pixel_is_the_one_below_the_centre():
    assert nearest(3, 2).tolist() == [0, 2] and nearest(2, 4).tolist() == [0, 0, 1, 1]


def test_reduced_images_are_averaged():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 200
    assert (DenseEval(16)(stripes)[:, 4:-4, 4:-4].int() - 50).abs().max() <= 3


def test_a_crop_of_one_class_and_void_is_not_accepted():
    target = np.full((100, 100), 255, np.uint8)  # void, but for a corner with a class, and one with two
    target[:30, :30] = 3
    target[70:, 70:], target[70:, 85:] = 4, 5
    transform = replace(PLAIN, crop=(30, 30), cat_max_ratio=0.9)
    seen = [transform(np.zeros((100, 100, 3), np.uint8), target, np.random.default_rng(s))[1] for s in range(150)]
    two = np.mean([len(set(crop.unique().tolist()) - {255}) == 2 for crop in seen])
    assert two > 0.45, "ten tries, each with a chance of 1 in 10 to see both"


def test_a_crop_that_one_class_fills_is_drawn_again():
    target = np.zeros((100, 100), np.uint8)
    target[:, 80:] = 1
    image = np.zeros((100, 100, 3), np.uint8)
    transform = replace(PLAIN, crop=(20, 20), cat_max_ratio=0.75)

    def shares(ratio: float) -> list[float]:
        made = replace(transform, cat_max_ratio=ratio)
        labels = [made(image, target, np.random.default_rng(seed))[1] for seed in range(60)]
        return [(found == 0).float().mean().item() for found in labels]

    capped, blind = (sum(share < 0.75 for share in shares(ratio)) for ratio in (0.75, 1.0))
    assert capped > 3 * blind


def test_depth_is_divided_by_the_factor_it_was_enlarged_by():
    depth = np.full((20, 30), 4.0, np.float32)
    transform = replace(PLAIN, scale=(2.0, 2.0), crop=(60, 60), void=0, scale_values=True)
    labels = transform(np.zeros((20, 30, 3), np.uint8), depth, np.random.default_rng(0))[1]
    assert labels.dtype == torch.float32 and set(labels.unique().tolist()) == {0.0, 2.0}


def test_one_generator_gives_one_crop_and_another_gives_another():
    image, target = striped(90, 90)
    transform = replace(PLAIN, scale=(0.5, 2.0), hflip=0.5, photometric=True, cat_max_ratio=0.75)
    first, again, other = (transform(image, target, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first[0].equal(again[0]) and first[1].equal(again[1])
    assert not first[0].equal(other[0])


def test_colour_changes_occur_and_stay_in_range():
    pixels = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    changed = [photometric(pixels, np.random.default_rng(i)) for i in range(20)]
    assert all(c.dtype == torch.uint8 and c.shape == pixels.shape for c in changed)
    assert 10 <= sum(not c.equal(pixels) for c in changed) < 20


def test_hue_changes_by_up_to_a_tenth_as_18_of_opencvs_180():
    import colorsys

    red = torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None]
    hues = [colorsys.rgb_to_hsv(*photometric(red, np.random.default_rng(i)).flatten().tolist())[0] for i in range(400)]
    turned = [(hue + 0.5) % 1 - 0.5 for hue in hues]
    assert 0.09 < max(turned) < 0.115 and -0.115 < min(turned) < -0.09


@given(st.floats(0, 1.5), st.integers(0, 100))
def test_saturation_keeps_hue_and_value_as_hsv_does(factor: float, seed: int):
    import colorsys

    colour = np.random.default_rng(seed).uniform(0, 255, 3)
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
    found = saturate(torch.tensor(colour, dtype=torch.float32)[:, None, None], factor).flatten().tolist()
    assert found == pytest.approx(expected, abs=1e-2)


def test_evaluation_uses_the_complete_image():
    image, _ = striped(40, 64)
    assert (DenseEval(None)(image).permute(1, 2, 0).numpy() == image).all()
    assert DenseEval(20)(image).shape == (3, 20, 32)
