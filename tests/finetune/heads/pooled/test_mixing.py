from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from finetune.heads.pooled.mixing import UNIFORMS, ImageMixer, smoothed, soft_cross_entropy

CLASSES = 5
LABELS = torch.tensor([0, 3, 2, 2, 4, 1])


def constant_images(size=16):
    """Image i is i everywhere."""
    return torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, size, size).contiguous()


def uniforms(seed, rows=1):
    return torch.rand(rows, UNIFORMS, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9999), st.sampled_from(["batch", "pair"]), st.sampled_from([0.0, 0.8]), st.sampled_from([0.0, 1.0])
)
def test_the_share_of_a_class_in_the_target_is_the_share_of_its_image_in_the_mixture(seed, mode, mixup, cutmix):
    mixer = ImageMixer(CLASSES, mixup=mixup, cutmix=cutmix, mode=mode)
    mixed, targets = mixer(constant_images(), LABELS, uniforms(seed, 6 if mode == "pair" else 1))
    partner = [1, 0, 3, 2, 5, 4]
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    for i in range(6):
        own = (mixed[i].mean() - partner[i]) / (i - partner[i])  # two constants: the mean tells the share
        expected = own * F.one_hot(LABELS[i], CLASSES) + (1 - own) * F.one_hot(LABELS[partner[i]], CLASSES)
        torch.testing.assert_close(targets[i], expected, atol=1e-5, rtol=0)


def test_cutmix_swaps_one_rectangle_and_mixup_blends_everywhere():
    cut, _ = ImageMixer(CLASSES, cutmix=1.0)(constant_images(32), LABELS, torch.tensor([[0, 0, 0.4, 0.5, 0.5, 0]]))
    swapped = cut[0, 0] == 1
    rows, columns = swapped.any(1), swapped.any(0)
    assert swapped[rows][:, columns].all() and 0.5 < swapped.float().mean() < 0.7
    assert ((cut[0] == 0) | (cut[0] == 1)).all()
    blend, _ = ImageMixer(CLASSES, mixup=0.8)(constant_images(), LABELS, torch.tensor([[0, 0, 0.4, 0.5, 0.5, 0]]))
    assert blend[0].unique().numel() == 1 and 0 < blend[0].mean() < 1


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_the_shares_are_those_of_the_beta_distribution(alpha):
    mixer = ImageMixer(CLASSES, mixup=alpha)
    found = mixer.mixup_quantiles
    assert abs(found.mean() - 0.5) < 1e-3
    assert abs(found.var() - 1 / (4 * (2 * alpha + 1))) < 1e-3


def test_a_pair_is_mixed_the_same_however_the_batch_is_divided():
    mixer, images, drawn = ImageMixer(CLASSES, mixup=0.8, cutmix=1.0, mode="pair"), constant_images(), uniforms(3, 6)
    whole, targets = mixer(images, LABELS, drawn)
    parts = [mixer(images[at : at + 2], LABELS[at : at + 2], drawn[at : at + 2]) for at in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat([images for images, _ in parts]), rtol=0, atol=0)
    torch.testing.assert_close(targets, torch.cat([targets for _, targets in parts]), rtol=0, atol=0)
    drawn[1::2] = uniforms(4, 3)  # both members of a pair are mixed by the numbers of the first
    assert mixer(images, LABELS, drawn)[1].equal(targets)


def test_mixing_has_the_given_probability():
    mixer = ImageMixer(CLASSES, mixup=0.8, prob=0.3)
    changed = sum(not mixer(constant_images(), LABELS, uniforms(s))[0].equal(constant_images()) for s in range(300))
    assert 60 < changed < 120


def test_smoothing_mixing_and_loss_are_timms():
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    plain = soft_cross_entropy(logits, smoothed(LABELS, CLASSES, 0.1))
    torch.testing.assert_close(plain, LabelSmoothingCrossEntropy(0.1)(logits, LABELS))
    targets = mixup_target(LABELS, CLASSES, 0.3, 0.1)  # of an image with the one as far from the other end
    ours = 0.3 * smoothed(LABELS, CLASSES, 0.1) + 0.7 * smoothed(LABELS.flip(0), CLASSES, 0.1)
    torch.testing.assert_close(ours, targets)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))


def test_an_odd_batch_has_an_image_without_partner():
    with pytest.raises(ValueError, match="a micro-batch of 3 leaves one without partner"):
        ImageMixer(CLASSES, mixup=0.8)(constant_images()[:3], LABELS[:3], uniforms(0))
    images, _ = ImageMixer(CLASSES)(constant_images()[:3], LABELS[:3], uniforms(0))
    assert images.equal(constant_images()[:3])
