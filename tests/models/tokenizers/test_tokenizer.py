from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pretrain.core.configlib import ConfigError
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import facts
from pretrain.models.release.folder import read_release
from pretrain.models.tokenizers.dalle import DalleEncoder
from pretrain.models.tokenizers.quantizer import task_layer
from pretrain.models.tokenizers.tokenizer import from_release, open_tokenizer
from tests.objectives.released import NUM_TOKENS, dvae_release, vit_release, vqkd_release


def pictures(*size: int, chans: int = 3) -> torch.Tensor:
    return torch.rand(2, chans, *size, generator=torch.Generator().manual_seed(0))


def dalle_file(folder: Path) -> tuple[Path, DalleEncoder]:
    torch.manual_seed(0)
    encoder = DalleEncoder(width=8, num_tokens=20)
    torch.save(encoder, folder / "encoder.pkl")  # the whole module, as it was published
    return folder / "encoder.pkl", encoder


def vqkd_file(folder: Path) -> tuple[Path, ViT, torch.nn.Module, torch.Tensor]:
    """Weights with the names of the official checkpoint, decoder and optimizer included."""
    torch.manual_seed(0)
    vit = ViT((16, 16), 8, 3, 64, 2, 1, 2.0, pos_embed="learned", qkv_bias="no_key")
    task, codebook = task_layer(64, 4), F.normalize(torch.randn(12, 4), dim=1)
    torch.nn.init.normal_(task[2].weight)
    state = {f"encoder.{n}".replace("encoder.norm.", "encoder.fc_norm."): t for n, t in vit.state_dict().items()}
    state |= {f"encode_task_layer.{n}": t for n, t in task.state_dict().items()}
    state |= {"quantize.embedding.weight": codebook, "quantize.cluster_size": torch.zeros(12)}
    state |= {"decoder.cls_token": torch.zeros(1, 1, 64), "teacher_model.x": torch.zeros(2)}
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 99}, folder / "vqkd.pth")
    return folder / "vqkd.pth", vit, task, codebook


def test_a_release_of_dvae_gives_the_most_likely_code_of_every_place():
    path = dvae_release((16, 16), 4, 3)
    tokenizer, _ = open_tokenizer(path, size=(12, 16), grid=(3, 4), in_chans=3)
    images = pictures(12, 16)
    release = read_release(path)
    features = release.build().map((images - 0.5) / 0.25)  # type: ignore[operator]
    weight, bias = (release.heads[f"codes.to_logits.{name}"] for name in ("weight", "bias"))
    assert torch.equal(tokenizer.tokens(images), F.conv2d(features, weight, bias).argmax(1).flatten(1))
    ids = tokenizer.tokens(images).unflatten(1, (3, 4))
    decoded = tokenizer.decode(ids)
    assert decoded is not None and decoded.shape == images.shape and 0 <= decoded.min() <= decoded.max() <= 1
    assert tokenizer.num_tokens == NUM_TOKENS and len(tokenizer.tokens(images).unique()) > 1


def test_a_release_of_vqkd_gives_the_code_nearest_to_every_patch():
    path = vqkd_release((16, 16), 8, 3)
    tokenizer, _ = open_tokenizer(path, size=(16, 16), grid=(2, 2), in_chans=3)
    images, release = pictures(16, 16), read_release(path)
    tokens = release.build()((images - 0.5) / 0.25)[:, 1:]
    heads = {name.removeprefix("encode_task_layer."): t for name, t in release.heads.items() if "task" in name}
    task = task_layer(16, 4)
    task.load_state_dict(heads)
    similarity = F.normalize(task(tokens), dim=-1) @ release.heads["quantize.codebook"].T
    assert torch.equal(tokenizer.tokens(images), similarity.argmax(-1))
    assert tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64)) is None


@pytest.mark.parametrize(
    ("make", "grid"), [(lambda: dvae_release((16, 16), 4, 3), 16), (lambda: vqkd_release((16, 16), 8, 3), 4)]
)
def test_the_share_of_a_token_is_how_many_places_have_it(make, grid: int):
    release = read_release(make())
    trained = from_release(release)
    images = pictures(16, 16)
    shares = trained.shares(trained.normalize(images))
    ids = trained.tokens(images)
    for row, tokens in zip(shares, ids, strict=True):
        assert torch.allclose(row * grid, torch.bincount(tokens, minlength=trained.num_tokens).float())
    torch.manual_seed(1)
    assert not torch.equal(from_release(release, trained=False).tokens(images), ids)


def test_the_published_encoder_of_dalle_opens_without_its_package(tmp_path: Path):
    path, encoder = dalle_file(tmp_path)
    tokenizer, _ = open_tokenizer(path, size=(16, 24), grid=(2, 3), in_chans=3)
    images = pictures(16, 24)
    assert torch.equal(tokenizer.tokens(images), encoder(images).argmax(1).flatten(1))
    assert tokenizer.num_tokens == 20


@pytest.mark.parametrize("safe", [False, True])
def test_official_vqkd_weights_open_and_see_pixels_from_minus_one_to_one(
    tmp_path: Path, safe: bool, monkeypatch: pytest.MonkeyPatch
):
    small = (facts.Model("small", 64, 2, 1),)
    others = [one for one in facts.PROJECTS if "vqkd" not in one.kinds]
    monkeypatch.setattr(facts, "PROJECTS", [*others, facts.Project("VQ-KD", ("vqkd",), small, "", "")])
    path, vit, task, codebook = vqkd_file(tmp_path)
    if safe:
        state = torch.load(path)["model"]
        path = tmp_path / "vqkd.safetensors"
        save_file(state, path)
    tokenizer, _ = open_tokenizer(path, size=(16, 16), grid=(2, 2), in_chans=3)
    images = pictures(16, 16)
    features = F.normalize(task(vit(images * 2 - 1)[:, 1:]), dim=-1)
    assert torch.equal(tokenizer.tokens(images), (features @ codebook.T).argmax(-1))


def test_tokens_are_the_same_under_autocast_and_in_training():
    tokenizer, _ = open_tokenizer(vqkd_release((16, 16), 8, 3), size=(16, 16), grid=(2, 2), in_chans=3)
    images = pictures(16, 16)
    expected = tokenizer.tokens(images)
    tokenizer.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.tokens(images), expected)
    assert not tokenizer.training and not any(module.training for module in tokenizer.modules())


def test_a_tokenizer_has_nothing_to_train_and_nothing_to_save(tmp_path: Path):
    for path, size, grid in (
        (dvae_release((16, 16), 4, 3), (8, 8), (2, 2)),
        (vqkd_release((16, 16), 8, 3), (16, 16), (2, 2)),
        (dalle_file(tmp_path)[0], (16, 16), (2, 2)),
    ):
        tokenizer, _ = open_tokenizer(path, size=size, grid=grid, in_chans=3)
        assert not list(tokenizer.parameters()) and not tokenizer.state_dict()
        assert {buffer.dtype for buffer in tokenizer.buffers()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "size", "grid", "chans", "problem"),
    [
        (lambda: dvae_release((16, 16), 4, 3), (16, 16), (2, 2), 3, r"give 4 x 4 tokens, but .* 2 x 2 .*\[8, 8\]"),
        (lambda: dvae_release((16, 16), 4, 3), (10, 8), (2, 2), 3, r"tokenizer_size: \[8, 8\]"),
        (lambda: vqkd_release((16, 16), 8, 3), (32, 32), (4, 4), 3, "was trained on 2 x 2 tokens, but the model has 4"),
        (lambda: dvae_release((16, 16), 4, 3), (8, 8), (2, 2), 1, "reads 3 channels, model.in_chans is 1"),
        (lambda: vit_release((16, 16), 8, 3), (16, 16), (2, 2), 3, "a release of mae is no tokenizer"),
        (lambda: "nowhere", (16, 16), (2, 2), 3, "nowhere: no such file, and no release folder"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, size: tuple, grid: tuple, chans: int, problem: str):
    with pytest.raises(ConfigError, match=problem):
        open_tokenizer(make(), size=size, grid=grid, in_chans=chans)


def test_weights_of_something_else_are_refused_by_name(tmp_path: Path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"not a known tokenizer .* fc\.weight"):
        open_tokenizer(tmp_path / "other.pth", size=(16, 16), grid=(2, 2), in_chans=3)


def test_another_tokenizer_is_refused_when_a_run_goes_on(tmp_path: Path):
    path, _ = dalle_file(tmp_path)
    _, first = open_tokenizer(path, size=(16, 16), grid=(2, 2), in_chans=3)
    torch.manual_seed(1)
    torch.save(DalleEncoder(width=8, num_tokens=20), path)
    _, second = open_tokenizer(path, size=(16, 16), grid=(2, 2), in_chans=3)
    first.load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match=r"encoder.pkl is not what these weights were trained with: sha256 \w{12}"):
        second.load_state_dict(first.state_dict())
