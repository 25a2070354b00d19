from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses import prototype_stream as module
from pretrain.models.losses.prototype_loss import prototype_loss
from tests.models.losses.peak_memory import peak_bytes

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.05}


def plain(student: Tensor, layer: Prototypes, teacher: Tensor, teacher_layer: Prototypes, center: Tensor):
    """The definition: every pair, every logit. (loss, teacher probabilities)"""
    targets = ((teacher_layer(teacher) - center) / TEMPS["teacher_temp"]).softmax(-1).detach()
    logs = F.log_softmax(layer(student) / TEMPS["student_temp"], dim=-1)
    crops = range(len(student))
    pairs = [-(targets[q] * logs[v]).sum(-1).mean() for q in range(len(teacher)) for v in crops if v != q]
    return torch.stack(pairs).mean(), targets


def draw(views: int, images: int, prototypes: int, seed: int, *, unit_length: bool = False):
    torch.manual_seed(seed)
    layers = [Prototypes(8, prototypes, unit_length=unit_length) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.weight_v.normal_()
            layer.weight_g.uniform_(0.5, 2.0)
    student, teacher = (
        F.normalize(torch.randn(views, images, 8), dim=-1),
        F.normalize(torch.randn(2, images, 8), dim=-1),
    )
    return student.requires_grad_(), layers[0], teacher, layers[1], torch.randn(prototypes) * 0.1


@settings(max_examples=30, deadline=None)
@given(
    views=st.integers(2, 6),
    images=st.integers(1, 4),
    prototypes=st.integers(2, 40),
    chunk=st.integers(1, 50),
    kept=st.sampled_from([0, 2**23]),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_the_definition(views, images, prototypes, chunk, kept, seed):
    student, layer, *rest = draw(views, images, prototypes, seed)
    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_size", lambda rows, device: chunk)
        patch.setattr(module, "KEPT_LOGITS", kept)
        for loss in (plain(student, layer, *rest)[0], prototype_loss(student, layer, *rest, **TEMPS).loss):
            inputs = [student, layer.weight_v, layer.weight_g]
            gradients.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=3e-4)


def test_the_side_products_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "chunk_size", lambda rows, device: 7)
    student, layer, teacher, teacher_layer, center = draw(4, 3, 30, 0)
    result = prototype_loss(student, layer, teacher, teacher_layer, center, **TEMPS)
    _, targets = plain(student, layer, teacher, teacher_layer, center)
    torch.testing.assert_close(result.by_crop.sum(), result.loss)
    torch.testing.assert_close(result.teacher_sum, teacher_layer(teacher).sum((0, 1)).detach())
    entropy = -torch.xlogy(targets, targets).sum(-1).mean()
    torch.testing.assert_close(result.teacher_entropy, entropy, atol=1e-5, rtol=1e-5)
    mean = targets.mean((0, 1))
    torch.testing.assert_close(result.mean_entropy, -torch.xlogy(mean, mean).sum())
    assert not any(value.requires_grad for value in result[1:])


def test_prototypes_of_unit_length_learn_their_direction_only():
    student, layer, *rest = draw(4, 3, 30, 0, unit_length=True)
    prototype_loss(student, layer, *rest, **TEMPS).loss.backward()
    assert layer.weight_g.grad is None
    along = torch.linalg.vecdot(layer.weight_v.grad, layer.weight_v.detach())
    torch.testing.assert_close(along, torch.zeros(30), atol=1e-6, rtol=0)


def test_nothing_is_kept_for_backward_without_gradients():
    given = draw(4, 3, 30, 0)
    with torch.no_grad():
        quiet = prototype_loss(*given, **TEMPS).loss
    assert quiet.grad_fn is None and torch.equal(quiet, prototype_loss(*given, **TEMPS).loss.detach())


def test_a_second_backward_is_refused():
    loss = prototype_loss(*draw(4, 3, 30, 0), **TEMPS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_bf16_autocast_keeps_softmax_and_loss_in_fp32():
    student, layer, *rest = draw(4, 3, 30, 0)
    exact = prototype_loss(student, layer, *rest, **TEMPS).loss
    with torch.autocast("cpu", torch.bfloat16):
        result = prototype_loss(student, layer, *rest, **TEMPS)
        result.loss.backward()
    for tensor in (result.loss, result.teacher_sum, student.grad, layer.weight_v.grad):
        assert tensor is not None and tensor.dtype == torch.float32
    torch.testing.assert_close(result.loss, exact, atol=0.1, rtol=0.02)


def test_at_65536_prototypes_it_takes_less_than_a_fifth_of_the_memory_of_the_logits():
    student, layer, *rest = draw(6, 32, 65536, 0)
    inputs = [student, layer.weight_v, layer.weight_g]
    ours = peak_bytes(lambda: torch.autograd.grad(prototype_loss(student, layer, *rest, **TEMPS).loss, inputs))
    whole = peak_bytes(lambda: torch.autograd.grad(plain(student, layer, *rest)[0], inputs))
    assert whole > 2 * (6 + 2) * 32 * 65536 * 4
    assert ours < whole / 5


def test_linear_prototypes_and_weights_of_crops_give_the_gradients_of_the_definition():
    torch.manual_seed(0)
    layers = [Prototypes(8, 30, unit_length=False, linear=True) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.weight_v.normal_()
    student = F.normalize(torch.randn(4, 3, 8), dim=-1).requires_grad_()
    teacher, center, weights = F.normalize(torch.randn(2, 3, 8), dim=-1), torch.randn(30) * 0.1, [1.0, 1.0, 0.3, 0.0]
    targets = ((layers[1](teacher) - center) / TEMPS["teacher_temp"]).softmax(-1).detach()
    logs = F.log_softmax(student @ layers[0].weight_v.T / TEMPS["student_temp"], dim=-1)
    pairs = {(q, v): -(targets[q] * logs[v]).sum(-1).mean() / 6 for q in range(2) for v in range(4) if v != q}
    shares = torch.stack([sum(pair for (_, v), pair in pairs.items() if v == crop) for crop in range(4)])
    result = prototype_loss(student, layers[0], teacher, layers[1], center, **TEMPS, crop_weights=weights)
    torch.testing.assert_close(result.by_crop, shares.detach(), atol=1e-5, rtol=1e-5)
    both = [shares @ torch.tensor(weights), result.loss]
    gradients = [[loss, *torch.autograd.grad(loss, [student, layers[0].weight_v])] for loss in both]
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert layers[0].weight_g is None and list(layers[0].state_dict()) == ["weight_v"]
