"""The network that is probed, at its own size and at others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.config import ModelSource
from finetune.weights import open_source
from pretrain.core.configlib import ConfigError
from pretrain.data.shards.index import build_index
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers import pos_embed
from pretrain.models.release.folder import write_release
from pretrain.probes.__main__ import main
from pretrain.probes.subject import open_official, open_release
from tests.data.tars import image_bytes, tar_bytes
from tests.runs import SHARDS

SIDES = ["--train", str(SHARDS / "train"), "--val", str(SHARDS / "val"), "--max-images", "4", "--no-linear", "--json"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The names and sizes of DINOv2's small released backbone, and its position table."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ViT((518, 518), 14, embed_dim=384, depth=12, num_heads=6, pos_embed="learned", layer_scale=1.0)
    state = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, path)
    return path, state["pos_embed"]


@pytest.mark.slow
def test_positions_of_a_dinov2_file_are_resampled_by_its_own_rule(dinov2: tuple[Path, torch.Tensor]):
    path, table = dinov2
    expected = pos_embed.resize(table, (37, 37), (8, 8), how="dino")
    probed = open_official(path, lambda own, patch: (112, 112))
    tuned = open_source(ModelSource(official=str(path), img_size=112)).backbone
    for backbone in (probed.network.backbone, tuned):
        assert torch.equal(backbone.state_dict()["pos_embed"], expected)
    assert not torch.equal(expected, pos_embed.resize(table, (37, 37), (8, 8)))
    state = torch.load(path, weights_only=True) | {"register_tokens": torch.zeros(1, 4, 384)}
    torch.save(state, path.with_name("reg.pth"))
    smooth = open_official(path.with_name("reg.pth"), lambda own, patch: (112, 112)).network.backbone
    assert torch.equal(smooth.state_dict()["pos_embed"], pos_embed.resize(table, (37, 37), (8, 8), how="antialias"))


def test_a_dinov3_file_whose_positions_have_no_size_is_probed(tmp_path: Path):
    torch.manual_seed(0)
    model = ViT(
        (64, 64), 16, embed_dim=384, depth=12, num_heads=6, pos_embed="rope", layer_scale=1.0, num_registers=4,
        qkv_bias="no_key", norm_eps=1e-5,
    ).eval()  # fmt: skip
    state = {name.replace("reg_token", "storage_tokens"): tensor for name, tensor in model.state_dict().items()}
    torch.save(state | {"rope_embed.periods": 100.0 ** (torch.arange(16) / 16)}, tmp_path / "dinov3.pth")
    assert open_official(tmp_path / "dinov3.pth").size == (224, 224)
    images, network = (
        torch.randn(1, 3, 64, 64),
        open_official(tmp_path / "dinov3.pth", lambda own, patch: (64, 64)).network,
    )
    torch.testing.assert_close(network.backbone(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "side"), [(["--resize", "50"], 42), (["--img-size", "28"], 28)])
def test_a_large_network_is_probed_at_a_small_size(
    dinov2: tuple[Path, torch.Tensor], capsys: pytest.CaptureFixture[str], options: list[str], side: int
):
    assert main(["--official", str(dinov2[0]), *options, *SIDES]) == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert f"central {side} x {side} px" in protocol[0] and f"37x37 -> {side // 14}x{side // 14}" in protocol[1]


def test_a_release_is_probed_at_another_size(tmp_path: Path):
    torch.manual_seed(0)
    model = ViT((32, 32), 8, embed_dim=24, depth=1, num_heads=3)
    write_release(tmp_path / "release", model, objective="mae", extra_state={}, record={})
    subject = open_release(tmp_path / "release", lambda own, patch: (48, 48))
    assert subject.size == (48, 48) and subject.network(torch.randn(1, 3, 48, 48))
    weight = "blocks.0.attn.qkv.weight"
    assert subject.network.backbone.state_dict()[weight].equal(model.state_dict()[weight])
    assert open_release(tmp_path / "release").size == (32, 32)


def test_a_network_of_clips_is_probed_on_clips_at_its_size_and_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    members: list[tuple[str, bytes]] = []
    for clip in range(8):
        members += [(f"c{clip}.{number:04d}.jpg", image_bytes(10 * clip + number)) for number in range(7)]
        members.append((f"c{clip}.cls", str(clip % 2).encode()))
    shard = tmp_path / "clips-000000.tar"
    shard.write_bytes(tar_bytes(members))
    build_index([str(shard)])
    torch.manual_seed(0)
    model = VideoViT((16, 16), 8, embed_dim=24, depth=1, num_heads=3, num_frames=4)
    record = {"recipe": {"objective": {"frame_stride": 2}}}
    write_release(tmp_path / "r", model, objective="videomae", extra_state={}, record=record)
    sides = ["--train", str(shard), "--val", str(shard), "--no-linear", "--json", "--k", "1"]
    for options in ([], ["--img-size", "24"]):
        assert main([str(tmp_path / "r"), *options, *sides]) == 0
        found = json.loads(capsys.readouterr().out)
        assert "clips: 4 frames, every 2, of the middle" in found["protocol"] and found["queries"] == 8
        assert found["trained"].keys() >= {"cls", "patch_mean"} and "pixels" in found
    with pytest.raises(ConfigError, match="it reads clips"):
        open_source(ModelSource(release=str(tmp_path / "r")))
