import subprocess
import sys

import pytest

from pretrain.data.views.masks import MultiBlockMask
from pretrain.data.views.specs import (
    JITTER_ORDERS,
    NUM_PARAMS,
    Blur,
    ColorJitter,
    Noise,
    ViewSpec,
    check_channels,
    stacks,
)


def test_views_of_one_name_are_stacked_in_list_order():
    first, second, local = ViewSpec("g", (8, 8)), ViewSpec("g", (8, 8), solarize=0.2), ViewSpec("l", (4, 4), count=8)
    entries = stacks([first, Noise("mask", (4,)), local, second])
    assert entries == {"g": [(0, first), (3, second)], "l": [(2, local)]}


def test_a_view_that_is_the_same_as_another_takes_its_place_in_the_list_and_its_crops():
    source = ViewSpec("a", (8, 8), scale=(0.2, 0.5), count=2, hflip=0.1)
    again = ViewSpec("b", (4, 4), interpolation="lanczos", normalize=False, same_as="a")
    ((index, seen),) = stacks([Noise("n", (1,)), source, again])["b"]
    assert index == 1
    assert (seen.scale, seen.count, seen.hflip) == (source.scale, 2, 0.1)
    assert (seen.name, seen.size, seen.interpolation, seen.normalize) == ("b", (4, 4), "lanczos", False)


def test_a_view_of_a_stacked_name_repeats_the_stack_and_can_leave_its_colours_out():
    colour = {"jitter": ColorJitter(0.4), "grayscale": 0.2}
    first, second = (
        ViewSpec("g", (8, 8), hflip=0.3, **colour),
        ViewSpec("g", (8, 8), blur=Blur(1.0), solarize=0.2, **colour),
    )
    entries = stacks(
        [first, second, ViewSpec("big", (16, 16), same_as="g"), ViewSpec("plain", (16, 16), same_as="g", colours=False)]
    )
    assert [(i, v.size, v.jitter, v.blur) for i, v in entries["big"]] == [
        (0, (16, 16), first.jitter, None),
        (1, (16, 16), first.jitter, second.blur),
    ]
    for (index, view), source in zip(entries["plain"], (first, second), strict=True):
        assert (index, view.scale, view.hflip) == (entries["g"].index((index, source)), source.scale, source.hflip)
        assert (view.jitter, view.grayscale, view.blur, view.solarize) == (None, 0.0, None, 0.0)


def test_the_jitter_orders_are_all_orders_of_four_operations():
    assert len(set(JITTER_ORDERS)) == 24
    assert NUM_PARAMS == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViewSpec("v", (0, 8)), "size"),
        (lambda: ViewSpec("v", (8, 8), scale=(0.5, 0.2)), "scale"),
        (lambda: ViewSpec("v", (8, 8), scale=(0.0, 1.0)), "scale"),
        (lambda: ViewSpec("v", (8, 8), scale=(0.5, 1.5)), "scale"),
        (lambda: ViewSpec("v", (8, 8), ratio=(2.0, 1.0)), "ratio"),
        (lambda: ViewSpec("v", (8, 8), interpolation="nearest"), "interpolation .* 'nearest'"),
        (lambda: ViewSpec("v", (8, 8), count=0), "count"),
        (lambda: ViewSpec("v", (8, 8), hflip=1.5), "hflip .* 1.5"),
        (lambda: ViewSpec("v", (8, 8), grayscale=-0.1), "grayscale"),
        (lambda: ViewSpec("bad", (8, 8)), "bad"),
        (lambda: ViewSpec("a.b", (8, 8)), "identifier"),
        (lambda: ColorJitter(hue=0.6), "hue .* 0.6"),
        (lambda: ColorJitter(prob=2.0), "prob"),
        (lambda: ColorJitter(contrast=-1.0), "contrast"),
        (lambda: Blur(0.5, 0.0), "sigma"),
        (lambda: Blur(0.5, 2.0, 1.0), "sigma"),
        (lambda: Noise("position", (1,)), "position"),
        (lambda: Noise("n", (0,)), "shape"),
        (lambda: stacks([ViewSpec("v", (8, 8)), ViewSpec("v", (9, 8))]), "differ in size"),
        (lambda: stacks([ViewSpec("v", (8, 8)), ViewSpec("v", (8, 8), normalize=False)]), "differ in normalize"),
        (lambda: stacks([ViewSpec("v", (8, 8)), Noise("v", (1,))]), "twice"),
        (lambda: stacks([ViewSpec("v", (8, 8)), MultiBlockMask("v", (9, 9)), Noise("v_context", (1,))]), "twice"),
        (lambda: ViewSpec("w", (8, 8), same_as="v", hflip=0.0), "hflip come from view 'v'"),
        (lambda: ViewSpec("w", (8, 8), colours=False), "colours=False needs same_as"),
        (lambda: stacks([ViewSpec("w", (8, 8), same_as="v")]), "same_as 'v' must name a view without"),
        (lambda: stacks([ViewSpec("w", (8, 8), same_as="w")]), "same_as 'w' must name a view without"),
        (lambda: check_channels([ViewSpec("v", (8, 8), grayscale=0.5)], 1), "grayscale need"),
    ],
)
def test_impossible_views_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.processes
def test_view_specifications_do_not_import_torch():
    code = "import sys, pretrain.data.views.specs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
