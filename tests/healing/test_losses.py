"""The distances of a student from its teacher, against brute force on small numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import kl_div

from modhifi.healing import losses
from modhifi.healing.losses import agreement, block_loss, output_loss


def test_the_divergence_is_that_of_the_softened_teacher_from_the_softened_student() -> None:
    torch.manual_seed(0)
    teacher, student, heat = torch.randn(3, 4), torch.randn(3, 4), 2.5
    total = 0.0
    for row_t, row_s in zip(teacher.tolist(), student.tolist(), strict=True):
        p, q = ([math.exp(x / heat) for x in row] for row in (row_t, row_s))
        p, q = ([x / sum(values) for x in values] for values in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert math.isclose(float(output_loss(teacher, student, temperature=heat)), heat**2 * total / 3, rel_tol=1e-5)


def test_a_closed_class_gets_no_probability_and_the_student_pays_for_its_own() -> None:
    teacher, student = torch.tensor([[2.0, 1.0, 5.0]]), torch.tensor([[2.0, 1.0, 5.0]], requires_grad=True)
    loss = output_loss(teacher, student, closed=(2,))
    others = torch.tensor([[2.0, 1.0]]).softmax(-1)
    wanted = (others * (others.log() - student.detach().log_softmax(-1)[:, :2])).sum()
    assert torch.isclose(loss, wanted)
    loss.backward()
    assert student.grad is not None and student.grad[0, 2] > 0  # a step down lowers the closed logit
    assert float(agreement(teacher, student.detach(), closed=(2,))) == 0.0
    assert float(agreement(teacher, torch.tensor([[2.0, 1.0, 0.0]]), closed=(2,))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heat", [0.5, 4.0])
def test_a_closed_class_costs_the_same_in_every_dtype(dtype: torch.dtype, heat: float) -> None:
    teacher, student = torch.tensor([[2.0, 1.0, 5.0]]), torch.tensor([[1.0, 2.0, 0.5]])
    wanted = output_loss(teacher, student, temperature=heat, closed=(2,))
    student = student.to(dtype).requires_grad_()
    loss = output_loss(teacher.to(dtype), student, temperature=heat, closed=(2,))
    loss.backward()
    assert torch.isclose(loss, wanted) and loss > 0
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    real = torch.tensor([[True, True, True], [True, False, False]])
    rows = torch.cat([output_loss(t[None], s[None])[None] for t, s in zip(teacher[real], student[real], strict=True)])
    assert torch.isclose(output_loss(teacher, student, real), rows.mean())
    blocks = (teacher - student)[real].square().sum(-1) / teacher[real].square().sum(-1)
    assert torch.isclose(block_loss([teacher], [student], real), blocks.mean())


def test_every_block_counts_the_same_whatever_its_scale() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    loss = block_loss([teacher, 100 * teacher], [student, 100 * student])
    wanted = (teacher - student).flatten(1).square().sum(1) / teacher.flatten(1).square().sum(1)
    assert torch.isclose(loss, wanted.mean())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_blocks_is_that_of_the_squares(
    dtype: torch.dtype, close: float, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    teacher, student = (torch.randn(2, 3, 4, 4).to(dtype).to(memory_format=layout) for _ in range(2))
    student.requires_grad_()
    (grad,) = torch.autograd.grad(block_loss([teacher], [student]), student)
    norms = teacher.double().square().sum((1, 2, 3), keepdim=True)
    assert torch.allclose(grad.double(), (student - teacher).double() / norms, rtol=close, atol=close / 100)
    assert grad.is_contiguous(memory_format=layout)


def test_maps_of_classes_count_position_by_position() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    rows = [t.movedim(0, -1).reshape(-1, 5) for t in (*teacher, *student)]
    assert torch.isclose(output_loss(teacher, student), output_loss(torch.cat(rows[:2]), torch.cat(rows[2:])))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("part", [1, 12, 2**20])
def test_the_gradient_of_the_divergence_is_that_of_soft_targets(
    dtype: torch.dtype, close: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows that are compared at a time: torch's own divergence, in float64."""
    monkeypatch.setattr(losses, "PART", part)
    torch.manual_seed(0)
    teacher, student = (torch.randn(2, 3, 5).to(dtype) for _ in range(2))
    real = torch.tensor([[True, True, True], [True, False, False]])
    student.requires_grad_()
    loss = output_loss(teacher, student, real, temperature=1.7, closed=(3,))
    loss.backward()
    exact = student.detach().double().requires_grad_()
    target = teacher.double().index_fill(-1, torch.tensor(3), -torch.inf).div(1.7).softmax(-1)
    rows = kl_div((exact / 1.7).log_softmax(-1), target, reduction="none").sum(-1)
    wanted = 1.7**2 * rows[real].mean()
    wanted.backward()
    assert student.grad is not None and exact.grad is not None
    assert torch.isclose(loss.double(), wanted, rtol=1e-5)
    assert torch.allclose(student.grad.double(), exact.grad, rtol=close, atol=close / 100)
    with torch.no_grad():
        assert torch.equal(output_loss(teacher, student, real, temperature=1.7, closed=(3,)), loss)
