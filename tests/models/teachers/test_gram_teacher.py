from __future__ import annotations

import pytest
import torch

from pretrain.models.teachers.gram_teacher import compared, gram_loss, similarities, to_grid


def test_it_is_zero_for_features_that_are_rotated_and_rescaled():
    """Only similarities within an image are held; the features themselves are free."""
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert gram_loss(teacher @ rotation * torch.rand(2, 6, 1).add(0.1), teacher) < 1e-12
    assert gram_loss(torch.randn(2, 6, 8), teacher) > 1e-2


def test_it_is_the_mean_squared_difference_of_cosines():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    teacher = torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
    assert gram_loss(student, teacher).item() == pytest.approx((0 + 1 + 1 + 0) / 4)


def test_the_teacher_gets_no_gradient_and_the_student_follows_it():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 8, requires_grad=True)
    before = gram_loss(student, teacher)
    before.backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert gram_loss(student - student.grad, teacher) < before


def test_negative_similarities_and_lengths_count_as_the_options_say():
    student = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 3.0], [0.0, 3.0]]])
    for options, off_diagonal, diagonal in (
        ({}, (1 + 1) ** 2, 0),
        ({"negatives": "zero"}, (0 - 1) ** 2, 0),
        ({"normalize": False}, (-2 - 9) ** 2, ((1 - 9) ** 2 + (4 - 9) ** 2) / 2),
    ):
        expected = (off_diagonal + diagonal) / 2
        assert gram_loss(student, teacher, **options).item() == pytest.approx(expected)
    assert gram_loss(teacher, student, negatives="zero_teacher").item() == pytest.approx(1 / 2)


def test_patches_are_compared_within_an_image_or_in_the_whole_batch():
    patches, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, False], [False, False, True]])
    assert compared(patches, mask, level="image", tokens="all") is patches
    assert compared(patches, mask, level="batch", tokens="all").shape == (1, 6, 4)
    assert torch.equal(compared(patches, mask, level="batch", tokens="masked")[0], patches[mask])
    assert compared(patches, mask, level="batch", tokens="unmasked").shape == (1, 4, 4)
    assert gram_loss(patches[:1, :0], patches[:1, :0]) == 0, "no patch is masked"


def test_widths_may_differ():
    assert gram_loss(torch.randn(1, 4, 8), torch.randn(1, 4, 5)).isfinite()


def test_it_is_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    features, other = torch.randn(1, 9, 16), torch.randn(1, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = gram_loss(features, other)
    assert torch.equal(low, gram_loss(features, other))


def test_a_ramp_over_the_grid_stays_a_ramp_when_resampled():
    rows = torch.arange(8.0)[:, None].expand(8, 12)
    features = torch.stack([rows, torch.ones(8, 12)], dim=-1).reshape(1, 96, 2)
    small = to_grid(features, (8, 12), (4, 6)).unflatten(1, (4, 6))
    torch.testing.assert_close(small[0, 1:3, :, 0], torch.tensor([2.5, 4.5])[:, None].expand(2, 6))
    torch.testing.assert_close(small[..., 1], torch.ones(1, 4, 6))
    assert torch.equal(to_grid(features, (8, 12), (8, 12)), features)


def test_similarities_of_a_patch_with_itself_are_one():
    table = similarities(torch.randn(2, 5, 3))
    torch.testing.assert_close(table.diagonal(dim1=1, dim2=2), torch.ones(2, 5))
