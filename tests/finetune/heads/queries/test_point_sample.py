"""Points are spread evenly, tell masks apart, and gather where a mask is uncertain."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.heads.queries import point_sample


def test_a_value_between_pixel_centers_is_the_mean_of_its_neighbours():
    maps = torch.arange(12.0).view(1, 3, 4)
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [1 / 4, 0.5 / 3], [3.5 / 4, 2 / 3]]])
    torch.testing.assert_close(point_sample.sample(maps, points), torch.tensor([[0.0, 0.5, 9.0]]))
    torch.testing.assert_close(point_sample.sample_together(maps, points[0]), point_sample.sample(maps, points))


def test_a_point_at_the_border_takes_the_value_of_the_border():
    assert point_sample.sample(torch.ones(1, 4, 4), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])).tolist() == [[1.0, 1.0]]


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)))
def test_any_shift_spreads_its_points_over_every_part_of_the_image(shift: tuple[float, float]):
    points = point_sample.spread(torch.tensor(shift), 1024)
    cells = (points * 4).long().clamp(max=3)
    counts = torch.bincount(cells[:, 1] * 4 + cells[:, 0], minlength=16)
    assert (counts - 64).abs().max() <= 10  # of independent points, 8 is the standard deviation


def test_points_continue_where_they_stopped():
    shift = torch.tensor([0.3, 0.9])
    assert torch.equal(point_sample.spread(shift, 10)[6:], point_sample.spread(shift, 4, start=6))


def test_masks_of_one_image_do_not_share_their_points():
    shifts = point_sample.shifts_of_masks(torch.tensor([0.2, 0.4]), 20)
    points = point_sample.spread(shifts, 64).flatten(0, 1)
    assert torch.pdist(points).min() > 1e-5


def test_most_points_lie_on_the_edge_of_a_mask():
    logits = (torch.arange(32.0) - 15.5).expand(1, 32, 32)
    points = point_sample.uncertain_points(logits, torch.tensor([[0.1, 0.7]]), 100)
    assert points.shape == (1, 100, 2)
    near = (points[0, :, 0] - 0.5).abs() < 0.15
    assert near[:75].all() and not near[75:].all()
