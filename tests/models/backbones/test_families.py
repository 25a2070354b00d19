from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from pretrain.models.backbones import families
from pretrain.models.backbones.families import FAMILIES, POOLED, family_of, lacking, timm_provides, timm_stride

# One or more names of each family, and names that look like one and are not.
NAMES = {
    "ViT": (
        "vit_base_patch16_224", "vit_giant_patch14_dinov2", "vit_base_patch16_gap_224", "deit_small_patch16_224",
        "deit3_base_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "aimv2_large_patch14_224",
    ),
    "BEiT": ("beit_base_patch16_224", "beitv2_large_patch16_224"),
    "EVA and RoPE": ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"),
    "Swin": ("swin_tiny_patch4_window7_224", "swin_s3_tiny_224"),
    "Swin v2": ("swinv2_tiny_window8_256",),
    "Hiera": ("hiera_tiny_224", "hiera_small_abswin_256"),
    "XCiT": ("xcit_nano_12_p8_224", "xcit_tiny_24_p16_384"),
    "ConvNeXt": ("convnext_atto", "convnextv2_tiny", "test_convnext"),
    "any other": (
        "resnet50", "vit_relpos_base_patch16_224", "swinv2_cr_base_224", "vit_base_r50_s16_224",
        "deit_base_distilled_patch16_224", "vitamin_base_224", "hieradet_small", "vit_pe_core_base_patch16_224",
    ),
}  # fmt: skip
PAIRS = [(family, name) for family, names in NAMES.items() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_name_belongs_to_the_class_that_timm_builds(family: str, name: str):
    found = family_of(name)
    assert found.name == family
    assert timm.is_model(name)
    if found is POOLED:
        return
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert type(model).__name__ == found.class_name
    has = getattr(model, "cls_token", None) is not None
    assert ("class_token" in timm_provides(name, {})) == has
    assert model.feature_info[-1]["reduction"] == timm_stride(name, {})
    model.get_submodule(found.stem)


def test_every_family_has_a_name_here():
    assert NAMES.keys() == {family.name for family in (*FAMILIES, POOLED)}


@pytest.mark.parametrize(
    ("name", "arguments", "stride"),
    [
        ("vit_base_patch16_224", {"patch_size": 8}, 8),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1]}, 8),
        ("swin_tiny_patch4_window7_224", {"patch_size": 2}, 16),
        ("hiera_tiny_224", {"stages": [1, 1, 1]}, 16),
        ("convnext_tiny", {"output_stride": 16}, 16),
        ("resnet50", {}, 1),
    ],
)
def test_arguments_change_the_stride(name: str, arguments: dict, stride: int):
    assert timm_stride(name, arguments) == stride


def test_a_name_without_a_patch_size_asks_for_one():
    with pytest.raises(ValueError, match=r"timm/flexivit_base does not name its patch size; give model\.args"):
        timm_stride("flexivit_base", {})
    assert timm_stride("flexivit_base", {"patch_size": 16}) == 16


def test_a_class_token_that_is_switched_off_is_not_provided():
    assert "class_token" not in timm_provides("vit_base_patch16_224", {"class_token": False})
    assert "class_token" in timm_provides("vit_base_patch16_gap_224", {"class_token": True})


def test_what_is_lacking_is_named_with_what_has_it():
    assert lacking(frozenset({"image"}), POOLED.provides) is None
    found = lacking(frozenset({"keep", "patches"}), POOLED.provides)
    assert found == "it lacks keep, patches; use a size of our own ViT, timm/ of ViT"
    assert "use conv_encoder" in (lacking(frozenset({"conv_map"}), families.VIT_PROVIDES) or "")


@pytest.mark.processes
def test_nothing_here_imports_torch():
    code = "import sys, launch.pages.backbones, pretrain.models.backbones.families; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
