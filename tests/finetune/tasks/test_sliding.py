"""Inference in windows and over scales, against what it must equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finetune.tasks.sliding import most_likely, over_scales, slide
from pretrain.core.images import window_starts


def pixelwise(images: Tensor) -> Tensor:
    """Knows nothing of a pixel's surroundings."""
    return torch.cat([images, images[:, :1] - images[:, 1:2]], dim=1)


def of_the_window(images: Tensor) -> Tensor:
    """Every pixel says the mean of its window."""
    return images.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *images.shape[2:])


@given(st.integers(1, 200), st.integers(1, 64), st.data())
def test_windows_cover_a_side_and_stay_on_it(length: int, window: int, data: st.DataObject):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    covered = {i for start in starts for i in range(start, min(start + window, length))}
    assert covered == set(range(length))
    assert all(start + window <= length for start in starts) or starts == [0]
    assert len(set(starts)) == len(starts)


def test_one_window_of_the_image_size_is_the_complete_image():
    image = torch.randn(1, 3, 24, 32)
    whole = of_the_window(image)[0]
    torch.testing.assert_close(slide(of_the_window, image, window=(24, 32), stride=(24, 32)), whole)
    torch.testing.assert_close(slide(of_the_window, image, window=(99, 99), stride=(50, 50)), whole)


def test_windows_do_not_change_a_pixelwise_model():
    image = torch.randn(1, 3, 37, 50)
    torch.testing.assert_close(slide(pixelwise, image, window=(16, 16), stride=(10, 7)), pixelwise(image)[0])


def test_overlapping_windows_are_averaged():
    image = torch.arange(6.0).reshape(1, 1, 1, 6)
    found = slide(of_the_window, image, window=(1, 4), stride=(1, 2))
    assert found.flatten().tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]


def test_a_coarse_output_is_resized_to_its_window():
    image = torch.randn(1, 3, 32, 32)
    found = slide(lambda x: F.avg_pool2d(x, 16), image, window=(32, 32), stride=(32, 32))
    torch.testing.assert_close(found, F.interpolate(F.avg_pool2d(image, 16), (32, 32), mode="bilinear")[0])


def test_a_stride_that_skips_pixels_is_refused():
    with pytest.raises(ValueError, match="stride of 17"):
        window_starts(100, 16, 17)


def test_one_scale_without_a_mirror_is_the_output_itself():
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(
        over_scales(lambda x: pixelwise(x)[0], image, scales=[1.0], flip=False, probabilities=True), pixelwise(image)[0]
    )


def test_predictions_of_a_mirrored_image_are_mirrored_back():
    image = torch.randn(1, 3, 8, 8)
    found = over_scales(lambda x: pixelwise(x)[0], image, scales=[1.0], flip=True, probabilities=True)
    torch.testing.assert_close(found, pixelwise(image)[0].softmax(0))


def test_a_constant_model_stays_constant_over_scales_and_windows():
    def constant(x: Tensor) -> Tensor:
        return torch.tensor([1.0, 3.0, 2.0])[None, :, None, None].expand(len(x), -1, 5, 5)

    image = torch.randn(1, 3, 40, 56)
    found = over_scales(
        lambda x: slide(constant, x, window=(16, 16), stride=(11, 11)),
        image,
        scales=[0.5, 1.0, 1.75],
        flip=True,
        probabilities=True,
    )
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0, 2.0]).softmax(0)[:, None, None].expand(3, 40, 56))
    assert (most_likely(found, (81, 99)) == 1).all()


def test_the_most_likely_class_does_not_depend_on_how_many_are_resized_at_a_time():
    scores = torch.randn(40, 9, 11)
    expected = F.interpolate(scores[None], (20, 30), mode="bilinear", align_corners=False)[0].argmax(0)
    assert most_likely(scores, (20, 30)).equal(expected)
