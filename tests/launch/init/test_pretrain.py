"""`fovea pretrain init`: what it writes passes --check, and follows the images, the machine and the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.init import methods
from launch.init.methods import FINETUNED, FROZEN
from pretrain.__main__ import main as pretrain
from tests.runs import SHARDS

TRAIN = str(SHARDS / "train")


def written(out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    assert main(["pretrain", "init", TRAIN, *words, "--out", str(out)]) == 0, capsys.readouterr().err
    assert pretrain([str(out), "--check", f"run_dir={out.parent}/run"]) == 0
    capsys.readouterr()
    return yaml.safe_load(out.read_text()), " ".join(out.read_text().replace("#", "").split())


@pytest.mark.slow
def test_few_small_images_on_cpus_get_the_small_recipe_and_the_time_its_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values, text = written(tmp_path / "a.yaml", capsys, "--gpus", "0", "--hours", "0.05", "--images-per-second", "200")
    assert values["objective"]["name"] == "mae" and values["model"]["name"] == "vit_tiny"
    assert values["model"]["img_size"] in (64, 96) and values["model"]["patch_size"] == 8
    assert values["optim"]["global_batch_size"] == 64
    assert values["optim"]["total_steps"] == pytest.approx(0.05 * 3600 * 200 / 64, rel=0.1)
    assert "37.5 passes over 960 images: 0.05 h of the 0.05 h." in text
    assert "configs/results/mae_four_sets.yaml" in text


@pytest.mark.slow
def test_the_batch_fits_the_gpus_and_the_learning_rate_follows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("--gpus", "4", "--gpu", "a100", "--hours", "1", "model.drop_path_rate=0.1")
    values, text = written(tmp_path / "a.yaml", capsys, *words)
    optim = values["optim"]
    assert optim["global_batch_size"] == 64 and values["model"]["drop_path_rate"] == 0.1
    assert optim["total_steps"] == 1600 * 15 and "its authors report no more than 1600 passes" in text


def test_size_and_method_follow_the_number_of_images_and_the_use():
    for ladder in (FINETUNED, FROZEN):
        assert [c.images for c in ladder] == sorted((c.images for c in ladder), reverse=True)
        assert ladder[-1].images == 0 and ladder[-1].passes == 0
        assert all((methods.RECIPES / c.recipe).is_file() for c in ladder)
    assert FINETUNED[2].wanted(1_281_167) == 2.5e8 and FINETUNED[3].wanted(20_000) == 4e6
    small = FINETUNED[2].values(100)["model"]
    assert small["img_size"] == 96 and small["patch_size"] == 8
    assert FINETUNED[2].values(500)["model"] == {"name": "vit_base", "patch_size": 16, "img_size": 224}


@pytest.mark.slow
def test_what_cannot_be_planned_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(*words: str) -> str:
        assert main(["pretrain", "init", *words, "--out", str(tmp_path / "a.yaml")]) == 2
        assert not (tmp_path / "a.yaml").exists()
        return capsys.readouterr().err

    time = ("--gpus", "0", "--hours", "1", "--images-per-second", "100")
    assert "no such file or folder" in refused(str(tmp_path / "none"), *time)
    assert "no *.tar in folder" in refused(str(tmp_path), *time)
    assert "--gpus -1: give a number above 0" in refused(TRAIN, "--gpus", "-1", "--hours", "1")
    assert "--hours 0.0: give a number above 0" in refused(TRAIN, "--gpus", "0", "--hours", "0")
    assert "--gpu h300: not known" in refused(TRAIN, "--gpus", "1", "--hours", "1", "--gpu", "h300")
    assert "optim.lrate: unknown key" in refused(TRAIN, *time, "optim.lrate=1")
