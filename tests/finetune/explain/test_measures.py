"""Numbers about maps, on maps whose numbers are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.explain import measures, sanity
from finetune.explain.maps import METHODS
from finetune.explain.subjects import Aim, ClassifierSubject
from pretrain.models.backbones.vit import ViT
from tests.finetune.explain.planted import shortcut_task
from tests.finetune.explain.test_maps import HALF, IMAGES, OneCell, OpenedBackbone, aims_of, classifier, vit


def one_cell() -> OneCell:
    return OneCell(OpenedBackbone(vit(), HALF, HALF, "one cell"))


def test_the_true_map_has_the_largest_gap():
    subject, aims = one_cell(), [Aim("")] * 2
    images = IMAGES.clone()
    images[:, :, 8:16, 16:24] += 2
    true = torch.zeros(2, 4, 4)
    true[:, 1, 2] = 1
    deleted, inserted = measures.faithfulness(subject, images, aims, true)
    worst = measures.faithfulness(subject, images, aims, -true)
    scores = subject.scores(images, aims), subject.scores(subject.substrate(images), aims)
    # 16 steps of a cell; the first changes everything: the area is that of the other score but for half a step
    torch.testing.assert_close(deleted, scores[1] + (scores[0] - scores[1]) / 32)
    torch.testing.assert_close(inserted, scores[0] - (scores[0] - scores[1]) / 32)
    assert (deleted < worst[0]).all() and (inserted > worst[1]).all()


def test_pointing_and_mass_of_a_region():
    maps = torch.tensor([[[0.0, 3.0], [1.0, -5.0]]]).expand(3, 2, 2)
    right, lower = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    right[:, 4:], lower[4:, :2] = True, True
    regions = [right, lower, None]
    assert measures.pointing(maps, regions)[:2] == [1.0, 0.0] and np.isnan(measures.pointing(maps, regions)[2])
    found = measures.mass(maps, regions)
    assert found[:2] == [0.75, 0.125] and np.isnan(found[2])  # half of the cell with 1 of 4
    assert measures.shares(regions)[:2] == [0.5, 0.125]


def test_the_interval_contains_the_mean_and_does_not_depend_on_missing_values():
    values = [0.1, 0.4, 0.35, 0.8]
    found = measures.mean_of(values, seed=3)
    assert found.low < found.value < found.high and found == measures.mean_of([*values, np.nan], seed=3)
    assert found.count == 4 and measures.mean_of([], seed=0).count == 0


def _maps(name: str, images: Tensor):
    return {name: lambda subject, aims: METHODS[name].compute(subject, images, aims, None)}


def test_a_map_of_learned_weights_passes_and_the_network_does_not_change():
    subject = ClassifierSubject(shortcut_task(), "shortcut")
    before = {name: value.clone() for name, value in subject.network.state_dict().items()}
    found = sanity.check(subject, IMAGES, aims_of(subject, IMAGES), _maps("relevance", IMAGES), seed=0)["relevance"]
    assert found.passes and found.line.startswith("passes: ")
    assert [stage for stage, _ in found.stages] == ["head", "block 1", "block 0", "all weights"]
    assert all(torch.equal(value, before[name]) for name, value in subject.network.state_dict().items())


def test_a_map_of_random_weights_does_not_pass():
    for subject in (classifier(), classifier(pool="mean")):
        found = sanity.check(subject, IMAGES, aims_of(subject, IMAGES), _maps("relevance", IMAGES), seed=0)
        assert found["relevance"].line.startswith("does not pass: the network's weights cannot be told from random")


def test_a_map_that_ignores_the_weights_does_not_pass():
    subject = ClassifierSubject(shortcut_task(), "shortcut")
    edges = {"edges": lambda subject, aims: IMAGES[:, :, ::8, ::8].mean(1)}
    found = sanity.check(subject, IMAGES, aims_of(subject, IMAGES), edges, seed=0)["edges"]
    assert found.line.startswith("does not pass") and found.stages[-1][1] > 0.999


def test_random_weights_of_any_size_are_told_from_learned_ones():
    torch.manual_seed(1)
    for width in (24, 96, 192):
        assert abs(sanity.learned(ViT((32, 32), 8, embed_dim=width, depth=3, num_heads=3), seed=0) - 1) < 0.04
    assert sanity.learned(shortcut_task(), seed=0) > sanity.LEARNED
