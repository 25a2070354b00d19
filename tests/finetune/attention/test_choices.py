"""Which images use which branches: planted routers of which the answer is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import finetune.release
from finetune.attention.__main__ import main
from finetune.attention.choices import LEVEL, Choice, Comparison, Use, comparisons, use_of
from finetune.attention.page import as_html, as_json, as_text
from finetune.attention.study import Study
from pretrain.models.backbones.vit import ViT
from pretrain.models.mechanisms.routing import observed_routing
from pretrain.models.release.folder import write_release
from tests.browser import CHROMIUM, screenshot
from tests.finetune.small_tasks import small_task

pytestmark = pytest.mark.slow

BLOCKS = ("blocks.0.attn", "blocks.1.attn")
SHARDS = "samples/grocery/val"


def vit(choice: str = "soft", *, ignores: bool = False) -> ViT:
    """Its routers read the tokens at random; `ignores`: nothing but their biases."""
    torch.manual_seed(0)
    general = {"kind": "general", "places": "blocks.*.attn", "branches": ["xca", "external", "none"], "choice": choice}
    backbone = ViT((16, 16), 4, 3, 32, 2, 2, 2.0, attention=[general]).eval()
    for block in backbone.blocks:
        attn: Any = block.attn
        attn.strength.data.copy_(torch.rand(2, 32))
        if attn.router is not None:
            attn.router.bias.data.normal_(std=0.3)
            attn.router.weight.data.normal_(std=0.0 if ignores else 2.0)
    return backbone


def images(labels: Tensor, brightness: float) -> Tensor:
    """Noise, brighter in class 1."""
    noise = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return noise + brightness * labels[:, None, None, None]


@torch.no_grad()
def use(backbone: ViT, brightness: float, task: str = "a") -> Use:
    labels = torch.arange(60) % 2
    with observed_routing(backbone) as routing:
        for batch in images(labels, brightness).split(25):
            backbone(batch)
    return use_of(routing, 60, task, labels.numpy(), {0: "dark"})


@pytest.mark.parametrize("choice", ["soft", "hard"])
def test_a_router_that_depends_on_the_class_is_seen_to(choice: str):
    (found,) = comparisons([use(vit(choice), brightness=2.0)], seed=0)
    assert (found.by, found.groups, found.sizes) == ("class of a", ["0 dark", "1"], [30, 30])
    strongest = max(found.choices, key=lambda block: found.choices[block].between)
    choice_of = found.choices[strongest]
    assert choice_of.p <= 0.001 and found.verdict(strongest) == "depends on it"
    assert choice_of.between > 0.3 > 0.1 > choice_of.by_chance
    spread, by_lot = (np.ptp(means, axis=0).max() for means in (choice_of.means, choice_of.shuffled))
    assert spread > 3 * by_lot


def test_a_router_that_does_not_depend_on_the_class_is_not():
    (found,) = comparisons([use(vit(), brightness=0.0)], seed=0)
    for block in BLOCKS:
        assert found.verdict(block) == "no dependence seen" and found.choices[block].p > 0.05
        assert found.choices[block].by_chance == pytest.approx(1 / 59, rel=0.3), "(groups - 1) / (images - 1)"


@pytest.mark.parametrize("given", [{"ignores": True}, {"choice": "uniform"}])
def test_a_router_that_ignores_its_input_gives_every_class_the_same(given: dict[str, Any]):
    (found,) = comparisons([use(vit(**given), brightness=2.0)], seed=0)
    for block in BLOCKS:
        choice = found.choices[block]
        assert (choice.between, choice.by_chance, choice.p) == (0.0, 0.0, 1.0)
        for means in (choice.means, choice.shuffled):
            np.testing.assert_allclose(means, found.overall[block][None].repeat(2, 0), rtol=1e-12)


def test_the_means_are_those_of_the_images_of_each_class():
    values = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 1.0]])
    given = Use("a", {"b": ["x", "y"]}, {"b": values}, np.array([7, 3, 7]), {})
    (found,) = comparisons([given], seed=0)
    assert found.groups == ["3", "7"] and found.sizes == [1, 2]
    np.testing.assert_allclose(found.choices["b"].means, [[2, 0], [2.5, 0.5]])
    np.testing.assert_allclose(found.overall["b"], [7 / 3, 1 / 3])
    # between: squares of the groups' means around the mean, times their sizes, over the sum of all squares
    assert found.choices["b"].between == pytest.approx((1 / 9 + 2 / 36 + 1 / 9 + 2 / 36) / (14 / 3 + 2 / 3))


def test_p_is_uniform_where_nothing_depends_on_the_class():
    generator = np.random.default_rng(0)
    p = []
    for _ in range(60):
        values = {"b": generator.random((24, 3))}
        (found,) = comparisons([Use("a", {"b": ["x", "y", "z"]}, values, np.arange(24) % 4, {})], seed=1)
        p.append(found.choices["b"].p)
    assert np.mean(np.array(p) <= LEVEL) <= 0.12 and 0.4 < np.mean(p) < 0.6


def test_two_data_sets_are_compared_as_tasks():
    backbone = vit()
    dark, bright = use(backbone, 0.0, "dark"), use(backbone, 4.0, "bright")
    found = comparisons([dark, bright], seed=0)
    assert [of.by for of in found] == ["class of dark", "class of bright", "task"]
    assert found[2].groups == ["dark", "bright"] and found[2].sizes == [60, 60]
    np.testing.assert_allclose(found[2].choices[BLOCKS[0]].means[0], dark.values[BLOCKS[0]].mean(0))
    assert "depends on it" in {found[2].verdict(block) for block in BLOCKS}


def test_several_blocks_need_smaller_p_values():
    choice = Choice(np.zeros((2, 1)), np.zeros((2, 1)), 0.1, 0.1, p=0.03)
    for count, verdict in ((1, "depends on it"), (2, "no dependence seen")):
        blocks = {str(block): choice for block in range(count)}
        assert Comparison("class", ["a", "b"], [1, 1], {}, {}, blocks).verdict("0") == verdict


def test_a_repeated_comparison_is_equal():
    first, second = (comparisons([use(vit(), 2.0)], seed=5)[0].choices[BLOCKS[0]] for _ in range(2))
    assert first.p == second.p and np.array_equal(first.shuffled, second.shuffled)


def test_without_labels_there_is_the_use_over_all_images_alone():
    given = use(vit(), 0.0)
    unlabelled = Use("a", given.blocks, given.values, None, {})
    assert comparisons([unlabelled], seed=0) == []
    lines = as_text(Study(None, 60, []), [unlabelled]).splitlines()
    assert [line.split()[1] for line in lines[-2:]] == list(BLOCKS) and "xca 0." in lines[-1]


def test_the_command_compares_classes_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_release(tmp_path / "release", vit(), objective="mae", extra_state={}, record={})
    given = [str(tmp_path / "release"), SHARDS, "--out", str(tmp_path / "out"), "--max-images", "40", "--k", "5"]
    assert main([*given, "--task", "nuclei=samples/nuclei/val"]) == 0
    said = json.loads((tmp_path / "out" / "attention.json").read_text())["branches"]
    assert {row["task"]: row["images"] for row in said["use"]}[SHARDS] == 40
    assert [of["by"] for of in said["compared"]] == [f"class of {SHARDS}", "task"]
    assert list(said["compared"][1]["images"]) == [SHARDS, "nuclei"]
    of_block = said["compared"][0]["blocks"]["backbone.blocks.0.attn"]
    assert of_block["use"].keys() == said["compared"][0]["images"].keys() == of_block["use with shuffled labels"].keys()
    assert (tmp_path / "out" / "attention.html").read_text().count("data:image/png") == 2 + 3
    assert "by task" in capsys.readouterr().out
    assert main([*given, "--task", f"{SHARDS}=samples/nuclei/val"]) == 2
    assert f"two data sets are named {SHARDS}" in capsys.readouterr().err
    plain = ViT((16, 16), 4, 3, 32, 2, 2, 2.0)
    write_release(tmp_path / "plain", plain, objective="mae", extra_state={}, record={})
    assert main([str(tmp_path / "plain"), *given[1:], "--task", "nuclei=samples/nuclei/val"]) == 2
    assert "no general block" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--task", "nuclei"])


def test_the_blocks_of_a_fine_tuned_classifier_are_those_of_its_backbone(tmp_path: Path):
    backbone = vit("hard")
    release = finetune.release.write_release(
        tmp_path / "release", small_task("classification", backbone=backbone), {"source": {}}
    )
    assert main([str(release), SHARDS, "--out", str(tmp_path), "--max-images", "30", "--batch-size", "8"]) == 0
    said = json.loads((tmp_path / "attention.json").read_text())["branches"]
    assert [of["by"] for of in said["compared"]] == [f"class of {SHARDS}"]
    attention: Any = backbone.blocks[0].attn
    largest = dict(zip(("xca", "external"), attention.strength.abs().mean(1).tolist(), strict=True))
    used = said["use"][0]["blocks"]["backbone.blocks.0.attn"]
    shares = {name: used[name] / largest[name] for name in used}
    assert all(30 * share == pytest.approx(round(30 * share), abs=1e-4) for share in shares.values()), "one branch each"


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no chromium here")
def test_a_browser_shows_the_panels(tmp_path: Path):
    assert CHROMIUM is not None, "install chromium"
    uses = [use(vit(), 2.0, "<b>$a$</b>")]
    compared = comparisons(uses, seed=0)
    study = Study(None, 60, [])
    assert as_json(study, {}, uses, compared)["branches"]["compared"][0]["by"] == "class of <b>$a$</b>"
    text = as_html(study, {"network": "a test"}, None, uses, compared)
    assert "<b>$a$" not in text
    (tmp_path / "page.html").write_text(text)
    shot = screenshot((tmp_path / "page.html").as_uri(), tmp_path)
    for ink in ([103, 0, 31], [5, 48, 97]):
        assert (np.abs(shot - ink) < 3).all(-1).sum() > 200, "the strongest use, above and below the mean"
