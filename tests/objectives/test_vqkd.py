from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.core.configlib import ConfigError
from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.tokenizers.tokenizer import from_release
from pretrain.objectives.configs import VQKDConfig
from pretrain.objectives.vqkd import VQKD
from tests.objectives.released import reads, vit_release
from tests.objectives.tiny import HORIZON, Shape, batch, objective, part

BASE = Shape(size=(224, 224), patch_size=16, num_blocks=12)


def test_the_loss_is_the_cosine_to_the_teacher_and_the_pull_to_the_codes():
    of = objective("vqkd").eval()
    given = batch(of)
    features = of.encode_task_layer(of.encoder(given["image"][:, 0])[:, 1:])
    z = F.normalize(features, dim=-1)
    codes = of.quantize.codebook[(z @ of.quantize.codebook.T).argmax(-1)]
    decoded = of.decoder(codes.transpose(1, 2).unflatten(2, (3, 4)))[:, 1:]
    target = of.teacher.features(given["teacher_image"][:, 0])
    loss_rec = (1 - F.cosine_similarity(of.decode_task_layer(decoded), target, dim=-1)).mean()
    losses = of(given, 0)
    torch.testing.assert_close(losses["loss_rec"], loss_rec)
    torch.testing.assert_close(losses["loss_quant"], (z - codes).square().mean())
    torch.testing.assert_close(losses["loss"], loss_rec + losses["loss_quant"])


def test_the_codebook_moves_once_per_step_by_all_its_micro_batches():
    books = []
    for pieces in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        of = objective("vqkd").train()
        for piece in pieces:
            before = of.quantize.codebook.clone()
            of(part(batch(of), piece), 0)
            assert torch.equal(of.quantize.codebook, before)
        of.after_step(1)
        books.append(of.quantize.codebook)
    torch.testing.assert_close(*books)
    assert not torch.equal(books[0], before)


def test_evaluation_and_a_skipped_step_leave_the_codebook_alone():
    of = objective("vqkd")
    before = of.quantize.codebook.clone()
    of.eval()(batch(of), 0)
    of.after_step(1)
    of.train()(batch(of), 0)
    of.discard_pending()
    of.after_step(2)
    assert torch.equal(of.quantize.codebook, before)


def test_a_start_by_k_means_takes_its_numbers_from_the_batch():
    torch.manual_seed(0)
    books = []
    for seed in (0, 0, 1):
        of = objective("vqkd", kmeans_init=True).train()
        given = batch(of) | {"kmeans_noise": torch.rand(4, 12, generator=torch.Generator().manual_seed(seed))}
        of(given, 0)
        torch.rand(seed + 1)  # torch's own generator does not matter
        of.after_step(1)
        books.append(of.quantize.codebook)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])
    assert of.quantize.initted.item() == 1


def test_the_teacher_is_outside_of_checkpoints_and_another_one_is_refused():
    of = objective("vqkd")
    assert not any(name.startswith("teacher") for name in of.state_dict())
    assert not any(name.startswith("teacher") for name, _ in of.named_parameters())
    other = objective("vqkd", teacher=vit_release((16, 16), 8, 3))
    other.teacher.features(torch.rand(1, 3, 24, 32))  # of another size, yet it fits
    state = of.state_dict() | {"fingerprint.sha256": torch.zeros(32)}
    with pytest.raises(ConfigError, match=r"objective\.teacher.*\n.*is not what these weights were trained with"):
        other.load_state_dict(state)


def test_positions_and_class_tokens_do_not_decay():
    of = objective("vqkd")
    decays = {name for group in of.param_groups() for name in group["names"] if group["weight_decay_scale"]}
    assert "decoder.pos_embed" not in decays and "encoder.cls_token" not in decays and "decoder.cls_token" not in decays
    assert "encode_task_layer.0.weight" in decays


def test_both_transformers_start_as_beits_whose_outputs_are_smaller_the_later():
    torch.manual_seed(0)
    vit = ViT((24, 32), 8, 3, 64, 4, 2, pos_embed="learned", qkv_bias="no_key")
    of = VQKD(objective("vqkd", decoder_depth=2, decoder_embed_dim=64).config, vit, HORIZON)
    for network in (of.encoder, of.decoder):
        for i, block in enumerate(network.blocks, start=1):
            assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.05)
            assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_its_release_is_a_tokenizer_with_the_codes_of_the_objective(tmp_path):
    of = objective("vqkd").eval()
    stats = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    write_release(tmp_path / "r", of.backbone, objective="vqkd", extra_state=of.heads_state(), record={}, **stats)
    images = batch(of)["image"][:, 0]
    tokenizer = from_release(read_release(tmp_path / "r"))
    assert torch.equal(tokenizer.tokens(images), of.encode(images, {})[1].ids)


def test_views_are_those_of_the_official_training():
    image, teacher, kmeans = VQKDConfig(teacher="dino.pth").views(BASE)
    assert (image, teacher) == (
        ViewSpec("image", (224, 224), scale=(0.08, 1.0), hflip=0.5),
        ViewSpec("teacher_image", (224, 224), same_as="image", normalize=False),
    )
    assert kmeans == Noise("kmeans_noise", (196,))
    assert VQKDConfig(teacher="dino.pth").problems(BASE) == []


def test_a_teacher_with_other_patches_sees_the_picture_at_its_own_size():
    path = vit_release((24, 32), 8, 3)
    shape = Shape(size=(12, 16), patch_size=4)
    config = VQKDConfig(teacher=path)
    assert config.views(shape)[1].size == (24, 32) and config.problems(shape) == []  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "shape", "problem"),
    [
        ({"decoder_num_heads": 5}, Shape(), "objective.decoder_num_heads: 5 does not divide decoder_embed_dim 768"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0)}, Shape(in_chans=1), "objective.color_jitter: needs RGB"),
        ({"teacher_size": 20}, Shape(), "objective.teacher_size: 20 x 20 px and patches of 8 px do not give"),
        ({}, Shape(in_chans=6), "reads 3 channels, model.in_chans is 6"),
    ],
)
def test_impossible_settings_are_named_before_training(changes: dict, shape: Shape, problem: str):
    found = VQKDConfig(**reads("vqkd", (24, 32), 3) | changes).problems(shape)
    assert any(problem in line for line in found), found
