"""The Triton kernels of selection, on a GPU or in Triton's interpreter.

The interpreter must be chosen before Triton is imported, and nothing compiles then. So without a
GPU these tests need a process of their own: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import selection as oracle
from syncmask_kernels.backends import BackendError, triton
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, serve
from tests.sync_cases import (
    assert_right,
    assert_selects,
    case,
    everything,
    seeded,
    true_scores,
)

NAN, INF = float("nan"), float("inf")
RULES = [(p, t) for p in ("mean", "cls") for t in ("max", "text_softmax", "dual")]
SCORES = ("patch_scores", "token_scores")

# ---- topk_mask ----


def adversarial(rows: int, size: int, seed: int = 0) -> Tensor:
    """Rows of ties, NaN of both signs, infinities, denormals and both zeros."""
    values = [0.5, 0.5, -0.0, 0.0, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 3e-45, -2.5, 3e38, -3e38]
    picked = torch.randint(len(values), (rows, size), generator=seeded(seed))
    drawn = torch.randn(rows, size, generator=seeded(seed))
    return torch.where(drawn > 0.2, drawn, torch.tensor(values)[picked])


def check_topk(scores: Tensor, **options: Any) -> None:
    got = serve(smk.topk_mask, "triton", {"scores": scores, **options})
    known = {name: options[name] for name in ("valid", "largest", "ratio") if name in options}
    k = options.get("k")
    k = [min(max(n, 0), scores.shape[1]) for n in k.tolist()] if isinstance(k, Tensor) else k
    wanted = oracle.topk_mask(scores.float(), k=k, **known)
    assert torch.equal(got.mask, wanted)
    assert torch.equal(got.ids, oracle.ids_of(wanted, got.ids.shape[1]))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("size", [1, 49, 197, 257])
def test_topk_orders_special_values(size: int, largest: bool) -> None:
    scores = adversarial(5, size)
    valid = torch.rand(5, size, generator=seeded(1)) < 0.7
    valid[4] = False
    ks = torch.tensor([0, 1, size // 3, size // 2, size])
    check_topk(scores, k=ks, valid=valid, largest=largest)
    check_topk(scores, k=ks.flip(0), largest=largest)


def test_topk_keeps_denormals_apart() -> None:
    scores = torch.tensor([[1e-45, 3e-45, 0.0, -1e-45, -3e-45, -0.0]]).expand(6, -1)
    mask = serve(smk.topk_mask, "triton", {"scores": scores, "k": torch.arange(1, 7)}).mask
    for i in range(6):
        assert mask[i].nonzero().flatten().tolist() == sorted([1, 0, 2, 5, 3, 4][: i + 1])


@pytest.mark.parametrize("ratio", [0.0, 0.07, 1 / 3, 1.0])
def test_topk_ratio_rounds_up_exactly(ratio: float) -> None:
    valid = torch.arange(100) < torch.tensor([100, 29, 0])[:, None]
    check_topk(adversarial(3, 100), ratio=ratio, valid=valid)


def test_topk_counts_and_widths() -> None:
    k = torch.tensor([-3, 5 - 2**32, 5, 2**40])
    for width in (None, 0, 3, 90):
        check_topk(adversarial(4, 49), k=k, width=width)
    check_topk(adversarial(1, 7), k=12)
    check_topk(adversarial(1, 7), k=2**40, width=7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_topk_half_types(dtype: torch.dtype) -> None:
    check_topk(adversarial(3, 65).to(dtype), k=20)


def test_topk_long_rows() -> None:
    check_topk(adversarial(1, 4100), ratio=0.3)


def test_topk_any_layout() -> None:
    scores = adversarial(3, 20)
    options = {"k": 3, "valid": torch.rand(3, 20, generator=seeded(2)) < 0.6}
    wanted = serve(smk.topk_mask, "triton", {"scores": scores, **options})
    strided = {"scores": scores.t().contiguous().t(), "valid": options["valid"].t().clone().t()}
    assert all(map(torch.equal, serve(smk.topk_mask, "triton", options | strided), wanted))
    nested = {"scores": scores.view(3, 1, 20), "valid": options["valid"].view(3, 1, 20), "k": 3}
    assert torch.equal(serve(smk.topk_mask, "triton", nested).ids[:, 0], wanted.ids)
    flat = {"scores": scores[0], "valid": options["valid"][0], "k": 3}
    assert torch.equal(serve(smk.topk_mask, "triton", flat).ids, wanted.ids[0])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_topk_empty(shape: tuple[int, int]) -> None:
    check_topk(torch.zeros(shape), k=2)


# ---- sync_topk_mask ----


def check_sync(arguments: dict[str, Any]) -> smk.SyncMask:
    got = serve(smk.sync_topk_mask, "triton", arguments)
    assert_right(got, arguments)
    return got


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_rules(patch_score: str, token_score: str) -> None:
    arguments = case(patch_score=patch_score, token_score=token_score, cls_index=2)
    arguments["token_valid"][:, 2] = torch.tensor([True, False])
    check_sync(arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("token_score", ["max", "dual"])
def test_half_types_are_summed_in_float32(token_score: str, dtype: torch.dtype) -> None:
    check_sync(case(dtype=dtype, token_score=token_score))


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_every_option(patch_score: str, token_score: str) -> None:
    arguments = case(layers=2, patch_score=patch_score, token_score=token_score, cls_index=1)
    counts = {"patch_k": torch.tensor([9, 0]), "token_ratio": 0.6, "skip_keys": 2}
    check_sync(everything(arguments | counts))


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
@pytest.mark.parametrize(("words", "patches"), [(1, 1), (33, 5), (5, 257), (65, 33)])
def test_sizes(words: int, patches: int, token_score: str) -> None:
    """Sizes around those of the tiles."""
    check_sync(case(1, 2, words, patches, token_score=token_score, patch_k=3, token_ratio=0.3))


@pytest.mark.parametrize("token_score", ["max", "dual"])
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
def test_empty(sizes: tuple[int, int, int], token_score: str) -> None:
    batch, words, patches = sizes
    arguments = case(batch, 2, words, patches, token_score=token_score, patch_k=2, token_k=2)
    got = serve(smk.sync_topk_mask, "triton", arguments)
    assert got.patch_scores.tolist() == [[0.0] * patches] * batch
    assert got.token_scores.tolist() == [[0.0] * words] * batch
    assert_selects(got, arguments)


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_rows_without_words_or_patches(token_score: str) -> None:
    arguments = case(3, token_score=token_score, patch_k=3)
    arguments["token_valid"][1] = False
    arguments["patch_valid"] = torch.ones(3, 49, dtype=torch.bool)
    arguments["patch_valid"][2] = False
    got = check_sync(arguments)
    assert not got.token_mask[1].any()
    assert got.patch_ids.tolist()[1:] == [[0, 1, 2], [-1, -1, -1]]


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_reads_only_what_counts(patch_score: str, token_score: str) -> None:
    """Invalid words, excluded patches, skipped keys and what lies around attn never show."""
    arguments = everything(case(patch_score=patch_score, token_score=token_score, cls_index=1))
    arguments["token_valid"][:, 1] = True
    clean = serve(smk.sync_topk_mask, "triton", arguments)
    counted = torch.cat([torch.zeros(2, 1).bool(), arguments["patch_valid"]], dim=1)
    read = arguments["token_valid"][:, None, :, None] & counted[:, None, None]
    around = torch.full((1, 3, 4, 9, 60), NAN)
    around[:, :2, 1:, :7, 5:55] = arguments["attn"].masked_fill(~read, NAN)
    lse = arguments["lse"].masked_fill(~arguments["token_valid"][:, None], NAN)
    dirty = arguments | {"attn": around[:, :2, 1:, :7, 5:55], "lse": lse}
    assert all(map(torch.equal, serve(smk.sync_topk_mask, "triton", dirty), clean))


@pytest.mark.skipif(not triton.INTERPRETED, reason="watches the loads of the interpreter")
@pytest.mark.parametrize("token_score", ["max", "dual"])
def test_reads_each_weight_that_counts_once(token_score: str) -> None:
    from triton.runtime.interpreter import interpreter_builder

    arguments = case(1, 2, 40, 80, layers=2, token_score=token_score)
    arguments["patch_valid"] = torch.rand(1, 80, generator=seeded(1)) < 0.7
    everywhere = arguments["attn"].repeat(2, 1, 1, 1, 1)  # as many layers again lie behind
    arguments["attn"] = attn = everywhere[:2]
    load, read = interpreter_builder.create_masked_load, []

    def watched(pointers: Any, mask: Any, *rest: Any) -> Any:
        read.append(torch.from_numpy(pointers.data[mask.data].astype("int64")))
        return load(pointers, mask, *rest)

    with mock.patch.object(interpreter_builder, "create_masked_load", watched):
        serve(smk.sync_topk_mask, "triton", arguments)
    offsets = (torch.cat(read) - attn.data_ptr()) // attn.element_size()
    offsets = offsets[(offsets >= 0) & (offsets < everywhere.numel())]
    counted = torch.cat([torch.zeros(1, 1).bool(), arguments["patch_valid"]], dim=1)
    wanted = arguments["token_valid"][:, None, :, None] & counted[:, None, None]
    positions = torch.arange(attn.numel()).view(attn.shape)
    assert torch.equal(offsets.sort().values, positions[wanted.expand(attn.shape)])


def test_strided_attention() -> None:
    arguments = case(layers=2, words=6, patches=20)
    wanted = serve(smk.sync_topk_mask, "triton", arguments)
    for order in ((4, 3, 2, 1, 0), (1, 0, 3, 4, 2)):
        back = torch.tensor(order).argsort().tolist()
        turned = {"attn": arguments["attn"].permute(order).contiguous().permute(back)}
        assert not turned["attn"].is_contiguous()
        assert all(
            map(torch.equal, serve(smk.sync_topk_mask, "triton", arguments | turned), wanted)
        )
    check_sync(arguments | {"attn": arguments["attn"][:1].expand(3, -1, -1, -1, -1)})


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_not_finite(patch_score: str, token_score: str) -> None:
    arguments = case(3, 2, 5, 300, patch_score=patch_score, token_score=token_score)
    arguments["token_valid"][:] = True
    arguments["attn"][0, 0, 1, 0, 300] = arguments["attn"][0, 0, 1, 1, 1] = NAN
    arguments["attn"][0, 1, 1, 0, 3] = INF
    arguments["attn"][0, 2, 0, 4, 3] = -INF
    got = serve(smk.sync_topk_mask, "triton", arguments)
    for ours, truth in zip(got[4:], true_scores(arguments), strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-6, atol=0, equal_nan=True)
    assert_selects(got, arguments)


@pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
def test_not_finite_lse(token_score: str) -> None:
    arguments = case(3, 2, 5, 9, token_score=token_score, lse=torch.randn(1, 3, 2, 5))
    arguments["token_valid"][:] = True
    arguments["lse"][0, 0, 0, 1] = NAN
    arguments["lse"][0, 1, 0, 3] = arguments["lse"][0, 2] = -INF
    got = serve(smk.sync_topk_mask, "triton", arguments)
    truth = true_scores(arguments)[1].float()
    torch.testing.assert_close(got.token_scores, truth, rtol=1e-6, atol=0, equal_nan=True)
    assert (got.token_scores[2] == 0).all()


def test_large_lse() -> None:
    arguments = case(token_score="dual", lse=torch.randn(1, 2, 3, 7) + 700)
    check_sync(arguments)


@pytest.mark.parametrize("token_score", ["max", "text_softmax"])
def test_maximum_of_negative_values(token_score: str) -> None:
    """What lies beyond the last patch does not lift the maximum."""
    arguments = case(token_score=token_score)
    arguments["token_valid"][:] = True
    arguments["attn"] = 1 + torch.rand(1, 2, 3, 7, 50, generator=seeded())
    arguments["attn"][..., 2, :] -= 3
    assert (check_sync(arguments).token_scores[:, 2] < 0).all()


@pytest.mark.parametrize(
    "given", [SCORES[:1], SCORES[1:], SCORES], ids=["patches", "words", "both"]
)
@pytest.mark.parametrize("patch_score", ["mean", "cls"])
def test_own_scores(patch_score: str, given: tuple[str, ...]) -> None:
    """The caller's scores select; the side without is scored as ever."""
    own = {"patch_scores": adversarial(2, 49), "token_scores": adversarial(2, 7)}
    arguments = everything(case(patch_score=patch_score)) | {name: own[name] for name in given}
    got = serve(smk.sync_topk_mask, "triton", arguments)
    truth = dict(zip(SCORES, true_scores(arguments), strict=True))
    for name in SCORES:
        wanted = own[name] if name in given else truth[name].float()
        torch.testing.assert_close(getattr(got, name), wanted, rtol=1e-6, atol=0, equal_nan=True)
    assert_selects(got, arguments)


def test_pieces_of_words_are_chosen_together() -> None:
    scores = torch.tensor([[0.1, NAN, 0.9, 0.2, 0.9, 0.0, 0.3]])
    word_ids = torch.tensor([[4, 7, 4, -1, 7, 2, 2]])
    valid = torch.tensor([[True, True, True, True, True, True, False]])
    attn = torch.ones(1, 1, 7, 2)
    rows = {"attn": attn, "token_scores": scores, "word_ids": word_ids, "token_valid": valid}
    arguments = {name: value.expand(4, *value.shape[1:]) for name, value in rows.items()}
    arguments["token_k"] = torch.arange(1, 5)
    ids = [[0, 2], [0, 1, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 4, 5]]
    got = serve(smk.sync_topk_mask, "triton", arguments)
    assert got.token_ids.tolist() == [row + [-1] * (7 - len(row)) for row in ids]
    assert [mask.nonzero().flatten().tolist() for mask in got.token_mask] == ids


@pytest.mark.parametrize("token_score", ["max", "dual"])
def test_same_bits_in_any_batch_run_after_run(token_score: str) -> None:
    arguments = case(2, 4, 37, 80, token_score=token_score, patch_k=20, token_k=5)
    whole = serve(smk.sync_topk_mask, "triton", arguments)
    assert all(map(torch.equal, serve(smk.sync_topk_mask, "triton", arguments), whole))
    row = {"attn": arguments["attn"][:, 1:], "token_valid": arguments["token_valid"][1:]}
    alone = serve(smk.sync_topk_mask, "triton", arguments | row)
    assert all(torch.equal(ours[0], theirs[1]) for ours, theirs in zip(alone, whole, strict=True))


def test_two_launches_at_most() -> None:
    from syncmask_kernels.backends.triton import selection

    own = {"patch_scores": torch.rand(2, 49), "token_scores": torch.rand(2, 7)}
    for arguments, launches in ((case(), 2), (case() | own, 1)):
        with mock.patch.object(selection, "run", wraps=selection.run) as run:
            serve(smk.sync_topk_mask, "triton", arguments)
        assert len(run.call_args.args[0]) == launches


def test_gradients_are_those_of_eager() -> None:
    weights = torch.arange(1.0, 50.0)
    grads = []
    for backend in ("eager", "triton"):
        arguments = case(token_score="dual")
        arguments["attn"].requires_grad_()
        got = serve(smk.sync_topk_mask, backend, arguments)
        assert not got.patch_mask.requires_grad
        loss = (got.patch_scores * weights).sum() + got.token_scores.square().sum()
        grads.append(torch.autograd.grad(loss, arguments["attn"])[0])
    torch.testing.assert_close(*grads)


# ---- registration ----


def test_opcheck() -> None:
    from syncmask_kernels.backends.triton import selection

    scores = adversarial(4, 11).nan_to_num().to(DEVICE)
    permuted = scores.view(2, 2, 11).permute(1, 2, 0)
    ks = torch.ones(4, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(selection._topk_mask, (scores, None, ks, 0, 0, 3, True))
    torch.library.opcheck(selection._topk_mask, (permuted, permuted > 0, None, 1, 3, 2, False))
    arguments = everything(case(2, 2, 3, 5, dtype=torch.bfloat16))
    strided = arguments["attn"].transpose(1, 3).contiguous().transpose(1, 3)
    names = ("lse", "token_valid", "patch_valid")
    tensors = [strided.to(DEVICE), *(arguments[name].to(DEVICE) for name in names)]
    counts = (None, 1, 2, 3, ks[:2], 0, 0, 3)
    noise = [arguments[name].to(DEVICE) for name in ("patch_noise", "token_noise", "word_ids")]
    torch.library.opcheck(
        selection._sync_topk_mask, (*tensors, -1, 2, 1, *counts, None, None, *noise)
    )


def test_compiles() -> None:
    def selected(attn: Tensor, valid: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return (
            *smk.sync_topk_mask(attn, valid, token_score="dual", token_k=2),
            *smk.topk_mask(scores, k=scores.shape[1] // 2),
        )

    calls = []
    for b, t, s in [(2, 5, 9), (4, 6, 12)]:
        attn, valid = torch.rand(b, 3, t, s).softmax(dim=-1), torch.rand(b, t) < 0.8
        calls.append((attn.to(DEVICE), valid.to(DEVICE), torch.randn(b, s).to(DEVICE)))
    with smk.use_backend("triton"):
        assert_compiles_once(selected, calls)


def test_refusals() -> None:
    wide = torch.zeros(1, triton.MAX_POSITIONS + 1, device=DEVICE)
    attn = torch.zeros(1, 1, 2, 3, device=DEVICE)
    many = attn.new_zeros(1, 1, triton.MAX_SHARED_WORDS + 1, 3)
    calls = [
        (lambda: smk.topk_mask(wide[:, :3].double(), k=1), "float64"),
        (lambda: smk.topk_mask(wide, k=1), "at most 8192"),
        (lambda: smk.sync_topk_mask(attn.double()), "float64"),
        (lambda: smk.sync_topk_mask(attn, token_scores=attn[0, :, :, 0].double()), "float64"),
        (lambda: smk.sync_topk_mask(wide[None, None], skip_keys=0), "at most 8192"),
        (lambda: smk.sync_topk_mask(many, token_score="dual"), "'dual' over 513 words"),
    ]
    for call, reason in calls:
        with smk.use_backend("triton"), pytest.raises(BackendError, match=reason):
            call()
