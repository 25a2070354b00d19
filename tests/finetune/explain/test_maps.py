"""Maps: each method finds what a known network reads, and leaves no trace in the network."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from finetune.explain.baselines import BASELINES, baseline
from finetune.explain.maps import METHODS, NotExplainableError, attention_of, read_rows
from finetune.explain.study import possible
from finetune.explain.subjects import Aim, BackboneSubject, ClassifierSubject, Subject
from finetune.tasks.classification import Classification
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from tests.finetune.explain.planted import photos, shortcut_task
from tests.finetune.small_tasks import small_task

pytestmark = pytest.mark.slow

HALF = (0.5, 0.5, 0.5)
IMAGES = torch.from_numpy(photos(2, tagged=[True, True], seed=9)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vit(**arguments: object) -> ViT:
    torch.manual_seed(0)
    given = {"embed_dim": 24, "depth": 2, "num_heads": 2, **arguments}
    return ViT((32, 32), 8, **given).eval()  # type: ignore[arg-type]


def subject_of(backbone: Backbone) -> BackboneSubject:
    return BackboneSubject(OpenedBackbone(backbone, HALF, HALF, "a backbone"))


def classifier(**section: object) -> ClassifierSubject:
    task = small_task("classification", resize=32, **section)
    assert isinstance(task, Classification)
    return ClassifierSubject(task, "a classifier")


def aims_of(subject: Subject, images: Tensor) -> list[Aim]:
    return [aim for aim in subject.aims(images) if aim is not None]


class OneCell(BackboneSubject):
    """A network whose score is the mean of the pixels of one cell."""

    def scores(self, images: Tensor, aims: Sequence[Aim], *, logits: bool = False) -> Tensor:
        return images[:, :, 8:16, 16:24].mean((1, 2, 3))


SUBJECTS = {
    "class token": lambda: classifier(pool="token"),
    "mean of patches": lambda: classifier(pool="mean"),
    "frozen": lambda: classifier(train="linear"),
    "attentive": lambda: classifier(train="attentive", attention_heads=2),
    "grid": lambda: classifier(train="grid", grid={"lrs": [1e-3], "blocks": [2], "pools": ["token"]}),
    "relative positions": lambda: subject_of(vit(pos_embed="none", rel_pos_bias="shared")),
    "rotary, registers": lambda: subject_of(vit(embed_dim=32, pos_embed="rope", num_registers=2)),
    "no class token": lambda: subject_of(vit(class_token=False)),
    "timm": lambda: subject_of(TimmBackbone("vit_tiny_patch16_224", (64, 64)).eval()),
}


@pytest.mark.parametrize("kind", SUBJECTS)
def test_every_method_gives_a_map_of_the_patches_and_leaves_no_trace(kind: str):
    pytest.importorskip("captum")
    subject = SUBJECTS[kind]()
    assert possible(subject, []) == (list(METHODS), {})
    state = copy.deepcopy(subject.network.state_dict())
    images = IMAGES if subject.size == (32, 32) else IMAGES.repeat(1, 1, 2, 2)
    aims = aims_of(subject, images)
    before = subject.scores(images, aims)
    for name, method in METHODS.items():
        found = method.compute(subject, images, aims, None)
        assert found.shape == (2, *subject.cells) and torch.isfinite(found).all() and not found.requires_grad, name
        assert torch.equal(found, method.compute(subject, images, aims, None)), name
        assert found.std() > 0, name
    assert torch.equal(subject.scores(images, aims), before)
    assert all(torch.equal(value, state[name]) for name, value in subject.network.state_dict().items())
    for module in subject.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
        assert getattr(module, "fused_attn", True)
    assert all(parameter.grad is None for parameter in subject.network.parameters())


def test_occlusion_and_integrated_gradients_find_the_only_cell_that_is_read():
    pytest.importorskip("captum")
    backbone = vit()
    subject = OneCell(OpenedBackbone(backbone, HALF, HALF, "one cell"))
    for name in ("occlusion", "integrated_gradients"):
        found = METHODS[name].compute(subject, IMAGES, [Aim("")] * 2, None).abs()
        assert found[:, 1, 2].min() > 0
        found[:, 1, 2] = 0
        assert torch.allclose(found, torch.zeros(()), atol=1e-7), name


def test_integrated_gradients_sum_to_the_difference_of_the_scores():
    pytest.importorskip("captum")
    subject = classifier(pool="mean")
    aims = aims_of(subject, IMAGES)
    found = METHODS["integrated_gradients"].compute(subject, IMAGES, aims, None)
    total = found.sum((1, 2)) * 64  # cells are means over 8 x 8 pixels
    with torch.no_grad():
        blurred = subject.substrate(IMAGES)
        difference = subject.scores(IMAGES, aims, logits=True) - subject.scores(blurred, aims, logits=True)
    torch.testing.assert_close(total, difference, rtol=0.05, atol=0.02)


def test_relevance_finds_the_tag_of_a_shortcut():
    subject = ClassifierSubject(shortcut_task(), "shortcut")
    found = METHODS["relevance"].compute(subject, IMAGES, aims_of(subject, IMAGES), None)
    assert found.flatten(1).argmax(1).tolist() == [15, 15]


def test_a_gradient_does_not_depend_on_other_images_of_the_batch():
    subject = classifier(pool="token")
    aims = aims_of(subject, IMAGES)
    both = METHODS["relevance"].compute(subject, IMAGES, aims, None)
    alone = METHODS["relevance"].compute(subject, IMAGES[1:], aims[1:], None)
    torch.testing.assert_close(both[1:], alone)


def test_attention_is_that_of_the_layer_asked_for():
    subject = classifier(pool="mean")
    maps = attention_of(subject, IMAGES, aims_of(subject, IMAGES))
    first = METHODS["attention"].compute(subject, IMAGES, aims_of(subject, IMAGES), "blocks.0.attn")
    torch.testing.assert_close(
        first.flatten(1), read_rows(subject, maps["blocks.0.attn"], aims_of(subject, IMAGES)).mean(1)
    )
    assert not torch.equal(first, METHODS["attention"].compute(subject, IMAGES, aims_of(subject, IMAGES), None))


def test_a_network_without_attention_keeps_the_other_methods():
    subject = subject_of(TimmBackbone("test_resnet", (64, 64)).eval())
    methods, skipped = possible(subject, [])
    assert "occlusion" in methods and set(skipped) == {"attention", "rollout", "relevance"}
    with pytest.raises(
        NotExplainableError, match=r"--method rollout: .*no attention.*methods that work here: occlusion"
    ):
        possible(subject, ["rollout"])
    images = torch.randn(1, 3, 64, 64)
    assert METHODS["occlusion"].compute(subject, images, aims_of(subject, images), None).shape == (1, 14, 14)


def test_attention_in_windows_cannot_be_chained():
    name = "swin_tiny_patch4_window7_224" if "test_swin" not in timm.list_models() else "test_swin"
    subject = subject_of(TimmBackbone(name, (224, 224)).eval())
    images = torch.randn(1, 3, 224, 224)
    with pytest.raises(NotExplainableError, match="windows and pooled tokens cannot be chained"):
        METHODS["rollout"].compute(subject, images, aims_of(subject, images), None)
    with pytest.raises(NotExplainableError, match="it attends within windows"):
        METHODS["attention"].compute(subject, images, aims_of(subject, images), "model.layers.0.blocks.0.attn")


def test_attention_between_channels_is_no_map_of_the_image():
    subject = subject_of(vit(attention=[{"kind": "xca", "places": "blocks.*.attn"}]))
    aims = aims_of(subject, IMAGES)
    for name in ("attention", "rollout", "relevance"):
        with pytest.raises(
            NotExplainableError, match="between 12 elements, not the 16 patches of an image and its 1 pre"
        ):
            METHODS[name].compute(subject, IMAGES, aims, None)


def test_without_captum_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    methods, skipped = possible(classifier(), [])
    assert "integrated_gradients" not in methods and "pip install" in skipped["integrated_gradients"]
    with pytest.raises(NotExplainableError, match=r"captum is not installed: pip install"):
        possible(classifier(), ["integrated_gradients"])


def test_baselines_know_the_image_only_by_its_number_its_edges_or_not_at_all():
    cells = (4, 4)
    maps = {name: baseline(name, IMAGES, [3, 8], cells, seed=1) for name in BASELINES}
    assert all(found.shape == (2, *cells) for found in maps.values())
    assert torch.equal(maps["random"][1], baseline("random", -IMAGES[:1], [8], cells, seed=1)[0])
    assert not torch.equal(maps["random"], baseline("random", IMAGES, [3, 8], cells, seed=2))
    assert torch.equal(maps["centre"], maps["centre"].flip(1, 2)) and maps["centre"][0].argmax() in (5, 6, 9, 10)
    flat = IMAGES[:1] * 0
    flat[:, :, :, 20:] = 1
    edges = baseline("edges", flat, [0], cells, seed=0)[0]
    assert (edges[:, 2] > 0).all() and np.allclose(edges[:, [0, 1]], 0)
