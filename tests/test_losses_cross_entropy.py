"""masked_linear_cross_entropy."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

import syncmask_kernels as smk
from reference.ops import losses as oracle
from syncmask_kernels import backends
from syncmask_kernels.backends.eager import losses as eager
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once

B, T, D, V = 3, 7, 10, 23
NAN = math.nan


class Case:
    """Random inputs, a third of the rows labelled, one batch row not at all."""

    def __init__(self, dtype=torch.float32, batch=B, tokens=T, seed=0, weight_dtype=None):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        weight_dtype = weight_dtype or dtype
        self.hidden = normal(batch, tokens, D).to(dtype)
        self.weight, self.bias = normal(V, D).to(weight_dtype), normal(V).to(weight_dtype)
        self.labels = torch.randint(V, (batch, tokens), generator=generator)
        labelled = torch.rand(batch, tokens, generator=generator) < 0.4
        labelled[0] = False
        self.labels[~labelled] = -100
        self.ids = smk.topk_mask(labelled.float(), k=tokens, valid=labelled).ids
        self.soft = normal(batch, tokens, V).softmax(dim=-1)
        self.teacher = (
            normal(batch, tokens, D).to(dtype),
            normal(V, D).to(dtype),
            normal(V).to(dtype),
        )
        self.count = int(labelled.sum())

    def options(self, names):
        given = {
            "bias": {"bias": self.bias},
            "ids": {"ids": self.ids},
            "capacity": {"capacity": self.count},
            "roomy": {"capacity": self.count + 5},
            "smoothing": {"label_smoothing": 0.1},
            "soft": {"soft_labels": self.soft, "alpha": 0.4},
            "teacher": {"teacher": self.teacher, "alpha": 0.4},
            "teacher without bias": {"teacher": (*self.teacher[:2], None), "alpha": 1.0},
            "sum": {"reduction": "sum"},
            "none": {"reduction": "none"},
        }
        return {key: value for name in names for key, value in given[name].items()}


def double(value):
    if isinstance(value, tuple):
        return tuple(double(v) for v in value)
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def plain(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    soft_labels=None,
    teacher=None,
    alpha=0.0,
    label_smoothing=0.0,
    reduction="mean",
    ids=None,
    capacity=None,
):
    """What a user of PyTorch writes: all logits in the type of the input, then float32."""
    logits = F.linear(hidden, weight, bias).float().flatten(0, 1)
    flat = labels.flatten()
    loss = F.cross_entropy(logits, flat, label_smoothing=label_smoothing, reduction="none")
    if teacher is not None:
        soft_labels = F.linear(*teacher).float().softmax(dim=-1)
    if soft_labels is not None:
        soft = -(soft_labels.flatten(0, 1) * logits.log_softmax(dim=-1)).sum(dim=-1)
        loss = ((1 - alpha) * loss + alpha * soft) * (flat != -100)
    if reduction == "none":
        return loss.reshape(labels.shape)
    return loss.sum() / ((flat != -100).sum() if reduction == "mean" else 1)


def gradients(function, case, options, convert=lambda value: value):
    """The loss and its gradients for hidden, weight and (where given) bias."""
    options = {key: convert(value) for key, value in options.items()}
    inputs = [convert(case.hidden), convert(case.weight)]
    inputs += [options["bias"]] if "bias" in options else []
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    if "bias" in options:
        options["bias"] = inputs[2]
    loss = function(inputs[0], inputs[1], case.labels, **options)
    # A cotangent that differs between rows.
    scale = torch.arange(1, loss.numel() + 1).reshape(loss.shape) / loss.numel()
    (loss * scale).sum().backward()
    return [loss.detach(), *(x.grad for x in inputs)]


CASES = [
    (),
    ("bias",),
    ("ids",),
    ("capacity",),
    ("roomy", "bias"),
    ("sum",),
    ("none", "bias"),
    ("none", "ids"),
    ("none", "roomy"),
    ("smoothing", "bias"),
    ("soft",),
    ("soft", "ids", "smoothing"),
    ("teacher", "bias"),
    ("teacher", "ids", "sum"),
    ("teacher", "capacity", "none"),
    ("teacher without bias",),
]


@pytest.fixture(params=["looks up", "streams"])
def path(request, monkeypatch):
    """The CPU knows which rows are labelled; what a GPU does instead runs on it all the same.

    Where C++ serves too (sums in float32), tests add "in C++".
    """
    if request.param == "streams":
        monkeypatch.setattr(eager, "_host_counts", lambda labels: False)
        monkeypatch.setattr(eager, "STREAM_LOGITS", 15 * V)
    backend = "cpu" if request.param == "in C++" else "eager"
    reason = backends.BACKENDS[backend].unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    with smk.use_backend(backend):
        yield


def on_paths(name, values, summed):
    """Parametrize `path` too: every value in plain PyTorch, the `summed` ones in C++."""
    runs = [*product(["looks up", "streams"], values), *product(["in C++"], summed)]
    return pytest.mark.parametrize(("path", name), runs, indirect=["path"], ids=str)


HALVES = [torch.float16, torch.bfloat16]
SUMMED = [names for names in CASES if "none" not in names]


@on_paths("form", product(CASES, [*HALVES, torch.float32]), product(SUMMED, [torch.float32]))
def test_loss_and_gradients_against_the_truth(path, form):
    names, dtype = form
    case = Case(dtype, batch=4, tokens=15)
    options = case.options(names)
    got = gradients(smk.masked_linear_cross_entropy, case, options)
    same_type = gradients(plain, case, options)
    truth_options = {key: value for key, value in options.items() if key != "capacity"}
    truth = gradients(oracle.masked_linear_cross_entropy, case, truth_options, double)
    assert got[0].dtype == torch.float32
    for value, own, want in zip(got, same_type, truth, strict=True):
        assert_as_accurate(value, own, want, factor=2.0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("names", CASES, ids=", ".join)
def test_float64_equals_oracle(names):
    case = Case(torch.float64)
    options = case.options(names)
    got = gradients(smk.masked_linear_cross_entropy, case, options)
    options.pop("capacity", None)
    truth = gradients(oracle.masked_linear_cross_entropy, case, options, double)
    for value, want in zip(got, truth, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("names", [(), ("bias", "smoothing", "teacher"), ("ids", "soft", "none")])
def test_gradcheck(names):
    case = Case(torch.float64, batch=2, tokens=4)
    options = case.options(names)
    inputs = [case.hidden, case.weight, *([options.pop("bias")] if "bias" in options else [])]

    def loss(hidden, weight, bias=None):
        return smk.masked_linear_cross_entropy(hidden, weight, case.labels, bias=bias, **options)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_flat_rows_equal_batched_rows(backend):
    case = Case()
    options = case.options(["bias", "soft"])
    batched = smk.masked_linear_cross_entropy(case.hidden, case.weight, case.labels, **options)
    options["soft_labels"] = options["soft_labels"].flatten(0, 1)
    args = case.hidden.flatten(0, 1), case.weight, case.labels.flatten()
    assert torch.equal(batched, smk.masked_linear_cross_entropy(*args, **options))
    ids = (case.labels.flatten() != -100).nonzero().squeeze(1)
    assert torch.equal(batched, smk.masked_linear_cross_entropy(*args, ids=ids, **options))
    with smk.use_backend("eager"):
        rows = smk.masked_linear_cross_entropy(*args, reduction="none")
    assert rows.shape == (B * T,)


@pytest.mark.usefixtures("path")
def test_ids_leave_labelled_rows_out():
    case = Case(torch.float64)
    ids = case.ids.clone()
    ids[1, 0] = -1
    for reduction in ("mean", "sum", "none"):
        args = case.hidden, case.weight, case.labels
        got = smk.masked_linear_cross_entropy(*args, ids=ids, reduction=reduction)
        want = oracle.masked_linear_cross_entropy(*args, ids=ids, reduction=reduction)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    full = smk.masked_linear_cross_entropy(*args, reduction="sum")
    assert full > smk.masked_linear_cross_entropy(*args, ids=ids, reduction="sum")


@on_paths("reduction", ["mean", "sum", "none"], ["mean", "sum"])
@pytest.mark.parametrize(
    "names", [(), ("ids",), ("capacity",), ("roomy",), ("teacher", "smoothing")]
)
def test_no_labels_is_zero_with_zero_gradients(path, names, reduction):
    case = Case()
    case.labels.fill_(-100)
    case.ids.fill_(-1)
    case.count = 0
    options = {"reduction": reduction, **case.options([*names, "bias"])}
    for result in gradients(smk.masked_linear_cross_entropy, case, options):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0,)])
@pytest.mark.parametrize("names", [{}, {"capacity": 4}, "ids"])
def test_no_rows(shape, names):
    hidden = torch.zeros(*shape, D, requires_grad=True)
    weight = torch.ones(V, D, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    ids = torch.full((*shape[:-1], 2), -1)
    options = {"ids": ids} if names == "ids" else names
    loss = smk.masked_linear_cross_entropy(hidden, weight, labels, **options)
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros(V, D))
    rows = smk.masked_linear_cross_entropy(hidden, weight, labels, reduction="none", **options)
    assert rows.shape == shape


@on_paths("reduction", ["mean", "sum", "none"], ["mean", "sum"])
def test_rows_beyond_the_capacity_make_everything_nan(path, reduction):
    case = Case()
    options = {"capacity": case.count - 1, "bias": case.bias, "reduction": reduction}
    results = gradients(smk.masked_linear_cross_entropy, case, options)
    loss, hidden_grad, weight_grad, bias_grad = results
    assert loss.isnan().all()
    assert weight_grad.isnan().all()
    assert bias_grad.isnan().all()
    assert hidden_grad.isnan().any()


@on_paths("names", *[[(), ("ids",), ("capacity",), ("soft",), ("teacher",)]] * 2)
def test_rows_without_a_label_are_never_used(path, names):
    case = Case()
    options = case.options([*names, "bias"])
    want = gradients(smk.masked_linear_cross_entropy, case, options)
    unused = case.labels == -100
    case.hidden[unused] = NAN
    case.soft[unused] = NAN
    case.teacher[0][unused] = NAN
    options = case.options([*names, "bias"])
    got = gradients(smk.masked_linear_cross_entropy, case, options)
    for value, finite in zip(got, want, strict=True):
        assert torch.equal(value, finite)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("ignore_index", [-1, 0, 5, V + 9])
def test_ignore_index(ignore_index):
    case = Case(torch.float64)
    labels = torch.where(case.labels == -100, ignore_index, case.labels)
    args = case.hidden, case.weight, labels
    got = smk.masked_linear_cross_entropy(*args, ignore_index=ignore_index)
    want = oracle.masked_linear_cross_entropy(*args, ignore_index=ignore_index)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_the_teacher_is_a_constant(backend):
    case = Case()
    teacher = [x.requires_grad_() for x in case.teacher]
    hidden = case.hidden.requires_grad_()
    smk.masked_linear_cross_entropy(
        hidden, case.weight, case.labels, teacher=tuple(teacher), alpha=0.5
    ).backward()
    assert all(x.grad is None for x in teacher)
    assert hidden.grad.abs().sum() > 0


def test_alpha_as_a_tensor(backend):
    case = Case()
    args = case.hidden, case.weight, case.labels
    number = smk.masked_linear_cross_entropy(*args, soft_labels=case.soft, alpha=0.25)
    tensor = smk.masked_linear_cross_entropy(*args, soft_labels=case.soft, alpha=torch.tensor(0.25))
    assert torch.equal(number, tensor)


def test_views(backend):
    case = Case()
    wide = torch.randn(B, D, 2 * T)
    hidden, weight = wide.transpose(1, 2)[:, ::2], torch.randn(D, V).t()
    labels = case.labels.t().contiguous().t()
    got = smk.masked_linear_cross_entropy(hidden, weight, labels)
    want = smk.masked_linear_cross_entropy(hidden.contiguous(), weight.contiguous(), case.labels)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("autocast", [False, True])
def test_half_activations_with_float32_weights(autocast):
    """The product is that of autocast; gradients come in the type of each input."""
    case = Case(torch.bfloat16, weight_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = gradients(smk.masked_linear_cross_entropy, case, case.options(["bias"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same_type = gradients(plain, case, case.options(["bias"]))
    truth = gradients(oracle.masked_linear_cross_entropy, case, case.options(["bias"]), double)
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert [x.dtype for x in got] == dtypes
    for value, own, want in zip(got, same_type, truth, strict=True):
        assert_as_accurate(value, own, want, factor=2.0)


@pytest.mark.usefixtures("path")
def test_float32_activations_under_autocast():
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = smk.masked_linear_cross_entropy(
            case.hidden, case.weight, case.labels, teacher=case.teacher, alpha=0.4
        )
        want = plain(case.hidden, case.weight, case.labels, teacher=case.teacher, alpha=0.4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("names", [(), ("ids", "bias", "teacher"), ("soft", "none")], ids=", ".join)
def test_compile(names):
    def loss(hidden, weight, labels, **options):
        return smk.masked_linear_cross_entropy(hidden, weight, labels, **options)

    calls = []
    for batch, tokens in ((3, 7), (4, 9)):
        case = Case(batch=batch, tokens=tokens)
        options = case.options(names)
        calls.append((case.hidden.requires_grad_(), case.weight, case.labels, options))
    assert_compiles_once(
        lambda hidden, weight, labels, options: loss(hidden, weight, labels, **options),
        calls,
        rtol=1e-6,
        atol=1e-6,
    )


def test_compile_with_capacity():
    def loss(hidden, weight, labels):
        return smk.masked_linear_cross_entropy(hidden, weight, labels, capacity=20)

    cases = [Case(batch=batch, tokens=tokens) for batch, tokens in ((3, 7), (4, 9))]
    calls = [(case.hidden, case.weight, case.labels) for case in cases]
    assert_compiles_once(loss, calls, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("ids",), ("capacity",), ("teacher", "none")], ids=", ".join)
def test_never_asks_the_host(names):
    case = Case()

    def meta(value):
        if isinstance(value, tuple):
            return tuple(meta(v) for v in value)
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    options = {key: meta(value) for key, value in case.options(names).items()}
    hidden = case.hidden.to("meta").requires_grad_()
    loss = smk.masked_linear_cross_entropy(
        hidden, case.weight.to("meta"), case.labels.to("meta"), **options
    )
    loss.sum().backward()
    assert hidden.grad.shape == hidden.shape


CASE = Case()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"labels": CASE.labels.float()}, TypeError, "labels .* int64, got float32"),
        ({"labels": CASE.labels[None]}, ValueError, r"labels must be \[B, T\] or \[N\]"),
        ({"labels": CASE.labels + 150}, ValueError, r"labels must be in \[0, V\) = \[0, 23\), got"),
        ({"labels": CASE.labels[:, 1:]}, ValueError, r"hidden must be \[\*labels.shape, D\]"),
        ({"hidden": CASE.hidden.long()}, TypeError, "hidden must be of type"),
        ({"hidden": CASE.hidden[..., 1:]}, ValueError, r"weight must be \[V, D\] = \(23, 9\)"),
        ({"hidden": CASE.hidden.to("meta")}, ValueError, "hidden must be on the device of labels"),
        ({"weight": CASE.weight[0]}, ValueError, r"weight must be \[V, D\], got shape"),
        ({"weight": CASE.weight[:0]}, ValueError, "weight must be .* V > 0"),
        ({"bias": CASE.bias[1:]}, ValueError, r"bias must be \[V\] = \(23,\)"),
        ({"ids": CASE.ids.int()}, TypeError, "ids .* int64"),
        ({"ids": CASE.ids[1:]}, ValueError, r"ids must be \[B, K\]"),
        ({"ids": CASE.ids + T}, ValueError, r"ids must be in \[-1, T\) = \[-1, 7\)"),
        ({"ids": CASE.ids, "capacity": 3}, ValueError, "capacity .* without ids"),
        ({"capacity": -1}, ValueError, "capacity must be at least 0"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"capacity": 2.5}, TypeError, "capacity must be an int, got float"),
        ({"alpha": 0.5}, ValueError, "alpha needs soft_labels or teacher"),
        ({"alpha": torch.tensor(0.5)}, ValueError, "alpha needs soft_labels or teacher"),
        (
            {"alpha": torch.tensor(0.5, device="meta"), "soft_labels": CASE.soft},
            ValueError,
            "alpha must be on the device of labels",
        ),
        ({"alpha": -0.5, "soft_labels": CASE.soft}, ValueError, r"alpha must be in \[0, 1\]"),
        ({"alpha": torch.ones(2), "soft_labels": CASE.soft}, ValueError, "alpha must be one value"),
        ({"soft_labels": CASE.soft[..., 1:]}, ValueError, r"soft_labels must be \[\*labels.shape"),
        (
            {"soft_labels": CASE.soft, "teacher": CASE.teacher},
            ValueError,
            "at most one of soft_labels and teacher",
        ),
        ({"teacher": CASE.teacher[:2]}, ValueError, "teacher must be .* got 2 values"),
        (
            {"teacher": (CASE.teacher[0], CASE.teacher[1][1:], None)},
            ValueError,
            r"weight_t must be \[V, D\] = \(23, 10\)",
        ),
        ({"teacher": (CASE.hidden[1:], CASE.weight, None)}, ValueError, "hidden_t must be"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_bad_input(options, error, text):
    given = {"hidden": CASE.hidden, "weight": CASE.weight, "labels": CASE.labels, **options}
    with pytest.raises(error, match=text):
        smk.masked_linear_cross_entropy(**given)
