"""The CUDA kernels of selection: on a GPU, or on the CPU in place of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends import BackendError, cuda
from tests.compiling import assert_compiles_once
from tests.gpu_on_cpu.build import missing_cuda
from tests.gpu_on_cpu.cuda_launch import cuda_on_cpu
from tests.gpu_on_cpu.program import Traffic
from tests.selection_cases import INF, NAN, RULES, SIZES, adversarial, assert_chosen, positions
from tests.sync_cases import assert_right, assert_selects, case, everything, true_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and missing_cuda() is not None:
    pytest.skip(f"no CUDA device, and none in its place: {missing_cuda()}", allow_module_level=True)

TOKEN_RULES = ["max", "text_softmax", "dual"]
SCORES = ("patch_scores", "token_scores")


@pytest.fixture(
    scope="module", autouse=True, params=[None, 80, 90], ids=["source", "sm_80", "sm_90"]
)
def traffic(request: pytest.FixtureRequest) -> Iterator[list[Traffic] | None]:
    """Runs the kernels on a GPU, or on a CPU from their source or PTX; then with what they move."""
    with nullcontext() if DEVICE == "cuda" else cuda_on_cpu(request.param) as launches:
        yield launches if request.param else None


def serve(op: Any, arguments: dict[str, Any]) -> Any:
    """The answer on the CPU, to arguments on the CPU."""
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with smk.use_backend("cuda"):
        answer = op(**moved)
    return type(answer)(*(t.cpu() for t in answer))


def select(arguments: dict[str, Any]) -> smk.SyncMask:
    return serve(smk.sync_topk_mask, arguments)


def check(arguments: dict[str, Any]) -> smk.SyncMask:
    got = select(arguments)
    assert_right(got, arguments)
    return got


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert all(map(torch.equal, got, wanted))


# ---- topk_mask ----


def check_topk(scores: Tensor, **options: Any) -> None:
    got = serve(smk.topk_mask, {"scores": scores, **options})
    width = options.pop("width", None)
    if width is not None:
        assert got.ids.shape[1] == width
    assert_chosen(got.mask, got.ids, scores, options.pop("valid", None), **options)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_topk_orders_broken_scores(size: int, largest: bool) -> None:
    scores = adversarial(11, size)
    ks = torch.tensor([size // 2, 0, 1, size // 3, size, -1, 2**40, size - 1, 2, 3, 5])
    check_topk(scores, k=ks, valid=positions(11, size), largest=largest)
    check_topk(scores, k=ks.roll(3), largest=largest)


@pytest.mark.parametrize("size", [4097, 8193])
def test_topk_of_rows_too_long_for_registers(size: int) -> None:
    check_topk(
        adversarial(2, size), ratio=0.3, valid=positions(2, size, share=0.9)[:1].expand(2, -1)
    )
    check_topk(torch.zeros(1, size), k=size - 700)


def test_topk_keeps_denormals_apart() -> None:
    scores = torch.tensor([[1e-45, 3e-45, 0.0, -1e-45, -3e-45, -0.0]]).expand(6, -1)
    mask = serve(smk.topk_mask, {"scores": scores, "k": torch.arange(1, 7)}).mask
    for i in range(6):
        assert mask[i].nonzero().flatten().tolist() == sorted([1, 0, 2, 5, 3, 4][: i + 1])


@pytest.mark.parametrize("ratio", [0.0, 0.07, 1 / 3, 1.0])
def test_topk_ratio_rounds_up_exactly(ratio: float) -> None:
    valid = torch.arange(100) < torch.tensor([100, 29, 0])[:, None]
    check_topk(adversarial(3, 100), ratio=ratio, valid=valid)


@pytest.mark.parametrize("width", [0, 3, 90, 700])
@pytest.mark.parametrize("size", [49, 300])
def test_topk_widths(size: int, width: int) -> None:
    check_topk(adversarial(3, size), k=torch.tensor([5 - 2**32, 5, size]), width=width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [65, 600, 8200])
def test_topk_half_types(dtype: torch.dtype, size: int) -> None:
    check_topk(adversarial(2, size).to(dtype), k=20)


def test_topk_any_layout() -> None:
    scores, valid = adversarial(3, 20), positions(3, 20)
    wanted = serve(smk.topk_mask, {"scores": scores, "valid": valid, "k": 3})
    turned = {"scores": scores.t().contiguous().t(), "valid": valid.t().contiguous().t(), "k": 3}
    assert_same(serve(smk.topk_mask, turned), wanted)
    nested = {"scores": scores.view(3, 1, 20), "valid": valid.view(3, 1, 20), "k": 3}
    assert torch.equal(serve(smk.topk_mask, nested).ids[:, 0], wanted.ids)
    flat = {"scores": scores[0], "valid": valid[0], "k": 3}
    assert torch.equal(serve(smk.topk_mask, flat).ids, wanted.ids[0])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_topk_empty(shape: tuple[int, int]) -> None:
    check_topk(torch.zeros(shape), k=2)


# ---- sync_topk_mask ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_rules(patch_score: str, token_score: str, dtype: torch.dtype) -> None:
    arguments = case(dtype=dtype, patch_score=patch_score, token_score=token_score, cls_index=2)
    arguments["token_valid"][:, 2] = torch.tensor([True, False])
    check(arguments)


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_every_option(patch_score: str, token_score: str) -> None:
    arguments = case(
        layers=2, heads=5, skip_keys=2, patch_score=patch_score, token_score=token_score
    )
    counts = {"patch_k": torch.tensor([9, 0]), "token_ratio": 0.6, "cls_index": 1}
    check(everything(arguments | counts))


@pytest.mark.parametrize("token_score", TOKEN_RULES)
@pytest.mark.parametrize(
    ("words", "patches"), [(1, 1), (8, 128), (9, 129), (30, 257), (128, 64), (129, 33), (256, 65)]
)
def test_sizes(words: int, patches: int, token_score: str) -> None:
    """Sizes around those of the tiles."""
    check(case(1, 2, words, patches, token_score=token_score, patch_k=3, token_ratio=0.3))


@pytest.mark.parametrize(("words", "patches"), [(300, 5), (3, 8200)])
def test_long_rows(words: int, patches: int) -> None:
    check(everything(case(1, 1, words, patches, token_ratio=0.4)))


@pytest.mark.parametrize("token_score", TOKEN_RULES)
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
def test_empty(sizes: tuple[int, int, int], token_score: str) -> None:
    batch, words, patches = sizes
    arguments = case(batch, 2, words, patches, token_score=token_score, patch_k=2, token_k=2)
    got = select(arguments)
    assert got.patch_scores.tolist() == [[0.0] * patches] * batch
    assert got.token_scores.tolist() == [[0.0] * words] * batch
    assert_selects(got, arguments)


@pytest.mark.parametrize("token_score", TOKEN_RULES)
def test_rows_without_words_or_patches(token_score: str) -> None:
    arguments = case(3, token_score=token_score, patch_k=3)
    arguments["token_valid"][1] = False
    arguments["patch_valid"] = torch.ones(3, 49, dtype=torch.bool)
    arguments["patch_valid"][2] = False
    got = check(arguments)
    assert not got.token_mask[1].any()
    assert got.patch_ids.tolist()[1:] == [[0, 1, 2], [-1, -1, -1]]


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_reads_only_what_counts(patch_score: str, token_score: str) -> None:
    """Invalid words, excluded patches, skipped keys and what lies around attn never show."""
    arguments = everything(case(patch_score=patch_score, token_score=token_score, cls_index=1))
    arguments["token_valid"][:, 1] = True
    counted = torch.cat([torch.zeros(2, 1).bool(), arguments["patch_valid"]], dim=1)
    read = arguments["token_valid"][:, None, :, None] & counted[:, None, None]
    around = torch.full((1, 3, 4, 9, 60), NAN)
    around[:, :2, 1:, :7, 5:55] = arguments["attn"].masked_fill(~read, NAN)
    lse = arguments["lse"].masked_fill(~arguments["token_valid"][:, None], NAN)
    dirty = arguments | {"attn": around[:, :2, 1:, :7, 5:55], "lse": lse}
    assert_same(select(dirty), select(arguments))


@pytest.mark.parametrize("token_score", ["max", "dual"])
def test_strided_attention(token_score: str) -> None:
    arguments = case(layers=2, words=6, patches=20, token_score=token_score)
    wanted = select(arguments)
    for order in ((4, 3, 2, 1, 0), (1, 0, 3, 4, 2)):
        back = torch.tensor(order).argsort().tolist()
        turned = arguments["attn"].permute(order).contiguous().permute(back)
        assert not turned.is_contiguous()
        assert_same(select(arguments | {"attn": turned}), wanted)
    check(arguments | {"attn": arguments["attn"][:1].expand(3, -1, -1, -1, -1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patches", [4, 132, 196])
def test_aligned_rows_are_read_several_patches_at_a_time(patches: int, dtype: torch.dtype) -> None:
    """The same bits as from rows that are not aligned."""
    aligned = everything(case(heads=5, words=9, patches=patches, skip_keys=0, dtype=dtype))
    shifted = torch.nn.functional.pad(aligned["attn"], (1, 0))
    got = check(aligned)
    assert_same(select(aligned | {"attn": shifted, "skip_keys": 1}), got)
    for odd in (shifted[..., 1:], shifted.new_zeros(1, 2, 5, 9, patches + 4)[..., 2:-2]):
        odd.copy_(aligned["attn"])
        assert_same(select(aligned | {"attn": odd}), got)


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_not_finite(patch_score: str, token_score: str) -> None:
    arguments = case(3, 2, 5, 300, patch_score=patch_score, token_score=token_score)
    arguments["token_valid"][:] = True
    arguments["attn"][0, 0, 1, 0, 300] = arguments["attn"][0, 0, 1, 1, 1] = NAN
    arguments["attn"][0, 1, 1, 0, 3] = INF
    arguments["attn"][0, 2, 0, 4, 3] = -INF
    got = select(arguments)
    for ours, truth in zip(got[4:], true_scores(arguments), strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-6, atol=0, equal_nan=True)
    assert_selects(got, arguments)


@pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
def test_not_finite_lse(token_score: str) -> None:
    arguments = case(3, 2, 5, 9, token_score=token_score, lse=torch.randn(1, 3, 2, 5))
    arguments["token_valid"][:] = True
    arguments["lse"][0, 0, 0, 1] = NAN
    arguments["lse"][0, 1, 0, 3] = arguments["lse"][0, 2] = -INF
    got = select(arguments)
    truth = true_scores(arguments)[1].float()
    torch.testing.assert_close(got.token_scores, truth, rtol=1e-6, atol=0, equal_nan=True)
    assert (got.token_scores[2] == 0).all()


def test_large_lse() -> None:
    check(case(token_score="dual", lse=torch.randn(1, 2, 3, 7) + 700))


@pytest.mark.parametrize("token_score", ["max", "text_softmax"])
def test_maximum_of_negative_values(token_score: str) -> None:
    """What lies beyond the last patch does not lift the maximum."""
    arguments = case(token_score=token_score)
    arguments["token_valid"][:] = True
    arguments["attn"] = 1 + arguments["attn"]
    arguments["attn"][..., 2, :] -= 3
    assert (check(arguments).token_scores[:, 2] < 0).all()


@pytest.mark.parametrize(
    "given", [SCORES[:1], SCORES[1:], SCORES], ids=["patches", "words", "both"]
)
@pytest.mark.parametrize(("patch_score", "token_score"), [("mean", "dual"), ("cls", "max")])
def test_own_scores(patch_score: str, token_score: str, given: tuple[str, ...]) -> None:
    """The caller's scores select; the side without is scored as ever."""
    own = {"patch_scores": adversarial(2, 49), "token_scores": adversarial(2, 7)}
    rules = {"patch_score": patch_score, "token_score": token_score}
    arguments = everything(case(**rules)) | {name: own[name] for name in given}
    got = select(arguments)
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
    got = select(arguments)
    assert got.token_ids.tolist() == [row + [-1] * (7 - len(row)) for row in ids]
    assert [mask.nonzero().flatten().tolist() for mask in got.token_mask] == ids


@pytest.mark.parametrize("token_score", TOKEN_RULES)
def test_same_bits_in_any_batch_run_after_run(token_score: str) -> None:
    arguments = case(2, 4, 37, 80, token_score=token_score, patch_k=20, token_k=5)
    whole = select(arguments)
    assert_same(select(arguments), whole)
    row = {"attn": arguments["attn"][:, 1:], "token_valid": arguments["token_valid"][1:]}
    alone = select(arguments | row)
    assert all(torch.equal(ours[0], theirs[1]) for ours, theirs in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_score", TOKEN_RULES)
def test_reads_attention_once(
    traffic: list[Traffic] | None, token_score: str, dtype: torch.dtype
) -> None:
    """In two launches, which move at most a tenth more, in bytes and in sectors."""
    if traffic is None:
        pytest.skip("needs what the PTX counts")
    arguments = case(1, 12, 30, 256, dtype=dtype, token_score=token_score)
    arguments["token_valid"][:] = True
    traffic.clear()
    select(arguments)
    assert len(traffic) == 2
    floor = 12 * 30 * 256 * dtype.itemsize
    assert floor <= sum(launch.bytes_read + launch.bytes_written for launch in traffic)
    assert sum(launch.bytes_read + launch.bytes_written for launch in traffic) <= 1.1 * floor
    assert (
        32 * sum(launch.sectors_read + launch.sectors_written for launch in traffic) <= 1.1 * floor
    )


# ---- registration ----


def test_opcheck() -> None:
    topk, sync = torch.ops.syncmask.topk_mask.cuda, torch.ops.syncmask.sync_topk_mask.cuda
    scores = torch.randn(4, 11, device=DEVICE)
    permuted = scores.view(2, 2, 11).permute(1, 2, 0)
    ks = torch.ones(4, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(topk, (scores, None, ks, 0, 0, 3, True))
    torch.library.opcheck(topk, (permuted, permuted > 0, None, 1, 3, 2, False))
    arguments = everything(case(2, 2, 3, 5, dtype=torch.bfloat16))
    strided = arguments["attn"].transpose(1, 3).contiguous().transpose(1, 3)
    names = ("lse", "token_valid", "patch_valid")
    tensors = [strided.to(DEVICE), *(arguments[name].to(DEVICE) for name in names)]
    counts = (None, 1, 2, 3, ks[:2], 0, 0, 3)
    noise = [arguments[name].to(DEVICE) for name in ("patch_noise", "token_noise", "word_ids")]
    torch.library.opcheck(sync, (*tensors, -1, 2, 1, *counts, None, None, *noise))


def test_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo cannot trace the mock that stands there where a CPU runs the kernels.
    monkeypatch.setattr(cuda, "unavailable", lambda device_type: None)

    def selected(attn: Tensor, valid: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return (
            *smk.sync_topk_mask(attn, valid, token_score="dual", token_k=2),
            *smk.topk_mask(scores, k=scores.shape[1] // 2),
        )

    calls = []
    for b, t, s in [(2, 5, 9), (4, 6, 12)]:
        attn, valid = torch.rand(b, 3, t, s).softmax(dim=-1), torch.rand(b, t) < 0.8
        calls.append((attn.to(DEVICE), valid.to(DEVICE), torch.randn(b, s).to(DEVICE)))
    with smk.use_backend("cuda"):
        assert_compiles_once(selected, calls)


def test_refusals() -> None:
    attn = torch.zeros(1, 1, 2, 3, device=DEVICE)
    many = attn.new_zeros(1, 1, cuda.selection.MAX_SHARED_WORDS + 1, 3)
    calls = [
        (lambda: smk.topk_mask(attn.double(), k=1), "float64"),
        (lambda: smk.sync_topk_mask(attn.double()), "float64"),
        (lambda: smk.sync_topk_mask(attn, token_scores=attn[0, :, :, 0].double()), "float64"),
        (lambda: smk.sync_topk_mask(many, token_score="dual"), "'dual' over 257 words"),
    ]
    for call, reason in calls:
        with smk.use_backend("cuda"), pytest.raises(BackendError, match=reason):
            call()
