"""ema_update_."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncmask_kernels as smk
from reference.ops.momentum import ema
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(5, 3), (7,), (), (0, 2), (2, 3, 4)]


def parameters(dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.995, 1.0])
def test_equals_oracle(dtype, momentum):
    torch.manual_seed(0)
    teacher, student = parameters(dtype), parameters(dtype)
    truth = ema([t.double() for t in teacher], [s.double() for s in student], momentum)
    plain = ema(teacher, student, momentum)
    smk.ema_update_(teacher, student, momentum)
    assert all(t.dtype == dtype for t in teacher)
    assert_as_accurate(*(torch.cat([x.flatten() for x in xs]) for xs in (teacher, plain, truth)))


def test_ends_are_exact():
    teacher, student = parameters(), parameters()
    before = [t.clone() for t in teacher]
    smk.ema_update_(teacher, student, 1.0)
    assert all(map(torch.equal, teacher, before))
    smk.ema_update_(teacher, student, 0.0)
    assert all(map(torch.equal, teacher, student))


def test_modules_keep_their_storage_and_gradients():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    student[1].running_mean.fill_(7.0)
    pointers = [p.data_ptr() for p in teacher.parameters()]
    want = ema(list(teacher.parameters()), list(student.parameters()), 0.9)
    student(torch.randn(2, 3)).sum().backward()
    smk.ema_update_(teacher, student, 0.9)
    assert [p.data_ptr() for p in teacher.parameters()] == pointers
    for p, value in zip(teacher.parameters(), want, strict=True):
        torch.testing.assert_close(p, value, rtol=1e-6, atol=1e-7, check_layout=False)
        assert p.requires_grad
        assert p.grad is None
        assert p.grad_fn is None
    assert (teacher[1].running_mean == 0).all()


def normed() -> nn.Module:
    """With running statistics and a count of batches."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module(torch.randn(5, 3))
    return module


def test_buffers():
    torch.manual_seed(0)
    for buffers in ("keep", "copy", "move"):
        teacher, student = normed(), normed()
        student(torch.randn(5, 3) + 1)
        before = [b.clone() for b in teacher.buffers()]
        pointers = [b.data_ptr() for b in teacher.buffers()]
        own = list(student.buffers())
        moved = [
            *ema([b.double() for b in before[:2]], [b.double() for b in own[:2]], 0.75),
            own[2],
        ]
        smk.ema_update_(teacher, student, 0.75, buffers=buffers)
        wanted = {"keep": before, "copy": own, "move": moved}[buffers]
        for got, value in zip(teacher.buffers(), wanted, strict=True):
            torch.testing.assert_close(got, value.to(got.dtype), rtol=1e-6, atol=1e-7)
        assert [b.data_ptr() for b in teacher.buffers()] == pointers
        assert own[2] == 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_momentum_as_a_tensor(dtype):
    """The same bits as of a number, whatever types there are."""
    torch.manual_seed(0)
    teacher, student = parameters(dtype) + parameters(), parameters() + parameters(dtype)
    same = [t.clone() for t in teacher]
    smk.ema_update_(teacher, student, 0.75)
    smk.ema_update_(same, student, torch.tensor(0.75))
    assert all(map(torch.equal, same, teacher))
    smk.ema_update_(same, student, torch.tensor(0.0))
    assert all(torch.equal(t, s.to(t.dtype)) for t, s in zip(same, student, strict=True))


def test_tied_parameters_move_once():
    teacher, student = nn.ModuleList([nn.Linear(2, 2)] * 2), nn.ModuleList([nn.Linear(2, 2)] * 2)
    (wanted, _) = ema(list(teacher.parameters()), list(student.parameters()), 0.5)
    smk.ema_update_(teacher, student, 0.5)
    torch.testing.assert_close(teacher[0].weight, wanted)


def test_a_student_of_another_type():
    teacher, student = [torch.zeros(4)], [torch.ones(4, dtype=torch.bfloat16)]
    smk.ema_update_(teacher, student, 0.995)
    torch.testing.assert_close(teacher[0], torch.full((4,), 0.005))


def test_iterators_and_nothing():
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    smk.ema_update_(teacher.parameters(), student.parameters(), 0.0)
    assert torch.equal(teacher.weight, student.weight)
    smk.ema_update_([], [], 0.5)


def test_views_move_in_place():
    flat = torch.zeros(6)
    smk.ema_update_([flat[:3], flat[3:].view(3, 1)], [torch.ones(3), torch.ones(3, 1)], 0.5)
    assert flat.tolist() == [0.5] * 6


def test_compile():
    def step(teacher, student):
        moved = teacher.clone()
        smk.ema_update_([moved], [student], 0.9)
        return moved

    assert_compiles_once(step, [(torch.randn(n, 3), torch.randn(n, 3)) for n in (4, 7)])


def test_compiles_with_momentum_as_a_tensor():
    def step(teacher, student, momentum):
        moved = teacher.clone()
        smk.ema_update_([moved], [student], momentum)
        return moved

    calls = [(torch.randn(n, 3), torch.randn(n, 3), torch.tensor(0.1 * n)) for n in (4, 7)]
    assert_compiles_once(step, calls)


def test_never_asks_the_host():
    smk.ema_update_([torch.zeros(3, device="meta")], [torch.ones(3, device="meta")], 0.9)
    momentum = torch.tensor(0.5, device="meta")
    smk.ema_update_([torch.zeros(3, device="meta")], [torch.ones(3, device="meta")], momentum)


ONE = torch.zeros(2)


@pytest.mark.parametrize(
    ("teacher", "student", "momentum", "error", "text"),
    [
        ([ONE], [ONE, ONE], 0.5, ValueError, "student must have the teacher's 1 parameters, got 2"),
        ([ONE], [ONE[:1]], 0.5, ValueError, r"student\[0\] must be the shape of teacher\[0\]"),
        ([ONE], [ONE.to("meta")], 0.5, ValueError, r"student\[0\] must be on the device"),
        ([ONE.long()], [ONE], 0.5, TypeError, r"teacher\[0\] must be of type"),
        ([ONE], ["x"], 0.5, TypeError, r"student\[0\] must be a torch.Tensor, got str"),
        ([ONE], [ONE.int()], 0.5, TypeError, r"student\[0\] must be of type"),
        ([ONE], [ONE], 1.5, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
        ([ONE], [ONE], "x", TypeError, "momentum must be a number, got str"),
        ([ONE], [ONE], ONE, ValueError, r"momentum must be one value = \(\)"),
        ([ONE], [ONE], torch.tensor(1), TypeError, "momentum must be of type float16"),
        ([ONE], [ONE], ONE[0].to("meta"), ValueError, "momentum must be on the device of teacher"),
    ],
)
def test_bad_input(teacher, student, momentum, error, text):
    with pytest.raises(error, match=text):
        smk.ema_update_(teacher, student, momentum)


def test_bad_buffers():
    module = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="buffers must be one of 'keep', 'copy', 'move', got 'x'"):
        smk.ema_update_(module, module, 0.5, buffers="x")
    with pytest.raises(ValueError, match="buffers are those of modules, got lists of parameters"):
        smk.ema_update_(module.parameters(), module, 0.5, buffers="copy")
    other = nn.BatchNorm1d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="student must have the teacher's 3 buffers, got 0"):
        smk.ema_update_(module, other, 0.5, buffers="move")
