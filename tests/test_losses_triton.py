"""masked_linear_cross_entropy by Triton, on a GPU or in Triton's interpreter.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import losses as oracle
from syncmask_kernels.backends import BackendError
from syncmask_kernels.backends.loss_request import Head, Targets
from syncmask_kernels.backends.triton import losses, losses_rows, losses_streamed
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, guarded_outputs
from tests.test_losses_cross_entropy import Case, D, V, double, gradients, plain

NAN, INF = float("nan"), float("inf")


def on_device(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(on_device(part) for part in value)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and parts that a vocabulary of 23 words and 10 columns has several of."""
    monkeypatch.setattr(losses_rows, "COLUMNS", 8)
    monkeypatch.setattr(losses_rows, "SCALED", 64)
    monkeypatch.setattr(losses_streamed, "tiles", lambda call: losses_streamed.Tiles(16, 16, 16))
    monkeypatch.setattr(losses_streamed, "TILES", 1)
    monkeypatch.setattr(losses_streamed, "PARTS", 2)
    monkeypatch.setattr(losses_streamed, "STREAM_LOGITS", 16)


def serve(case: Case, options: dict[str, Any]) -> list[Tensor]:
    """The loss and its gradients, on the CPU."""
    labels, case.labels = case.labels, on_device(case.labels)
    with smk.use_backend("triton"), guarded_outputs():
        found = gradients(smk.masked_linear_cross_entropy, case, options, on_device)
    case.labels = labels
    return [x.cpu() for x in found]


def check(case: Case, names: tuple[str, ...]) -> None:
    options = case.options(names)
    same_type = gradients(plain, case, options)
    truth_options = {key: value for key, value in options.items() if key != "capacity"}
    truth = gradients(oracle.masked_linear_cross_entropy, case, truth_options, double)
    for value, own, want in zip(serve(case, options), same_type, truth, strict=True):
        assert_as_accurate(value, own, want, factor=2.0)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("ids", "bias"), torch.float32),
        (("ids", "soft", "none"), torch.float16),
        (("ids", "smoothing", "teacher"), torch.float16),
        (("roomy", "bias", "teacher", "none"), torch.float32),
        (("capacity", "smoothing", "soft", "sum"), torch.float32),
    ],
)
def test_gathered_rows(names: tuple[str, ...], dtype: torch.dtype) -> None:
    check(Case(dtype), names)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        ((), torch.float16),
        (("bias", "smoothing", "soft", "sum"), torch.float32),
        (("bias", "teacher"), torch.float16),
        (("teacher without bias", "none"), torch.float32),
    ],
)
def test_streamed_rows(
    names: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a block of labelled rows, and a block without; parts of one or of two blocks."""
    monkeypatch.setattr(losses_streamed, "TILES", 1 if "bias" in names else 2)
    case = Case(dtype, batch=8)
    assert 16 < case.count <= 32 < case.labels.numel() - 16
    check(case, names)


@pytest.mark.parametrize("names", [("ids",), ("bias",)], ids=["gathered", "streamed"])
def test_half_activations_with_float32_weights(names: tuple[str, ...]) -> None:
    case = Case(torch.float16, weight_dtype=torch.float32)
    loss, *grads = serve(case, case.options(names))
    assert [x.dtype for x in grads[:2]] == [torch.float16, torch.float32]
    case.weight, case.bias = case.weight.half(), case.bias.half()
    for got, wanted in zip((loss, *grads), serve(case, case.options(names)), strict=True):
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("names", [("ids",), ("soft",), ("teacher",)], ids=str)
def test_rows_without_a_label_are_never_used(names: tuple[str, ...]) -> None:
    case = Case()
    wanted = serve(case, case.options(names))
    unused = case.labels == -100
    for values in (case.hidden, case.soft, case.teacher[0]):
        values[unused] = NAN
    assert all(map(torch.equal, serve(case, case.options(names)), wanted))


@pytest.mark.parametrize(("names", "ignore_index"), [(("ids", "smoothing"), 0), (("bias",), -1)])
def test_ignore_index(names: tuple[str, ...], ignore_index: int) -> None:
    """Also of what a label may be."""
    case = Case()
    case.labels[case.labels == 0] = 1
    wanted = serve(case, case.options(names))
    case.labels[case.labels == -100] = ignore_index
    assert all(
        map(torch.equal, serve(case, case.options(names) | {"ignore_index": ignore_index}), wanted)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", [(), ("ids", "bias"), ("capacity",)], ids=str)
def test_no_labels_is_zero_with_zero_gradients(names: tuple[str, ...], reduction: str) -> None:
    case = Case(batch=1)
    case.labels.fill_(-100)
    case.ids.fill_(-1)
    case.count = 0
    for result in serve(case, case.options(names) | {"reduction": reduction}):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("names", [(), ("capacity",), ("ids",)], ids=str)
def test_no_rows(names: tuple[str, ...]) -> None:
    case = Case()
    case.hidden, case.labels, case.ids = case.hidden[:0], case.labels[:0], case.ids[:0]
    loss, of_hidden, of_weight = serve(case, case.options(names))
    assert loss == 0
    assert of_hidden.shape == (0, 7, D)
    assert torch.equal(of_weight, torch.zeros(V, D))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("room", [0, 2])
def test_rows_beyond_the_capacity_make_everything_nan(room: int, reduction: str) -> None:
    case = Case()
    found = serve(case, {"capacity": room, "bias": case.bias, "reduction": reduction})
    loss, of_hidden, of_weight, of_bias = found
    assert all(x.isnan().all() for x in (loss, of_weight, of_bias))
    assert of_hidden.isnan().any()


@pytest.mark.parametrize("label", [V, -3, 2**40])
@pytest.mark.parametrize("names", [("ids",), ()], ids=["gathered", "streamed"])
def test_a_label_beyond_the_vocabulary_makes_its_loss_nan(
    names: tuple[str, ...], label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the host can refuse it; nothing beyond a row is read."""
    monkeypatch.setattr(smk.losses._host, "ids_within", lambda *args: None)
    case = Case()
    row = tuple((case.labels != -100).nonzero()[1])
    case.labels[row] = label
    loss, of_hidden, of_weight = serve(case, case.options(names) | {"reduction": "none"})
    assert torch.equal(loss.isnan().nonzero(), torch.stack(row)[None])
    assert of_hidden[row].isnan().all()
    assert of_hidden.isnan().sum() == D
    assert of_weight.isnan().all()


@pytest.mark.parametrize("names", [("ids", "bias"), ("bias",)], ids=["gathered", "streamed"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_words_without_a_chance_and_large_logits(names: tuple[str, ...]) -> None:
    """A block of words has probability 0; the others' logits are beyond what exp holds."""
    case = Case()
    case.labels[case.labels != -100] = V - 1
    case.weight[-1] *= 100
    case.bias -= 200
    case.bias[:16] = -INF
    options = case.options(names)
    own = gradients(plain, case, options)
    truth = gradients(smk.masked_linear_cross_entropy, case, options, double)
    for value, theirs, want in zip(serve(case, options), own, truth, strict=True):
        assert_as_accurate(value, theirs, want, factor=2.0)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), ()], ids=str)
@pytest.mark.parametrize("names", [("ids",), ()], ids=["gathered", "streamed"])
def test_only_the_gradients_asked_for(names: tuple[str, ...], asked: tuple[int, ...]) -> None:
    case = Case(batch=2)
    options = case.options([*names, "bias"])
    wanted = serve(case, options)[1:]
    head = [
        x.requires_grad_(i in asked) for i, x in enumerate((case.hidden, case.weight, case.bias))
    ]
    with smk.use_backend("triton"):
        found = smk.masked_linear_cross_entropy(
            *on_device((*head[:2], case.labels)), **{k: on_device(v) for k, v in options.items()}
        )
    assert found.requires_grad == bool(asked)
    leaves = [head[i] for i in asked]
    for i, got in zip(asked, torch.autograd.grad(found, leaves) if asked else (), strict=True):
        assert torch.equal(got, wanted[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_backward_pass(dtype: torch.dtype) -> None:
    """Gradients that are ready are scaled in place, once; in float16 none is made ahead."""
    case = Case(dtype)
    head = [on_device(x).requires_grad_() for x in (case.hidden, case.weight)]
    with smk.use_backend("triton"):
        loss = smk.masked_linear_cross_entropy(
            *head, on_device(case.labels), ids=on_device(case.ids)
        )
        first = torch.autograd.grad(loss, head, on_device(torch.tensor(4.0)), retain_graph=True)
        second = torch.autograd.grad(loss, head)
    for four, one in zip(first, second, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(
            four, 4 * one, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-7
        )


def test_float16_gradients_survive_a_gradient_scaler() -> None:
    """What float16 cannot hold is scaled before it is rounded to that."""
    case = Case(torch.float16)
    case.bias[5] = 25
    case.labels[case.labels != -100] = 5
    head = [on_device(x).requires_grad_() for x in (case.hidden, case.weight)]
    options = {"bias": case.bias, "ids": case.ids}
    with smk.use_backend("triton"):
        loss = smk.masked_linear_cross_entropy(
            *head, on_device(case.labels), **{k: on_device(v) for k, v in options.items()}
        )
    _, got = torch.autograd.grad(loss, head, on_device(torch.tensor(2.0**16)))
    _, _, wanted, _ = gradients(oracle.masked_linear_cross_entropy, case, options, double)
    others = torch.arange(V) != 5
    assert 0 < wanted[others].abs().max() < 2.0**-24
    got = got.cpu().double() / 2**16
    torch.testing.assert_close(got[others], wanted[others], rtol=0.01, atol=1e-11)


def test_float64_is_refused() -> None:
    case = Case(torch.float64)
    with smk.use_backend("triton"), pytest.raises(BackendError, match="float64"):
        smk.masked_linear_cross_entropy(*on_device((case.hidden, case.weight, case.labels)))


@pytest.mark.parametrize("names", [("ids", "bias"), ("soft", "none")], ids=["gathered", "streamed"])
def test_compile(names: tuple[str, ...]) -> None:
    calls = []
    for batch, tokens in ((3, 2), (4, 5)):
        case = Case(batch=batch, tokens=tokens)
        head = (case.hidden.requires_grad_(), case.weight.requires_grad_(), case.labels)
        calls.append((*on_device(head), {k: on_device(v) for k, v in case.options(names).items()}))

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        return smk.masked_linear_cross_entropy(hidden, weight, labels, **options)

    with smk.use_backend("triton"):
        assert_compiles_once(loss, calls, rtol=1e-6, atol=1e-6)


def test_opcheck() -> None:
    case = Case(batch=2, tokens=3)
    rows, wanted = torch.tensor([1, 4, -1]), [True, False, True]
    head = (case.hidden.flatten(0, 1), case.weight, case.bias)
    rest = (torch.tensor([2, 3, 0]), rows, None, *head, torch.tensor(0.3), 0.1)
    call, slopes = on_device((*head, *rest)), on_device(torch.ones(3))
    ops = torch.ops.syncmask
    torch.library.opcheck(ops.linear_cross_entropy_rows.triton, (*call, slopes, wanted))
    torch.library.opcheck(ops.linear_cross_entropy_rows.triton, (*call, None, wanted))
    torch.library.opcheck(ops.linear_cross_entropy_stream.triton, call)
    _, sums = ops.linear_cross_entropy_stream.triton(*call)
    back = ops.linear_cross_entropy_stream_backward.triton
    torch.library.opcheck(back, (*call, sums, slopes, wanted))


@pytest.mark.parametrize("names", [("ids", "teacher"), ("roomy", "none"), ("soft",)], ids=str)
def test_never_asks_the_host(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernels themselves on tensors that have no values to ask for."""
    for module in (losses_rows, losses_streamed):
        monkeypatch.setattr(module, "run", lambda launches, tensor: None)
    monkeypatch.setattr(losses, "rows_overload", losses_rows._run_rows)
    monkeypatch.setattr(losses, "stream_overload", losses_streamed._run_stream)
    monkeypatch.setattr(losses, "backward_overload", losses_streamed._run_stream_backward)
    case = Case()
    options = case.options(names)

    def meta(value: Tensor) -> Tensor:
        return value.flatten(0, value.dim() - 2).to("meta").requires_grad_()

    teacher = options.get("teacher")
    head_t = None if teacher is None else Head(meta(teacher[0]), meta(teacher[1]), None)
    soft = meta(case.soft) if "soft" in names else None
    targets = Targets(case.labels.flatten().to("meta"), soft, head_t, 0.4, -100, 0.1)
    ids = case.ids.flatten().to("meta") if "ids" in names else None
    student = Head(meta(case.hidden), meta(case.weight), None)
    reduction = options.get("reduction", "mean")
    loss = losses.masked_linear_cross_entropy(
        student, targets, ids, options.get("capacity"), reduction
    )
    loss.sum().backward()
    assert student.weight.grad is not None
