"""Whether a network needs its attention, on networks of which the answer is known."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.attention.__main__ import main
from finetune.attention.judges import Neighbours
from finetune.attention.page import as_html, as_json, as_text
from finetune.attention.statistics import Gathering
from finetune.attention.study import ALL, FROZEN, SHUFFLED, UNIFORM, _way, study
from finetune.attention.weights import readable, sources
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.ffn import TopK
from pretrain.models.release.folder import write_release
from tests.browser import CHROMIUM, screenshot

SIZE, GRID = (16, 16), (4, 4)


def vit(*attention: dict[str, Any], scale: float = 1.0) -> ViT:
    torch.manual_seed(0)
    backbone = ViT(SIZE, 4, 3, 32, 2, 2, 2.0, attention=attention)
    for block in backbone.blocks:
        block.attn.qkv.weight.data[:64] *= scale  # type: ignore[union-attr]
    return backbone.eval()


def two_classes(count: int = 40) -> tuple[Tensor, Tensor]:
    """A bright square on noise: at one of four places in the left half (class 0), in the right half (class 1)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 3, *SIZE, generator=generator)
    for image, label, row in zip(images, labels, torch.randint(4, (count,), generator=generator), strict=True):
        image[:, 4 * row : 4 * row + 4, 4 + 8 * label : 8 + 8 * label] += 2
    return images, labels


def costs(backbone: ViT, **changes: Any) -> Any:
    images, labels = two_classes()
    judge = Neighbours(backbone, images, labels, batch_size=16, k=5)
    return study(backbone, judge, grid=GRID, num_prefix_tokens=1, **changes)


def test_attention_that_is_constant_costs_nothing_when_it_is_frozen():
    found = costs(vit(scale=0.0))
    attention, mlps = found.rows[:3], found.rows[3:]
    assert [row.name for row in attention] == [ALL, "blocks.0.attn", "blocks.1.attn"]
    assert [row.name for row in mlps] == ["blocks.0.mlp", "blocks.1.mlp"]
    for row in attention:
        assert {(cost.lost, cost.low, cost.high) for cost in row.costs.values()} == {(0.0, 0.0, 0.0)}
        assert row.verdict == "no cost seen when frozen"
    for row in attention[1:]:
        assert row.measured.entropy == pytest.approx(1) and row.measured.hoyer == pytest.approx(0, abs=1e-6)
        assert math.isnan(row.measured.dependence) and row.measured.images == 40


def test_attention_that_depends_on_the_image_is_seen_to():
    strong = costs(vit(scale=8.0)).rows[1].measured
    assert 0.2 < strong.dependence <= 1 and strong.entropy < 0.95 and strong.tokens_for_mass < 0.9


def test_the_sparsity_of_each_mlp_is_in_the_table():
    backbone = vit()
    for index, block in enumerate(backbone.blocks):
        block.mlp.act = TopK((0.125, 0.5)[index])  # type: ignore[union-attr]
    found = costs(backbone)
    assert [row.sparsity.active for row in found.rows[3:]] == pytest.approx([0.125, 0.5])
    lines = as_text(found).splitlines()
    assert lines[0].endswith("uniform: lost") and "0.125" in lines[-2] and "0.500" in lines[-1]
    assert as_json(found, {})["modules"][-1]["statistics"]["active"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["attention", "gate", "router"])
def test_replaced_weights_do_not_see_their_own_image(kind: str):
    weights = torch.rand(4, 2, 5, 5) if kind != "router" else torch.rand(4, 3)
    mean = weights.mean(0)
    assert torch.equal(_way(FROZEN, kind, mean, 0)(weights), mean.expand_as(weights))
    shuffled = _way(SHUFFLED, kind, mean, 0)(weights)
    assert sorted(map(float, shuffled.flatten(1).sum(1))) == sorted(map(float, weights.flatten(1).sum(1)))
    assert not any(torch.equal(new, old) for new, old in zip(shuffled, weights, strict=True))
    uniform = _way(UNIFORM, kind, mean, 0)(weights)
    assert torch.equal(uniform, uniform[:1, ..., :1].expand_as(uniform)) and uniform.mean() == pytest.approx(
        float(weights.mean())
    )


def test_attention_that_the_answer_needs_costs_when_it_is_replaced():
    backbone, (images, _) = vit(scale=8.0), two_classes(16)
    intact = backbone(images)

    def same_tokens() -> np.ndarray:
        return torch.isclose(backbone(images), intact, rtol=1e-2, atol=1e-2).flatten(1).all(1).numpy()

    first = study(backbone, same_tokens, grid=GRID, num_prefix_tokens=1).rows[1]
    assert first.verdict == "attends"
    assert {way: (cost.lost, cost.low) for way, cost in first.costs.items()} == dict.fromkeys(
        (FROZEN, SHUFFLED, UNIFORM), (1.0, 1.0)
    )


def test_the_network_is_as_before_after_the_study():
    backbone, (images, _) = vit(scale=4.0), two_classes(8)
    before = backbone(images)
    costs(backbone)
    assert torch.equal(backbone(images), before)


def test_weights_that_are_returned_unchanged_change_nothing():
    gate = {"kind": "se", "places": "blocks.*.mlp", "start": "paper", "reduction": 4}
    general = {"kind": "general", "places": "blocks.*.attn", "branches": ["xca", "none"]}
    backbone, (images, _) = vit(gate, general, scale=4.0), two_classes(8)
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    found = sources(backbone)
    assert sorted(source.kind for source in found) == ["attention"] * 4 + ["gate"] * 2 + ["router"] * 2
    with readable(backbone):
        before = backbone(images)
        for source in found:
            seen: list[Tensor] = []
            with source.replaced(lambda w, seen=seen: seen.append(w) or w):
                torch.testing.assert_close(backbone(images), before)
            assert len(seen) == 1
            with source.replaced(lambda w: w.flip(0) * 0.5):
                assert not torch.allclose(backbone(images), before, rtol=1e-3)
        assert torch.equal(backbone(images), before)


def test_gates_of_timms_networks_are_read_as_the_factors_of_their_input():
    torch.manual_seed(0)
    arguments = {"block_args": {"attn_layer": "se"}, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    network = TimmBackbone("resnet18", (32, 32), **arguments).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # timm starts the last norm of a block at 0, and its map with it
    found, images = sources(network), torch.randn(3, 3, 32, 32)
    assert [source.kind for source in found] == ["gate"] * 4
    seen: list[Tensor] = []
    with found[-1].replaced(lambda w: seen.append(w) or w):
        torch.testing.assert_close(network.forward_cls(images), network.forward_cls(images))
    spread = seen[0].flatten(2)
    present = spread != 1  # places where the map is 0 have no factor
    assert ((spread > 0) & (spread <= 1)).all() and present.any()


def test_statistics_of_known_weights():
    one_key = torch.zeros(2, 1, 17, 17)
    one_key[:, :, :, 1] = 1
    found = Gathering("attention", GRID, 1)
    found(one_key)
    measured = found.measured()
    assert (measured.dependence, measured.entropy) == (0, 0) and measured.hoyer == pytest.approx(1)
    assert measured.tokens_for_mass == pytest.approx(1 / 17)
    rows, columns = np.mgrid[:4, :4]
    assert measured.distance == pytest.approx(np.hypot(rows, columns).mean())
    different = torch.eye(2)[:, None, None, :].expand(2, 1, 3, 2)
    found = Gathering("attention")
    found(different)
    assert found.measured().dependence == pytest.approx(1) and found.measured().distance is None


def test_the_interval_is_of_resampled_images_and_repeats():
    first, second = costs(vit(scale=6.0), seed=3), costs(vit(scale=6.0), seed=3)
    assert [row.costs for row in first.rows] == [row.costs for row in second.rows]
    for row in first.rows[:3]:
        for way in (FROZEN, SHUFFLED, UNIFORM):
            assert row.costs[way].low <= row.costs[way].lost <= row.costs[way].high


def test_without_labels_there_are_statistics_and_no_costs():
    backbone, (images, _) = vit(scale=4.0), two_classes(8)
    found = study(backbone, Neighbours(backbone, images, None, batch_size=4), grid=GRID, num_prefix_tokens=1)
    assert found.accuracy is None and all(not row.costs and row.verdict == "" for row in found.rows)
    assert found.rows[1].measured.images == 8  # type: ignore[union-attr]


def test_a_network_without_readable_weights_is_refused():
    backbone = TimmBackbone("resnet18", (32, 32), layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]).eval()
    images, labels = two_classes(8)
    with pytest.raises(ValueError, match="no attention module, gate or router"):
        study(backbone, Neighbours(backbone, images, labels, batch_size=4), grid=None, num_prefix_tokens=0)


def test_the_command_measures_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shards = "samples/grocery/val"
    write_release(tmp_path / "release", vit(scale=4.0), objective="mae", extra_state={}, record={})
    arguments = [str(tmp_path / "release"), shards, "--out", str(tmp_path / "out"), "--max-images", "40", "--k", "5"]
    assert main(arguments) == 0
    said = json.loads((tmp_path / "out" / "attention.json").read_text())
    names = [f"backbone.blocks.{i}.{part}" for part in ("attn", "mlp") for i in range(2)]
    assert [row["name"] for row in said["modules"]] == [ALL, *names]
    assert said["images"] == 40 and 0 <= said["accuracy"] <= 1
    page = (tmp_path / "out" / "attention.html").read_text()
    assert "<script" not in page and page.count("data:image/png") == 2 and "frozen" in page
    assert "backbone.blocks.1.attn" in capsys.readouterr().out
    assert main([str(tmp_path), shards, "--out", str(tmp_path / "out")]) == 0, "a run's folder stands for its release"
    assert main([str(tmp_path / "nothing"), shards, "--out", str(tmp_path / "out")]) == 2


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no chromium here")
def test_a_browser_shows_the_page(tmp_path: Path):
    assert CHROMIUM is not None, "install chromium"
    (tmp_path / "page.html").write_text(as_html(costs(vit(scale=8.0)), {"network": "<b>a test</b>"}, GRID))
    shot = screenshot((tmp_path / "page.html").as_uri(), tmp_path)
    blue, viridis = np.array([31, 119, 220]), np.array([253, 231, 37])
    assert (np.abs(shot - blue) < 3).all(-1).sum() > 3000, "the card of the accuracy"
    assert (np.abs(shot - viridis) < 3).all(-1).sum() > 100, "the patch that is attended to most"
