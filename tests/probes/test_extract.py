"""Features of images: those of the backbone, of the right pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.views.decode import decode_sample
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from pretrain.probes.extract import FeatureExtractor
from tests.runs import SHARDS

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def vit(**arguments) -> ViT:
    torch.manual_seed(0)
    return ViT((32, 32), 8, embed_dim=24, depth=2, num_heads=3, **arguments)


def extractor(backbone) -> FeatureExtractor:
    return FeatureExtractor(backbone, mean=MEAN, std=STD, title="test")


def photos(count: int) -> list[np.ndarray]:
    reader = Reader(Dataset.open(SHARDS / "val"))
    return [decode_sample(reader.read(0, number), 3) for number in range(count)]


def test_images_are_prepared_as_probes_read_them():
    dataset = Dataset.open(SHARDS / "val")
    (expected, _), *_ = EvalImages(dataset, (32, 32), in_chans=3, mean=MEAN, std=STD, batch_size=5)
    torch.testing.assert_close(extractor(vit()).prepare(photos(5)), expected, rtol=0, atol=1e-6)


def test_the_batch_size_changes_nothing_and_patches_are_a_map():
    model, images = extractor(vit(num_registers=2)), photos(5)
    one, many = model.features(images, patches=True, batch_size=2), model.features(images, patches=True)
    tokens = model.backbone(model.prepare(images))
    assert many.cls is not None and many.patches is not None and one.patches is not None
    torch.testing.assert_close(many.pooled, tokens[:, 0])
    torch.testing.assert_close(many.patches.flatten(2).transpose(1, 2), tokens[:, 3:])
    torch.testing.assert_close(one.patches, many.patches)
    torch.testing.assert_close(model.features(images).pooled, many.pooled)
    assert many.patches.shape == (5, 24, 4, 4)


def test_pooled_features_are_those_of_timm(tmp_path: Path):
    model = extractor(vit())
    write_release(tmp_path / "out", model.backbone, objective="mae", extra_state={}, record={}, mean=MEAN, std=STD)
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = photos(2)
    torch.testing.assert_close(model.features(images).pooled, other(model.prepare(images)), rtol=1e-4, atol=1e-5)


def test_other_sizes_and_images_as_they_are():
    model = extractor(vit())
    wide = [np.ascontiguousarray(image[:48, :64]) for image in photos(2)]
    for size, grid in ((64, (8, 8)), ((48, 64), (6, 8)), ("own", (6, 8))):
        maps = model.features(wide, size=size, patches=True).patches
        assert maps is not None and maps.shape == (2, 24, *grid)
    with pytest.raises(ValueError, match="images of one size"):
        model.features([wide[0], wide[1][:40]], size="own")


def test_a_backbone_without_a_class_token_pools_its_patches():
    model = extractor(vit(class_token=False))
    found = model.features(photos(2), patches=True)
    assert found.cls is None and found.patches is not None
    torch.testing.assert_close(found.pooled, found.patches.mean((2, 3)))


def test_a_network_without_patches_says_so():
    model = extractor(TimmBackbone("resnet18", (64, 64)))
    assert repr(model.features(photos(2))) == "ImageFeatures(pooled (2, 512))"
    with pytest.raises(ValueError, match="no patches"):
        model.features(photos(1), patches=True)


@pytest.mark.parametrize(("options", "message"), [({"crop_pct": 1.5}, "crop_pct 1.5"), ({"crop_pct": 0}, "crop_pct 0")])
def test_wrong_options_are_refused(options, message: str):
    with pytest.raises(ValueError, match=message):
        extractor(vit()).prepare(photos(1), **options)
    with pytest.raises(ValueError, match="no images"):
        extractor(vit()).features([])
