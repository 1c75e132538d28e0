"""masked_linear_cross_entropy where the host knows the rows: parts, blocks, memory, backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import syncmask_kernels as smk
from reference.ops import losses as oracle
from syncmask_kernels.backends.eager import losses_known_rows
from tests.test_losses_cross_entropy import Case, D, V, double, gradients

FORMS = [("bias",), ("bias", "smoothing", "soft", "sum"), ("ids", "smoothing", "teacher")]
DTYPES = {"eager": torch.float64, "cpu": torch.float32}  # the widest that the backend serves
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
}


def assert_close(got, truth):
    torch.testing.assert_close(got, truth.to(got.dtype), **TOLERANCES[got.dtype])


@pytest.fixture
def small(monkeypatch):
    """Three rows at a time where the gradient of the weight has no room, blocks of a few words."""
    monkeypatch.setattr(losses_known_rows, "SPARE_LOGITS", 3 * V)
    monkeypatch.setattr(losses_known_rows, "BLOCK", 40)
    monkeypatch.setattr(losses_known_rows, "WORDS", 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tokens", [2, 16], ids=["room to spare", "more rows than room"])
@pytest.mark.parametrize("names", FORMS, ids=", ".join)
def test_parts_and_blocks(backend, names, tokens):
    case = Case(DTYPES[backend], batch=5, tokens=tokens)
    assert (2 * case.count < D) == (tokens == 2)
    options = case.options(names)
    got = gradients(smk.masked_linear_cross_entropy, case, options)
    truth = gradients(oracle.masked_linear_cross_entropy, case, options, double)
    for value, want in zip(got, truth, strict=True):
        assert_close(value, want)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("names", FORMS[1:], ids=", ".join)
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_only_the_gradients_asked_for(backend, names, asked):
    case = Case(DTYPES[backend], batch=5)
    options = case.options(names)
    options["bias"] = case.bias
    _, *all_gradients = gradients(smk.masked_linear_cross_entropy, case, options)
    options["bias"] = case.bias.requires_grad_(2 in asked)
    inputs = [case.hidden.requires_grad_(0 in asked), case.weight.requires_grad_(1 in asked)]
    loss = smk.masked_linear_cross_entropy(*inputs, case.labels, **options)
    assert loss.requires_grad == bool(asked)
    leaves = [[*inputs, options["bias"]][i] for i in asked]
    for i, got in zip(asked, torch.autograd.grad(loss, leaves) if asked else (), strict=True):
        assert_close(got, all_gradients[i])


@pytest.mark.parametrize("names", FORMS, ids=", ".join)
def test_gradients_of_gradients(names):
    case = Case(torch.float64, batch=2, tokens=4)
    options = case.options(names)
    inputs = [case.hidden, case.weight, options.pop("bias", case.bias)]

    def loss(hidden, weight, bias):
        return smk.masked_linear_cross_entropy(hidden, weight, case.labels, bias=bias, **options)

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.usefixtures("small")
def test_words_without_a_chance(backend):
    """As if there were no such words, even where they fill a block."""
    case = Case(DTYPES[backend], batch=5)
    case.labels[(case.labels >= 0) & (case.labels < 9)] = 9
    case.bias[:9] = -torch.inf
    loss, *of_head = gradients(smk.masked_linear_cross_entropy, case, case.options(["bias"]))
    case.labels[case.labels != -100] -= 9
    case.weight, case.bias = case.weight[9:], case.bias[9:]
    options = case.options(["bias"])
    want, *of_rest = gradients(oracle.masked_linear_cross_entropy, case, options, double)
    got = loss, of_head[0], of_head[1][9:], of_head[2][9:]
    for value, true in zip(got, (want, *of_rest), strict=True):
        assert_close(value, true)
    assert not of_head[1][:9].any()


def test_a_second_backward_pass(backend):
    case = Case(DTYPES[backend])
    inputs = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    loss = smk.masked_linear_cross_entropy(*inputs, case.labels)
    first = torch.autograd.grad(loss, inputs, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for three, one in zip(first, second, strict=True):
        assert_close(three, 3 * one)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Storages(TorchDispatchMode):
    """The sizes of the memory of what operations return."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.add(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("distilled", [False, True])
def test_logits_take_no_memory_of_their_own(backend, distilled):
    rows, vocabulary, width = 30, 20_000, 64
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    teacher = (torch.randn(rows, width), torch.randn(vocabulary, width), None)
    options = {"teacher": teacher, "alpha": 0.4} if distilled else {}
    with Storages() as storages:
        smk.masked_linear_cross_entropy(hidden, weight, torch.arange(rows), **options).backward()
    assert weight.grad is not None
    storages.sizes.discard(weight.nbytes)
    assert max(storages.sizes) <= 4 * losses_known_rows.BLOCK < 4 * rows * vocabulary
