from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.tokenizers.dvae import gumbel
from pretrain.models.tokenizers.tokenizer import from_release
from pretrain.objectives.configs import DVAEConfig
from tests.objectives.tiny import Shape, batch, objective, part


@pytest.mark.parametrize("smooth_l1_loss", [False, True])
def test_the_loss_is_that_of_the_pixels_through_a_relaxed_choice_and_the_divergence(smooth_l1_loss: bool):
    of = objective("dvae", kl_div_loss_weight=0.01, smooth_l1_loss=smooth_l1_loss)
    given = batch(of)
    images = given["image"][:, 0]
    logits = of.codes.to_logits(of.encoder.map(images))
    weights = ((logits + gumbel(given["gumbel_noise"])) / 0.9).softmax(1)
    out = of.codes.decoder(torch.einsum("bkhw,kd->bdhw", weights, of.codes.codebook.weight))
    rec = F.smooth_l1_loss(out, images) if smooth_l1_loss else F.mse_loss(out, images)
    q = logits.softmax(1)
    divergence = (q * (q.log() + torch.tensor(64.0).log())).sum()
    torch.testing.assert_close(of(given, 0)["loss"], rec + 0.01 * divergence)


def test_the_divergence_as_a_mean_does_not_depend_on_the_division_of_the_batch():
    of = objective("dvae", kl_div_loss_weight=1.0, kl_reduction="mean")
    given = batch(of)
    halves = [of(part(given, piece), 0)["loss"] for piece in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).mean(), of(given, 0)["loss"])
    summed = objective("dvae", kl_div_loss_weight=1.0)
    assert summed(part(given, slice(0, 2)), 0)["loss_kl"] < 0.7 * summed(given, 0)["loss_kl"]


def test_the_temperature_is_a_function_of_the_step():
    of = objective("dvae", temperature=1.0, temperature_end=0.2)
    assert [of.temperature(step) for step in (0, 4, 8)] == pytest.approx([1.0, 0.6, 0.2])
    given = batch(of)
    assert not torch.equal(of(given, 0)["loss"], of(given, 8)["loss"])


def test_a_hard_choice_decodes_one_code_per_place():
    of = objective("dvae", straight_through=True)
    given = batch(of)
    logits = of.codes.to_logits(of.encoder.map(given["image"][:, 0]))
    chosen = of.choose(logits, given["gumbel_noise"], 0)
    torch.testing.assert_close(chosen.amax(1), torch.ones_like(chosen[:, 0]))
    of(given, 0)["loss"].backward()
    assert of.codes.to_logits.weight.grad.any()


def test_codes_in_use_are_counted():
    of = objective("dvae")
    with torch.no_grad():
        of.codes.to_logits.weight.zero_()
        of.codes.to_logits.bias.zero_()[5] = 1.0
    losses = of(batch(of), 0)
    assert losses["codebook_perplexity"].item() == pytest.approx(1)
    assert losses["codebook_used"].item() == pytest.approx(1 / 64)


def test_its_release_is_a_tokenizer_that_gives_the_pictures_of_the_objective(tmp_path):
    of = objective("dvae").eval()
    stats = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    write_release(tmp_path / "r", of.backbone, objective="dvae", extra_state=of.heads_state(), record={}, **stats)
    tokenizer = from_release(read_release(tmp_path / "r"))
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    ids = tokenizer.tokens(images).unflatten(1, (3, 4))
    decoded = tokenizer.decode(ids)
    expected = (of.reconstruct((images - 0.5) / 0.25) * 0.25 + 0.5).clamp(0, 1)
    assert decoded is not None
    torch.testing.assert_close(decoded, expected)


def test_views_are_a_crop_and_a_number_for_every_code_and_place():
    image, noise = DVAEConfig(num_tokens=32).views(Shape())
    assert image == ViewSpec("image", (24, 32), scale=(0.08, 1.0), hflip=0.5)
    assert noise == Noise("gumbel_noise", (32, 3, 4))


@pytest.mark.parametrize(
    ("changes", "shape", "problem"),
    [
        ({"crop_scale": (0.9, 0.5)}, Shape(), "objective.crop_scale: 0.9 is larger than 0.5"),
        ({"color_jitter": (0, 0, 0.4, 0)}, Shape(in_chans=1), "objective.color_jitter: needs RGB"),
    ],
)
def test_impossible_settings_are_named_before_training(changes: dict, shape: Shape, problem: str):
    assert any(problem in found for found in DVAEConfig(**changes).problems(shape))
