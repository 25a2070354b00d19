"""Recipes that `fovea pretrain init` chooses from, and the rules by which it does.

The recipes are files of configs/. Which size is for how many images, and how many passes it should have at least, are
rules of thumb from the recipes of the papers: they were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.configlib import read_values
from pretrain.core.machine.children import HOME

RECIPES = HOME / "configs"
PATCHES_OF_SMALL_IMAGES = 8  # pixels of a patch where images are smaller than SMALL
SMALL = 192  # pixels of the shorter side


@dataclass(frozen=True)
class Candidate:
    """A network and its recipe.

    Attributes:
        images: fewest images it is chosen for. passes: fewest over the data; most: that its authors report.
        views: that also do, where there are very many images.
        side: of its images, where smaller ones are tried before a smaller network.
    """

    model: str
    recipe: str
    images: int
    passes: float
    most: float
    views: float = 2.5e8
    side: int = 224

    def wanted(self, images: int) -> float:
        """Views of images from which the network is worth its time."""
        return min(self.passes * images, self.views)

    def values(self, shorter: float) -> dict[str, Any]:
        """The recipe for images whose shorter side has `shorter` pixels.

        Raises:
            ConfigError: the recipe is not where Fovea is installed.
        """
        values = read_values(RECIPES / self.recipe)
        model: dict[str, Any] = {**values["model"], "name": self.model}
        if self.side < SMALL or shorter < SMALL:
            side = min(self.side, max(32, int(shorter) // 32 * 32))
            model |= {"img_size": side, "patch_size": PATCHES_OF_SMALL_IMAGES if side > 32 else 4}
        return {**values, "model": model}

    @property
    def file(self) -> Path:
        """Of the recipe, in messages."""
        return Path("configs") / self.recipe


_MAE, _SMALL = "pretrain/mae_vit_base.yaml", "results/mae_four_sets.yaml"
# To be fine-tuned: the cheapest step, no large batch, no collapse. Largest first.
FINETUNED = (
    Candidate("vit_huge", "pretrain/mae_vit_huge.yaml", 10_000_000, 200, 1600),
    Candidate("vit_large", "pretrain/mae_vit_large.yaml", 1_000_000, 200, 1600),
    Candidate("vit_base", _MAE, 100_000, 200, 1600),
    Candidate("vit_small", _MAE, 20_000, 200, 1600),
    Candidate("vit_tiny", _SMALL, 0, 36, 1600, side=128),
    Candidate("vit_tiny", _SMALL, 0, 0, 1600, side=64),
)
# To be used as they are: neighbours and linear classifiers of its features are better, a step costs more.
FROZEN = (
    Candidate("vit_base", "pretrain/dino_vit_base.yaml", 300_000, 100, 400, views=1.3e8),
    Candidate("vit_small", "pretrain/dino_vit_small.yaml", 50_000, 100, 300, views=1.3e8),
    *FINETUNED[-3:],
)
USES = {"finetune": FINETUNED, "frozen": FROZEN}
