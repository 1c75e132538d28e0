"""queue_contrastive_loss and enqueue_."""

from __future__ import annotations

import math

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F

import syncmask_kernels as smk
from reference.ops import queue_losses as oracle
from syncmask_kernels.backends.eager import queue_losses as eager
from tests.compiling import assert_compiles_once
from tests.enqueue_rank import enqueue_of_a_rank
from tests.queue_cases import CASES, ITEMS, NAMES, B, Case, D, Q, assert_accurate, gradients


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts, the last one shorter."""
    monkeypatch.setattr(eager, "CPU_COLUMNS", 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("names", CASES, ids=", ".join)
def test_results_and_gradients_against_the_truth(names, dtype):
    case = Case(dtype)
    options = case.options(names)
    got = gradients(smk.queue_contrastive_loss, case, options)
    assert [x.dtype for x in got] == [torch.float32] * 3 + [dtype] * 2 + [torch.float32]
    assert_accurate(got, case, options)


@pytest.mark.parametrize("names", CASES, ids=", ".join)
@pytest.mark.parametrize("queue", [Q, 4, 0])
def test_float64_equals_oracle(names, queue):
    case = Case(torch.float64, queue=queue)
    case.temperature = case.temperature.double()
    got = gradients(smk.queue_contrastive_loss, case, case.options(names))
    want = gradients(oracle.queue_contrastive_loss, case, case.options(names))
    for value, true in zip(got, want, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-14)


def test_oracle_is_cross_entropy():
    """Without a teacher and with unique items: what F.cross_entropy says of a classifier."""
    case = Case(torch.float64)
    got = oracle.queue_contrastive_loss(*case.tensors, case.temperature)[0]
    image, text, image_key, text_key, image_queue, text_queue = case.tensors
    sides = ((image, text_key, text_queue), (text, image_key, image_queue))
    wanted = [
        F.cross_entropy(feat @ torch.cat((key.T, queue), dim=1) / case.temperature, torch.arange(B))
        for feat, key, queue in sides
    ]
    torch.testing.assert_close(got, sum(wanted) / 2)


@pytest.mark.parametrize("names", [("queued items",), ("soft", "queued items")], ids=", ".join)
def test_gradcheck(names):
    """Not by the temperature where there is a teacher, whose softmax is a constant all the same."""
    case = Case(torch.float64, batch=3, queue=6)
    leaves = case.tensors[:2] if "soft" in names else [*case.tensors[:2], case.temperature.double()]

    def results(image_feat, text_feat, temperature=0.07):
        tensors = image_feat, text_feat, *case.tensors[2:], temperature
        return smk.queue_contrastive_loss(*tensors, **case.options(names))

    assert torch.autograd.gradcheck(results, [x.requires_grad_() for x in leaves])


def test_keys_and_queues_are_constants():
    case = Case()
    tensors = [x.requires_grad_() for x in case.tensors]
    sum(x.sum() for x in smk.queue_contrastive_loss(*tensors, 0.1, alpha=0.5)).backward()
    assert [x.grad is None for x in tensors] == [False] * 2 + [True] * 4


def test_the_queue_may_change_before_the_backward_pass():
    """ALBEF enqueues in between, for which it clones the queue."""
    case = Case()
    want = gradients(smk.queue_contrastive_loss, case, {"alpha": 0.4})

    def then_overwrite(*tensors, **options):
        results = smk.queue_contrastive_loss(*tensors, **options)
        for queue, key in zip(tensors[4:6], tensors[2:4], strict=True):
            smk.enqueue_(queue, torch.tensor([0]), key)
        return results

    got = gradients(then_overwrite, case, {"alpha": 0.4})
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
def test_half_features_beside_a_queue_of_another_type(queue_dtype):
    case = Case(torch.float16, queue_dtype)
    got = gradients(smk.queue_contrastive_loss, case, {"alpha": 0.4})
    assert_accurate(got, case, {"alpha": 0.4})


def test_autocast_does_not_round_products():
    case = Case()
    want = gradients(smk.queue_contrastive_loss, case, {"alpha": 0.4})
    in_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(smk.queue_contrastive_loss)
    got = gradients(in_autocast, case, {"alpha": 0.4})
    assert all(map(torch.equal, got, want))


def test_logits_far_beyond_exp():
    case = Case(torch.float64)
    case.temperature = torch.tensor(1e-4, dtype=torch.float64)
    options = case.options(["soft", "queued items"])
    got = gradients(smk.queue_contrastive_loss, case, options)
    want = gradients(oracle.queue_contrastive_loss, case, options)
    for value, true in zip(got, want, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("names", [(), ("soft", "queued items")], ids=", ".join)
def test_no_gradient_is_formed_where_none_is_wanted(names, monkeypatch):
    case = Case()
    options = case.options(names)
    want = smk.queue_contrastive_loss(*case.tensors, 0.1, **options)
    formed = []
    monkeypatch.setattr(eager, "product", lambda a, b: formed.append(b.shape) or a @ b)
    got = smk.queue_contrastive_loss(*case.tensors, 0.1, **options)
    assert not formed
    case.tensors[0].requires_grad_()
    with torch.no_grad():
        smk.queue_contrastive_loss(*case.tensors, 0.1, **options)
    assert not formed
    smk.queue_contrastive_loss(*case.tensors, 0.1, **options)
    assert formed
    assert all(map(torch.equal, got, want))


def test_numbers_as_tensors():
    case = Case()
    number = smk.queue_contrastive_loss(*case.tensors, 0.5, alpha=0.25)
    weights = torch.tensor(0.5), torch.tensor(0.25)
    tensor = smk.queue_contrastive_loss(*case.tensors, weights[0], alpha=weights[1])
    assert all(map(torch.equal, number, tensor))


def test_views():
    case = Case()
    views = [torch.stack((x, x), dim=-1)[..., 0] for x in case.tensors]
    for got, want in zip(
        smk.queue_contrastive_loss(*views, 0.07, alpha=0.4),
        smk.queue_contrastive_loss(*case.tensors, 0.07, alpha=0.4),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queue", [Q, 0])
def test_an_empty_batch_is_zero_with_zero_gradients(queue):
    case = Case(batch=0, queue=queue)
    loss, *sims, image_grad, _, temperature_grad = gradients(
        smk.queue_contrastive_loss, case, case.options(["soft", "queued items"])
    )
    assert loss == 0
    assert [s.shape for s in sims] == [(0, 0)] * 2
    assert image_grad.shape == (0, D)
    assert temperature_grad == 0


@pytest.mark.parametrize("names", [(), ("soft", "queued items")], ids=", ".join)
def test_compile(names):
    calls = []
    for batch in (5, 7):
        case = Case(batch=batch)
        for tensor in (*case.tensors[:2], case.temperature):
            tensor.requires_grad_()
        ids = [case.item_ids, case.queue_ids] if "queued items" in names else [None, None]
        calls.append((*case.tensors, case.temperature, *ids))

    def results(*tensors):
        *given, item_ids, queue_ids = tensors
        alpha = 0.4 if names else 0.0
        return smk.queue_contrastive_loss(
            *given, alpha=alpha, item_ids=item_ids, queue_ids=queue_ids
        )

    assert_compiles_once(results, calls, rtol=1e-5, atol=1e-6)


def test_never_asks_the_host():
    case = Case()
    tensors = [x.to("meta") for x in (*case.tensors, case.temperature)]
    tensors[0].requires_grad_()
    ids = case.item_ids.to("meta"), case.queue_ids.to("meta")
    results = smk.queue_contrastive_loss(*tensors, alpha=0.4, item_ids=ids[0], queue_ids=ids[1])
    results[0].backward()
    assert tensors[0].grad.shape == (B, D)
    pointer = torch.zeros(1, dtype=torch.int64, device="meta")
    smk.enqueue_(tensors[4], pointer, tensors[2], *ids)


CASE = Case()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"image_feat": CASE.tensors[0][0]}, ValueError, r"image_feat must be \[B, D\], got shape"),
        ({"image_feat": CASE.tensors[0].long()}, TypeError, "image_feat must be of type"),
        ({"text_feat": CASE.tensors[1][1:]}, ValueError, r"text_feat must be \[B, D\] = \(5, 8\)"),
        ({"image_key": None}, TypeError, "image_key must be a torch.Tensor, got NoneType"),
        ({"text_key": CASE.tensors[3].to("meta")}, ValueError, "text_key must be on the device"),
        (
            {"image_queue": CASE.tensors[4].T},
            ValueError,
            r"image_queue must be \[D, Q\] = \(8, 8\)",
        ),
        ({"text_queue": CASE.tensors[5][:, 1:]}, ValueError, r"text_queue must be .* \(8, 23\)"),
        ({"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0, got nan"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must be one value"),
        ({"temperature": "x"}, TypeError, "temperature must be a number, got str"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": torch.ones(1)}, ValueError, "alpha must be one value"),
        ({"item_ids": ITEMS.int()}, TypeError, "item_ids must be of type int64"),
        ({"item_ids": ITEMS[1:]}, ValueError, r"item_ids must be \[B\] = \(5,\)"),
        (
            {"item_ids": ITEMS, "queue_ids": ITEMS},
            ValueError,
            r"queue_ids must be \[Q\] = \(23,\), got shape \(5,\)",
        ),
        ({"queue_ids": CASE.queue_ids}, ValueError, "queue_ids must come with item_ids"),
    ],
)
def test_bad_input(options, error, text):
    given = dict(zip(NAMES, CASE.tensors, strict=True))
    with pytest.raises(error, match=text):
        smk.queue_contrastive_loss(**{**given, "temperature": 0.07, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_enqueue_equals_one_key_after_the_other(dtype):
    """Batches of all sizes, up to more than the queue holds, at every place of the pointer."""
    torch.manual_seed(0)
    queue, pointer = torch.randn(3, 7).to(dtype), torch.tensor([0])
    queue_ids = torch.full((7,), -100)
    addresses = [x.data_ptr() for x in (queue, pointer, queue_ids)]
    want = queue, 0, queue_ids.tolist()
    for batch in [0, 1, 4, 3, 7, 8, 16, 5, 0, 6, 30]:
        keys, ids = torch.randn(batch, 3, requires_grad=True), torch.randint(99, (batch,))
        smk.enqueue_(queue, pointer, keys, ids, queue_ids)
        want = oracle.enqueue(want[0], want[1], keys.detach(), ids.tolist(), want[2])
        assert (queue_ids.tolist(), pointer.tolist()) == (want[2], [want[1]])
        assert torch.equal(queue, want[0])
    assert addresses == [x.data_ptr() for x in (queue, pointer, queue_ids)]


def test_enqueue_without_ids_and_a_shared_pointer():
    queues, pointer = [torch.zeros(1, 3), torch.zeros(1, 3)], torch.tensor([2])
    keys = torch.tensor([[1.0], [2.0]])
    smk.enqueue_(queues[0], pointer.clone(), keys)
    smk.enqueue_(queues[1], pointer, keys)
    assert queues[0].tolist() == queues[1].tolist() == [[2.0, 0.0, 1.0]]
    assert pointer.tolist() == [1]


def test_enqueue_compiles():
    def step(queue, pointer, keys):
        queue, pointer = queue.clone(), pointer.clone()
        smk.enqueue_(queue, pointer, keys)
        return queue, pointer

    calls = [(torch.randn(2, 9), torch.tensor([7]), torch.randn(n, 2)) for n in (4, 5)]
    assert_compiles_once(step, calls)


ZERO = torch.tensor([0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"queue": torch.zeros(3, 0)}, ValueError, "queue must be .* Q > 0"),
        ({"queue": torch.zeros(3, 4).long()}, TypeError, "queue must be of type"),
        ({"pointer": 0}, TypeError, "pointer must be a torch.Tensor, got int"),
        ({"pointer": torch.tensor(0)}, ValueError, r"pointer must be \[1\] = \(1,\)"),
        ({"pointer": torch.tensor([0.0])}, TypeError, "pointer must be of type int64"),
        ({"keys": torch.zeros(2, 4)}, ValueError, r"keys must be \[B, D\] = \(2, 3\)"),
        ({"keys": torch.zeros(2, 3, device="meta")}, ValueError, "keys must be on the device"),
        ({"ids": ITEMS[:2]}, ValueError, "ids and queue_ids must be given together"),
        ({"ids": ITEMS, "queue_ids": ITEMS[:4]}, ValueError, r"ids must be \[B\] = \(2,\)"),
        ({"ids": ITEMS[:2], "queue_ids": ITEMS}, ValueError, r"queue_ids must be \[Q\] = \(4,\)"),
    ],
)
def test_enqueue_refuses_bad_input(options, error, text):
    given = {"queue": torch.zeros(3, 4), "pointer": ZERO, "keys": torch.zeros(2, 3), **options}
    with pytest.raises(error, match=text):
        smk.enqueue_(**given)


def test_enqueue_gathers_the_keys_of_all_ranks(tmp_path):
    multiprocessing.spawn(enqueue_of_a_rank, (str(tmp_path),), nprocs=2)
    wanted = (
        [[11.0, 12.0, 0.0, 1.0, 2.0], [13.0, 14.0, 0.0, 3.0, 4.0]],
        [2],
        [16, 17, -100, 6, 7],
    )
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [wanted] * 2
