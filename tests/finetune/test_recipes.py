from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config import FinetuneConfig
from pretrain.core.configlib import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if "\ntask:" in path.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_opens_with_the_command_that_runs_it(recipe: Path):
    load_config(FinetuneConfig, recipe)
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"finetune configs/{recipe.relative_to(CONFIGS)}" in line for line in head)


@pytest.mark.parametrize(("name", "lr"), [
    ("mae_vit_base_imagenet", 2e-3),
    ("mae_vit_large_imagenet", 4e-3),
    ("mae_vit_base_imagenet_linear", 6.4),
    ("beit_vit_base_imagenet", 4e-3),
    ("dino_vit_base_imagenet_linear", 4.0),
    ("mocov3_vit_base_imagenet_linear", 12.0),
    ("mocov3_vit_base_imagenet", 1e-3),
])  # fmt: skip
def test_the_peak_learning_rate_is_the_papers_at_its_batch_size(name: str, lr: float):
    (recipe,) = (path for path in RECIPES if path.stem == name)
    assert load_config(FinetuneConfig, recipe).optim.peak_lr == pytest.approx(lr)
