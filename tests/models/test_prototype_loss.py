from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models import prototype_loss as module
from pretrain.models.prototype_loss import prototype_loss


def plain(student, weight, teacher, teacher_weight, center, student_temp, teacher_temp):
    """The definition: every pair, every logit."""
    targets = ((teacher @ teacher_weight.T - center) / teacher_temp).softmax(-1)
    logs = F.log_softmax(student @ weight.T / student_temp, dim=-1)
    pairs = [-(targets[q] * logs[v]).sum(-1).mean() for q in range(len(teacher)) for v in range(len(student)) if v != q]
    return torch.stack(pairs).mean(), targets


def draw(views: int, images: int, prototypes: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student, teacher = F.normalize(normal(views, images, 8), dim=-1), F.normalize(normal(2, images, 8), dim=-1)
    return student, normal(prototypes, 8), teacher, normal(prototypes, 8), normal(prototypes) * 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_loss_and_gradients_are_those_of_the_definition(views, images, prototypes, chunk, seed):
    student, weight, teacher, teacher_weight, center = draw(views, images, prototypes, seed)
    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_size", lambda rows, device: chunk)
        for function in (
            lambda s, w: plain(s, w, teacher, teacher_weight, center, 0.1, 0.05)[0],
            lambda s, w: (
                prototype_loss(s, w, teacher, teacher_weight, center, student_temp=0.1, teacher_temp=0.05).loss
            ),
        ):
            s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = function(s, w)
            (3 * loss).backward()
            gradients.append((loss, s.grad, w.grad))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_the_side_products_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "chunk_size", lambda rows, device: 7)
    student, weight, teacher, teacher_weight, center = draw(4, 3, 30, 0)
    result = prototype_loss(student, weight, teacher, teacher_weight, center, student_temp=0.1, teacher_temp=0.5)
    _, targets = plain(student, weight, teacher, teacher_weight, center, 0.1, 0.5)
    torch.testing.assert_close(result.teacher_sum, (teacher @ teacher_weight.T).sum((0, 1)))
    torch.testing.assert_close(result.teacher_entropy, -(targets * targets.log()).sum(-1).mean())
    mean = targets.mean((0, 1))
    torch.testing.assert_close(result.mean_entropy, -(mean * mean.log()).sum())


def test_nothing_is_kept_for_backward_without_gradients():
    student, weight, teacher, teacher_weight, center = draw(4, 3, 30, 0)
    with torch.no_grad():
        result = prototype_loss(
            student.requires_grad_(), weight, teacher, teacher_weight, center, student_temp=0.1, teacher_temp=0.5
        )
    assert result.loss.grad_fn is None


def test_a_second_backward_is_refused():
    student, weight, teacher, teacher_weight, center = draw(4, 3, 30, 0)
    loss = prototype_loss(
        student.requires_grad_(), weight, teacher, teacher_weight, center, student_temp=0.1, teacher_temp=0.5
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_bf16_autocast_keeps_softmax_and_loss_in_fp32():
    student, weight, teacher, teacher_weight, center = draw(4, 3, 30, 0)
    exact = prototype_loss(student, weight, teacher, teacher_weight, center, student_temp=0.1, teacher_temp=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        result = prototype_loss(s, w, teacher, teacher_weight, center, student_temp=0.1, teacher_temp=0.5)
        result.loss.backward()
    assert result.loss.dtype == result.teacher_sum.dtype == s.grad.dtype == w.grad.dtype == torch.float32
    torch.testing.assert_close(result.loss, exact.loss, atol=0.05, rtol=0.02)
