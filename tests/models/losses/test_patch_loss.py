from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses import prototype_stream
from pretrain.models.losses.patch_loss import mask_weights, patch_loss
from tests.models.losses.peak_memory import peak_bytes

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.05}


def draw(rows: int, prototypes: int, seed: int, *, dim: int = 8):
    torch.manual_seed(seed)
    layers = [Prototypes(dim, prototypes, unit_length=False) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.weight_v.normal_()
            layer.weight_g.uniform_(0.5, 2.0)
    student, teacher = (F.normalize(torch.randn(rows, dim), dim=-1) for _ in range(2))
    return student.requires_grad_(), layers[0], teacher, layers[1], torch.randn(prototypes) * 0.1, torch.rand(rows)


def plain(student: Tensor, layer: Prototypes, teacher: Tensor, teacher_layer: Prototypes, center: Tensor, w: Tensor):
    """The definition: every logit, in the type of the arguments."""

    def logits(x: Tensor, of: Prototypes) -> Tensor:
        v, g = of.weight_v.to(x.dtype), of.weight_g.to(x.dtype)
        return x @ (v * g / v.norm(dim=1, keepdim=True)).T

    targets = ((logits(teacher, teacher_layer) - center) / TEMPS["teacher_temp"]).softmax(-1).detach()
    logs = F.log_softmax(logits(student, layer) / TEMPS["student_temp"], dim=-1)
    return (w * -(targets * logs).sum(-1)).sum()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    prototypes=st.integers(2, 40),
    chunk=st.integers(1, 50),
    kept=st.sampled_from([0, 2**23]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_the_definition_in_fp64(rows, prototypes, chunk, kept, seed):
    student, layer, teacher, teacher_layer, center, weights = draw(rows, prototypes, seed)
    exact = (student.double(), layer, teacher.double(), teacher_layer, center.double(), weights.double())
    inputs, gradients = [student, layer.weight_v, layer.weight_g], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prototype_stream, "chunk_size", lambda rows, device: chunk)
        patch.setattr(prototype_stream, "KEPT_LOGITS", kept)
        ours = patch_loss(student, layer, teacher, teacher_layer, center, weights, **TEMPS).loss
        for loss in (plain(*exact), ours):
            gradients.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected.float(), atol=3e-5, rtol=3e-5)


def test_the_side_products_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prototype_stream, "chunk_size", lambda rows, device: 7)
    student, layer, teacher, teacher_layer, center, weights = draw(5, 30, 0)
    result = patch_loss(student, layer, teacher, teacher_layer, center, weights, **TEMPS)
    torch.testing.assert_close(result.teacher_sum, teacher_layer(teacher).sum(0).detach())
    torch.testing.assert_close(teacher_layer.sum_of_logits(teacher), result.teacher_sum)
    targets = ((teacher_layer(teacher) - center) / TEMPS["teacher_temp"]).softmax(-1)
    entropy = (-torch.xlogy(targets, targets).sum(-1) * weights).sum()
    torch.testing.assert_close(result.teacher_entropy, entropy.detach(), atol=1e-5, rtol=1e-5)


def test_a_batch_without_masked_patches_costs_nothing_and_still_reaches_every_parameter():
    student, layer, *rest = draw(0, 30, 0)
    loss = patch_loss(student, layer, *rest, **TEMPS).loss
    loss.backward()
    assert loss == 0 and not layer.weight_v.grad.any() and not layer.weight_g.grad.any()


def test_every_crop_with_masked_patches_counts_alike():
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    weights = mask_weights(mask)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))


def test_bf16_autocast_keeps_softmax_and_loss_in_fp32():
    student, layer, *rest = draw(9, 30, 0)
    exact = patch_loss(student, layer, *rest, **TEMPS).loss
    with torch.autocast("cpu", torch.bfloat16):
        result = patch_loss(student, layer, *rest, **TEMPS)
        result.loss.backward()
    for tensor in (result.loss, result.teacher_sum, student.grad, layer.weight_v.grad):
        assert tensor is not None and tensor.dtype == torch.float32
    torch.testing.assert_close(result.loss, exact, atol=0.1, rtol=0.02)


def test_at_65536_prototypes_it_takes_less_than_a_fifth_of_the_memory_of_the_logits():
    student, layer, *rest = draw(256, 65536, 0, dim=16)
    inputs = [student, layer.weight_v, layer.weight_g]
    ours = peak_bytes(lambda: torch.autograd.grad(patch_loss(student, layer, *rest, **TEMPS).loss, inputs))
    whole = peak_bytes(lambda: torch.autograd.grad(plain(student, layer, *rest), inputs))
    assert whole > 3 * 256 * 65536 * 4
    assert ours < whole / 5
