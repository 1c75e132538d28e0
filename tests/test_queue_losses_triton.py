"""The Triton kernels of queue_contrastive_loss, on a GPU or in Triton's interpreter.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends import BackendError
from syncmask_kernels.backends.triton import queue_losses as launches
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, guarded_outputs
from tests.queue_cases import CASES, Case, assert_accurate, gradients

BATCH, QUEUE = 3, 11  # the interpreter is slow
NAN, INF = float("nan"), float("inf")
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN|divide):RuntimeWarning")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of the batch's own keys and of the queue, the last one shorter."""
    monkeypatch.setattr(launches, "COLUMNS", 4)
    monkeypatch.setattr(launches, "CAST_COLUMNS", 6)


def moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def serve(
    case: Case,
    options: dict[str, Any],
    backend: str = "triton",
    function: Any = smk.queue_contrastive_loss,
) -> list[Tensor]:
    """Results and gradients, on the CPU."""
    given = {name: moved(value) for name, value in options.items()}
    with smk.use_backend(backend), guarded_outputs():
        return [x.cpu() for x in gradients(function, case, given, moved)]


def small(dtype: torch.dtype = torch.float32, queue_dtype: torch.dtype | None = None) -> Case:
    return Case(dtype, queue_dtype, batch=BATCH, queue=QUEUE)


@pytest.mark.parametrize("names", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=", ".join)
def test_results_and_gradients_against_the_truth(names: tuple[str, ...]) -> None:
    case = small()
    options = case.options(names)
    assert_accurate(serve(case, options), case, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    case = small(dtype)
    options = case.options(["soft", "queued items"])
    assert_accurate(serve(case, options), case, options)


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
def test_half_features_beside_a_queue_of_another_type(queue_dtype: torch.dtype) -> None:
    case = small(torch.float16, queue_dtype)
    options = case.options(["soft", "queued items"])
    assert_accurate(serve(case, options), case, options)


@pytest.mark.parametrize(("batch", "queue"), [(1, 9), (4, 4), (4, 0), (5, 16)])
def test_sizes(batch: int, queue: int) -> None:
    """Sizes around those of the parts."""
    case = Case(batch=batch, queue=queue)
    options = case.options(["soft", "queued items"])
    assert_accurate(serve(case, options), case, options)


def test_one_part_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "COLUMNS", 64)
    case = small()
    options = case.options(["soft", "queued items"])
    assert_accurate(serve(case, options), case, options)


def test_any_layout_and_alpha_as_a_tensor() -> None:
    """Queues by rows, features and ids with gaps."""
    case = small()
    options = case.options(["soft", "queued items"])
    case.tensors[4:] = [queue.T.contiguous().T for queue in case.tensors[4:]]
    case.tensors[:4] = [torch.stack((x, x), dim=-1)[..., 0] for x in case.tensors[:4]]
    for name in ("item_ids", "queue_ids"):
        options[name] = torch.stack((options[name], options[name]), dim=-1)[..., 0]
    assert_accurate(serve(case, options | {"alpha": torch.tensor(0.4)}), case, options)


def test_same_bits_run_after_run_and_under_autocast() -> None:
    case = small()
    options = case.options(["soft", "queued items"])
    wanted = serve(case, options)
    in_autocast = torch.autocast(DEVICE, dtype=torch.bfloat16)(smk.queue_contrastive_loss)
    assert all(map(torch.equal, serve(case, options, function=in_autocast), wanted))


def test_logits_far_beyond_exp() -> None:
    case = small()
    case.temperature = torch.tensor(1e-3)
    options = case.options(["soft", "queued items"])
    assert_accurate(serve(case, options), case, options)


def test_the_queue_may_change_before_the_backward_pass() -> None:
    case = small()
    tensors = [moved(x) for x in case.tensors]
    image = tensors[0].requires_grad_()
    grads = []
    with smk.use_backend("triton"):
        losses = [smk.queue_contrastive_loss(*tensors, 0.1, alpha=0.4)[0] for _ in range(2)]
    grads.append(*torch.autograd.grad(losses[0], image))
    tensors[5].zero_()
    grads.append(*torch.autograd.grad(losses[1], image))
    assert torch.equal(*grads)


@NOT_FINITE
@pytest.mark.parametrize(
    ("where", "bad"),
    [("feature", NAN), ("feature", INF), ("teacher", NAN), ("key", INF), ("queue", NAN)],
)
def test_not_finite(where: str, bad: float) -> None:
    """NaN where eager has it, and no row is touched by another one's."""
    case = small()
    index, place = {
        "feature": (0, (1, 2)),
        "teacher": (2, (1, 2)),
        "key": (3, (1, 2)),
        "queue": (5, (2, 9)),
    }[where]
    case.tensors[index][place] = bad
    got, plain = (serve(case, {"alpha": 0.4}, backend) for backend in ("triton", "eager"))
    assert any(value.isnan().any() for value in plain)
    for ours, theirs in zip(got, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("queue", [0, QUEUE])
def test_an_empty_batch_is_zero_with_zero_gradients(queue: int) -> None:
    loss, *_, image_grad, _, temperature_grad = serve(Case(batch=0, queue=queue), {"alpha": 0.4})
    assert [loss.item(), temperature_grad.item()] == [0, 0]
    assert image_grad.shape[0] == 0


@pytest.mark.parametrize(("names", "rows"), [((), 1), (("soft", "queued items"), 2)])
def test_two_kernels_and_one_buffer_of_logits(names: tuple[str, ...], rows: int) -> None:
    """Of a direction: logits with the queue take all the memory that grows with it."""
    case = Case(queue=400)
    sizes, launched = [], []
    empty = torch.empty

    def watched(size: Any, **options: Any) -> Tensor:
        sizes.append(torch.Size(size).numel())
        return empty(size, **options)

    def run(given: list[Any], tensor: Tensor) -> None:
        launched.extend(given)

    options = {name: moved(value) for name, value in case.options(names).items()}
    with (
        mock.patch.object(torch, "empty", watched),
        mock.patch.object(launches, "run", run),
        mock.patch.object(launches, "COLUMNS", 128),
        smk.use_backend("triton"),
    ):
        smk.queue_contrastive_loss(*map(moved, case.tensors), 0.1, **options)
    assert len(launched) == 4
    batch = case.tensors[0].shape[0]
    assert sum(sizes) < 2 * rows * batch * 400 * 1.2


# ---- registration ----


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with smk.use_backend("triton"):
        yield


def arguments(case: Case, everything: bool) -> tuple[Any, ...]:
    image, _, key, other, _, queue = map(moved, case.tensors)
    if not everything:
        return image, None, other, queue.bfloat16(), moved(case.item_ids), None, 0.0, None, False
    ids = moved(case.item_ids), moved(case.queue_ids)
    return image, key, other, queue, *ids, 0.0, moved(torch.tensor(0.4)), True


@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything: bool) -> None:
    torch.library.opcheck(launches._queue_contrastive_loss, arguments(small(), everything))


def test_compiles(triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "COLUMNS", 64)
    calls = []
    for batch, queue in ((3, 5), (4, 7)):
        case = Case(batch=batch, queue=queue)
        leaves = [x.requires_grad_() for x in (*case.tensors[:2], case.temperature)]
        tensors = (*leaves[:2], *case.tensors[2:], leaves[2], case.item_ids, case.queue_ids)
        calls.append(tuple(moved(x).detach().requires_grad_(x.requires_grad) for x in tensors))

    def results(*tensors: Tensor) -> Any:
        *given, item_ids, queue_ids = tensors
        return smk.queue_contrastive_loss(*given, alpha=0.4, item_ids=item_ids, queue_ids=queue_ids)

    assert_compiles_once(results, calls, rtol=1e-5, atol=1e-6)


def test_refuses_float64(triton_backend: None) -> None:
    case = Case(torch.float64)
    with pytest.raises(BackendError, match="float64"):
        smk.queue_contrastive_loss(*map(moved, case.tensors), 0.1)
