from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.examples import Example
from finetune.data.transforms.images import EvalTransform, TrainTransform, jitter

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
EXAMPLE = Example("a", "a", PIXELS, 3)


def train(**options):
    return TrainTransform((16, 24), MEAN, STD, **options)


def drawn(transform, seed=0):
    return transform(EXAMPLE, np.random.default_rng(seed))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1 << 30), st.booleans(), st.integers(0, 4), st.sampled_from([0.0, 1.0]), st.sampled_from([0, 0.4])
)
def test_every_setting_returns_an_image_and_its_label(seed, whole, operations, erase, color_jitter):
    transform = train(whole=whole, operations=operations, erase=erase, color_jitter=color_jitter)
    first, again = drawn(transform, seed), drawn(transform, seed)
    assert first["image"].shape == (3, 16, 24)
    assert first["image"].dtype == (torch.float32 if erase else torch.uint8)
    assert first["label"].item() == 3
    assert first["image"].equal(again["image"])


def test_disabling_a_setting_changes_no_other_random_number():
    plain, flipped = drawn(train(hflip=0.0)), drawn(train(hflip=1.0))
    assert plain["image"].flip(2).equal(flipped["image"])
    erased = drawn(train(hflip=0.0, erase=1.0))
    kept = (erased["image"] == plain["image"]).all(0)
    assert 0.5 < kept.float().mean() < 0.99


def test_images_are_flipped_with_the_given_probability():
    plain, turned = drawn(train(hflip=0.0)), drawn(train(hflip=0.0, vflip=1.0))
    assert plain["image"].flip(1).equal(turned["image"])
    both = [drawn(train(hflip=0.5, vflip=0.5, whole=True), seed)["image"] for seed in range(40)]
    assert len({image.numpy().tobytes() for image in both}) == 4, "one mirror says nothing of the other"


def test_the_crop_is_the_complete_image_or_a_random_part():
    whole, parts = train(whole=True, hflip=0.0), train(scale=(0.2, 0.3), hflip=0.0)
    seen = [{drawn(transform, seed)["image"].numpy().tobytes() for seed in range(5)} for transform in (whole, parts)]
    assert [len(images) for images in seen] == [1, 5]


def test_an_erased_rectangle_is_standard_normal_noise():
    transform = TrainTransform((64, 64), MEAN, STD, erase=1.0, erase_area=(0.3, 0.33), whole=True, hflip=0.0)
    flat = Example("a", "a", np.zeros((64, 64, 3), np.uint8), 0)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    values = []
    for seed in range(8):
        image = transform(flat, np.random.default_rng(seed))["image"]
        image = (image / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        hidden = (image - black.view(3, 1, 1)).abs().amax(0) > 1e-6
        rows, columns = hidden.any(1), hidden.any(0)
        assert hidden[rows][:, columns].all()
        assert 0.28 < hidden.float().mean() < 0.35
        values.append(image[:, hidden])
    noise = torch.cat(values, 1)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_erasing_has_the_given_probability():
    transform = train(erase=0.25, hflip=0.0, whole=True)
    plain = drawn(train(erase=1e-9, hflip=0.0, whole=True))["image"]
    changed = sum(not drawn(transform, seed)["image"].equal(plain) for seed in range(400))
    assert 70 < changed < 130


def test_evaluation_crops_the_centre_of_a_resized_image():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 100:] = 255
    out = EvalTransform((28, 28))(Example("a", "a", image, 1))
    assert out["image"].shape == (3, 28, 28)
    assert out["image"][:, :, :13].max() == 0 and out["image"][:, :, 15:].min() == 255
    assert out["original_size"].tolist() == [100, 200]
    tall = EvalTransform((28, 28))(Example("a", "a", image.transpose(1, 0, 2).copy(), 1))
    assert tall["image"].equal(out["image"].transpose(1, 2)), "no side is squeezed, both are cut in the middle"
    whole = EvalTransform((28, 28), whole=True)(Example("a", "a", image, None))
    assert whole["image"][:, :, 14:].float().mean() > 250 and whole["label"].item() == -1


def test_evaluation_describes_its_preparation():
    assert EvalTransform((224, 224)).in_words() == "images: shorter side 256 px (bicubic), central 224 x 224 px"
    assert EvalTransform((96, 128), whole=True).in_words() == "images resized to 96 x 128 px (bicubic)"


def test_jitter_of_strength_0_changes_nothing_and_gray_stays_gray():
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert jitter(image, 0.0, (0.9, 0.1, 0.7)).equal(image)
    flat = jitter(image, 1.0, (0.5, 0.0, 0.5))
    assert flat.flatten(1).float().std(1).max() <= 0.5, "no contrast: the mean everywhere"
    gray = image[:1].expand(3, -1, -1)
    changed = jitter(gray, 0.4, (0.5, 0.5, 1.0)).float()
    assert (changed - gray.float()).abs().max() <= 1
