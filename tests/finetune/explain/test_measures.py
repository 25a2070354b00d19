"""Numbers about maps, on maps whose numbers are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from finetune.explain import measures, sanity
from finetune.explain.maps import METHODS
from finetune.explain.sanity import Sanity
from finetune.explain.subjects import Aim, ClassifierSubject, Subject
from finetune.metrics.faithfulness import area as area_under
from finetune.metrics.faithfulness import deletion, insertion
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
    found = measures.faithfulness(subject, images, aims, {"true": true, "worst": -true})
    (deleted, inserted), worst = found["true"], found["worst"]
    scores = subject.scores(images, aims), subject.scores(subject.substrate(images), aims)
    # 16 steps of a cell; the first changes everything: the area is that of the other score but for half a step
    torch.testing.assert_close(deleted, scores[1] + (scores[0] - scores[1]) / 32)
    torch.testing.assert_close(inserted, scores[0] - (scores[0] - scores[1]) / 32)
    assert (deleted < worst[0]).all() and (inserted > worst[1]).all()


def test_maps_of_one_batch_share_its_blur_and_the_ends_of_their_curves_and_change_no_number(
    monkeypatch: pytest.MonkeyPatch,
):
    subject = ClassifierSubject(shortcut_task(), "shortcut")
    aims, maps = aims_of(subject, IMAGES), {name: torch.rand(2, 4, 4) for name in "abc"}
    blurred, follow, calls = subject.substrate(IMAGES), subject.follow(aims), []
    monkeypatch.setattr(subject, "substrate", lambda images: calls.append("blur") or blurred)
    monkeypatch.setattr(subject, "follow", lambda _: lambda images: calls.append("score") or follow(images))
    found = measures.faithfulness(subject, IMAGES, aims, maps)
    assert calls.count("blur") == 1 and calls.count("score") == 2 + len(maps) * 2 * 15, "16 steps less the last"
    for name, values in maps.items():
        pixels = values.flatten(1).argsort(1).argsort(1).float().unflatten(1, (4, 4))
        pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        for area, curve in zip(found[name], (deletion, insertion), strict=True):
            assert torch.equal(area, area_under(curve(follow, IMAGES, pixels, blurred, step=64)))


def test_the_blurred_image_is_that_of_torchvision():
    for size in ((32, 32), (40, 24)):
        subject = classifier()
        subject.size = size
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        sigma = min(size) / 8
        side = 2 * min(round(3 * sigma), (min(size) - 1) // 2) + 1
        expected = gaussian_blur(images.double(), [side, side], [sigma, sigma]).float()
        torch.testing.assert_close(subject.substrate(images), expected, rtol=0, atol=1e-6)


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


def _relevance(subject: Subject, aims: Sequence[Aim]) -> Tensor:
    return METHODS["relevance"].compute(subject, IMAGES, aims, None)


def _checked(subject: ClassifierSubject, compute: sanity.Maps = _relevance) -> Sanity:
    aims = aims_of(subject, IMAGES)
    return sanity.check(subject, IMAGES, aims, {"map": compute}, {"map": compute(subject, aims)}, seed=0)["map"]


def test_a_map_of_learned_weights_passes_and_the_network_does_not_change():
    subject = ClassifierSubject(shortcut_task(), "shortcut")
    before = {name: value.clone() for name, value in subject.network.state_dict().items()}
    found = _checked(subject)
    assert found.passes and found.line.startswith("passes: ")
    assert [stage for stage, _ in found.stages] == ["head", "block 1", "block 0", "all weights"]
    assert all(torch.equal(value, before[name]) for name, value in subject.network.state_dict().items())


def test_a_map_of_random_weights_does_not_pass():
    for subject in (classifier(), classifier(pool="mean")):
        assert _checked(subject).line.startswith("does not pass: the network's weights cannot be told from random")


def test_a_map_that_ignores_the_weights_does_not_pass():
    subject = ClassifierSubject(shortcut_task(), "shortcut")
    found = _checked(subject, lambda subject, aims: IMAGES[:, :, ::8, ::8].mean(1))
    assert found.line.startswith("does not pass") and found.stages[-1][1] > 0.999


def test_random_weights_of_any_size_are_told_from_learned_ones():
    torch.manual_seed(1)
    for width in (24, 96, 192):
        assert abs(sanity.learned(ViT((32, 32), 8, embed_dim=width, depth=3, num_heads=3), seed=0) - 1) < 0.04
    assert sanity.learned(shortcut_task(), seed=0) > sanity.LEARNED
