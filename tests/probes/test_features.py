"""What a probe reads of each kind of backbone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.models.backbones.vit import ViT
from pretrain.probes.features import BOTH, backbone_features, collect, pixel_features, with_both
from tests.runs import SHARDS

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Tokens 0, 1, 2, ... of width 2, `num_prefix_tokens` of them before the patches."""

    def __init__(self, prefix: int, *, class_token: bool, provides: set[str]):
        super().__init__()
        self.num_prefix_tokens, self.class_token, self.provides = prefix, class_token, frozenset(provides)

    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(7.0).view(1, 7, 1).expand(len(x), 7, 2)

    def forward_cls(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 2), 9.0)


def test_features_are_the_class_token_and_the_mean_patch_without_registers():
    features = backbone_features(Counting(3, class_token=True, provides={"image", "patches"}), torch.zeros(2, 3, 8, 8))
    assert features["cls"].tolist() == [[0.0, 0.0]] * 2
    assert features["patch_mean"].tolist() == [[4.5, 4.5]] * 2


def test_a_backbone_without_a_class_token_has_no_such_feature_even_with_registers():
    features = backbone_features(Counting(2, class_token=False, provides={"image", "patches"}), torch.zeros(2, 3, 8, 8))
    assert features.keys() == {"patch_mean"} and features["patch_mean"][0, 0] == 4.0
    assert with_both(features) is features


def test_a_backbone_without_tokens_gives_its_pooled_vector():
    features = backbone_features(Counting(0, class_token=False, provides={"image"}), torch.zeros(2, 3, 8, 8))
    assert features.keys() == {"pooled"} and features["pooled"].tolist() == [[9.0, 9.0]] * 2


def test_both_is_the_class_token_then_the_mean_patch():
    vit = ViT((16, 16), 8, 3, 16, 2, 2, 2.0, num_registers=2).eval()
    features = with_both(backbone_features(vit, torch.randn(3, 3, 16, 16)))
    assert torch.equal(features[BOTH], torch.cat([features["cls"], features["patch_mean"]], dim=1))


def test_batches_of_different_size_give_the_features_of_one():
    images, labels = torch.randn(30, 3, 2, 2), torch.arange(30) % 3
    parts = list(zip(images.split(7), labels.split(7), strict=True))
    features, found = collect(parts, pixel_features, CPU)
    assert torch.equal(features["pixels"], images.flatten(1)) and torch.equal(found, labels)


def test_a_request_to_stop_ends_a_pass():
    images = EvalImages(
        Dataset.open(str(SHARDS / "val")), (32, 32), in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, batch_size=4,
        give_up=iter([False, False, True]).__next__,
    )  # fmt: skip
    seen: list[int] = []
    with pytest.raises(StoppedWaitingError):
        collect(images, lambda batch: seen.append(len(batch)) or pixel_features(batch), CPU)
    assert seen == [4, 4]


def test_no_labelled_image_at_all_is_a_clear_error():
    with pytest.raises(ValueError, match=r"no labelled image; shards need a \.cls member"):
        collect([], pixel_features, CPU)
