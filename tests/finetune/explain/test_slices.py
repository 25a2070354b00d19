"""Slices: a planted weakness comes first, chance does not."""

from __future__ import annotations

import numpy as np

from finetune.data.examples import Example
from finetune.explain.slices import Item, image_traits, sliced, worst_first


def test_a_planted_weakness_is_the_worst_slice():
    rng = np.random.default_rng(0)
    items = []
    for number in range(120):
        dark = number % 3 == 0
        quality = float(rng.random() < (0.3 if dark else 0.9))
        traits = {"brightness": (40.0 if dark else 140.0) + 10 * rng.random(), "source": f"camera {number % 2}"}
        items.append(Item(quality, traits))
    found = worst_first(sliced("image", items, seed=0))
    assert found[0].trait == "brightness" and found[0].value.startswith("lowest third") and found[0].is_worse
    assert not any(one.is_worse for one in found if one.trait == "source")
    assert found == worst_first(sliced("image", items, seed=0))


def test_a_few_wrong_answers_are_no_proof():
    items = [Item(float(i >= 4), {"class": "rare" if i < 4 else "usual"}) for i in range(4)]
    items += [Item(float(i % 4 == 0), {"class": "usual"}) for i in range(60)]
    (rare, _) = worst_first(sliced("image", items, seed=0))
    assert rare.value == "rare" and rare.mean == 0 and not rare.is_worse


def test_traits_that_do_not_vary_and_tiny_slices_are_left_out():
    items = [Item(1.0, {"size": 5.0, "class": "a" if i < 9 else "b", "source": "x"}) for i in range(10)]
    assert sliced("image", items, seed=0) == []


def test_traits_of_an_image_are_what_they_say():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    smooth = np.broadcast_to(np.linspace(0, 255, 32)[:, None, None], (32, 32, 3)).astype(np.uint8)
    sharp = image_traits(Example(0, "ward/cat/a.png", noise, 1), ("dog", "cat"))
    soft = image_traits(Example(0, "b.png", smooth // 2, None), ())
    assert sharp["sharpness"] > 3 * soft["sharpness"] and sharp["brightness"] > soft["brightness"]
    assert sharp["class"] == "cat" and sharp["source"] == "ward" and soft["source"] == "."
