"""Tests of `topk_mask` and `sync_topk_mask` that the kernels of every GPU backend have to pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from tests.compiling import assert_compiles_once
from tests.selection_cases import INF, NAN, RULES, adversarial, assert_chosen, positions
from tests.sync_cases import assert_right, assert_selects, case, everything, true_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN_RULES = ["max", "text_softmax", "dual"]
SCORES = ("patch_scores", "token_scores")


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert all(map(torch.equal, got, wanted))


class SelectionContract(ABC):
    """A class of tests of `backend`, which adds those of its own sizes and limits."""

    backend: str

    @abstractmethod
    def serve(self, op: Any, arguments: dict[str, Any]) -> Any:
        """The answer on the CPU, to arguments on the CPU."""

    def select(self, arguments: dict[str, Any]) -> smk.SyncMask:
        selected: smk.SyncMask = self.serve(smk.sync_topk_mask, arguments)
        return selected

    def check(self, arguments: dict[str, Any]) -> smk.SyncMask:
        got = self.select(arguments)
        assert_right(got, arguments)
        return got

    def check_topk(self, scores: Tensor, **options: Any) -> None:
        got = self.serve(smk.topk_mask, {"scores": scores, **options})
        width = options.pop("width", None)
        if width is not None:
            assert got.ids.shape[1] == width
        assert_chosen(got.mask, got.ids, scores, options.pop("valid", None), **options)

    def test_topk_keeps_denormals_apart(self) -> None:
        scores = torch.tensor([[1e-45, 3e-45, 0.0, -1e-45, -3e-45, -0.0]]).expand(6, -1)
        mask = self.serve(smk.topk_mask, {"scores": scores, "k": torch.arange(1, 7)}).mask
        for i in range(6):
            assert mask[i].nonzero().flatten().tolist() == sorted([1, 0, 2, 5, 3, 4][: i + 1])

    @pytest.mark.parametrize("ratio", [0.0, 0.07, 1 / 3, 1.0])
    def test_topk_ratio_rounds_up_exactly(self, ratio: float) -> None:
        valid = torch.arange(100) < torch.tensor([100, 29, 0])[:, None]
        self.check_topk(adversarial(3, 100), ratio=ratio, valid=valid)

    def test_topk_any_layout(self) -> None:
        scores, valid = adversarial(3, 20), positions(3, 20)
        wanted = self.serve(smk.topk_mask, {"scores": scores, "valid": valid, "k": 3})
        turned = {
            "scores": scores.t().contiguous().t(),
            "valid": valid.t().contiguous().t(),
            "k": 3,
        }
        assert_same(self.serve(smk.topk_mask, turned), wanted)
        nested = {"scores": scores.view(3, 1, 20), "valid": valid.view(3, 1, 20), "k": 3}
        assert torch.equal(self.serve(smk.topk_mask, nested).ids[:, 0], wanted.ids)
        flat = {"scores": scores[0], "valid": valid[0], "k": 3}
        assert torch.equal(self.serve(smk.topk_mask, flat).ids, wanted.ids[0])

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
    def test_topk_empty(self, shape: tuple[int, int]) -> None:
        self.check_topk(torch.zeros(shape), k=2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("patch_score", "token_score"), RULES)
    def test_rules(self, patch_score: str, token_score: str, dtype: torch.dtype) -> None:
        arguments = case(dtype=dtype, patch_score=patch_score, token_score=token_score, cls_index=2)
        arguments["token_valid"][:, 2] = torch.tensor([True, False])
        self.check(arguments)

    @pytest.mark.parametrize(("patch_score", "token_score"), RULES)
    def test_every_option(self, patch_score: str, token_score: str) -> None:
        arguments = case(
            layers=2, heads=5, skip_keys=2, patch_score=patch_score, token_score=token_score
        )
        counts = {"patch_k": torch.tensor([9, 0]), "token_ratio": 0.6, "cls_index": 1}
        self.check(everything(arguments | counts))

    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    @pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
    def test_empty(self, sizes: tuple[int, int, int], token_score: str) -> None:
        batch, words, patches = sizes
        arguments = case(batch, 2, words, patches, token_score=token_score, patch_k=2, token_k=2)
        got = self.select(arguments)
        assert got.patch_scores.tolist() == [[0.0] * patches] * batch
        assert got.token_scores.tolist() == [[0.0] * words] * batch
        assert_selects(got, arguments)

    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    def test_rows_without_words_or_patches(self, token_score: str) -> None:
        arguments = case(3, token_score=token_score, patch_k=3)
        arguments["token_valid"][1] = False
        arguments["patch_valid"] = torch.ones(3, 49, dtype=torch.bool)
        arguments["patch_valid"][2] = False
        got = self.check(arguments)
        assert not got.token_mask[1].any()
        assert got.patch_ids.tolist()[1:] == [[0, 1, 2], [-1, -1, -1]]

    @pytest.mark.parametrize(("patch_score", "token_score"), RULES)
    def test_reads_only_what_counts(self, patch_score: str, token_score: str) -> None:
        """Invalid words, excluded patches, skipped keys and what lies around attn never show."""
        arguments = everything(case(patch_score=patch_score, token_score=token_score, cls_index=1))
        arguments["token_valid"][:, 1] = True
        counted = torch.cat([torch.zeros(2, 1).bool(), arguments["patch_valid"]], dim=1)
        read = arguments["token_valid"][:, None, :, None] & counted[:, None, None]
        around = torch.full((1, 3, 4, 9, 60), NAN)
        around[:, :2, 1:, :7, 5:55] = arguments["attn"].masked_fill(~read, NAN)
        lse = arguments["lse"].masked_fill(~arguments["token_valid"][:, None], NAN)
        dirty = arguments | {"attn": around[:, :2, 1:, :7, 5:55], "lse": lse}
        assert_same(self.select(dirty), self.select(arguments))

    @pytest.mark.parametrize("token_score", ["max", "dual"])
    def test_strided_attention(self, token_score: str) -> None:
        arguments = case(layers=2, words=6, patches=20, token_score=token_score)
        wanted = self.select(arguments)
        for order in ((4, 3, 2, 1, 0), (1, 0, 3, 4, 2)):
            back = torch.tensor(order).argsort().tolist()
            turned = arguments["attn"].permute(order).contiguous().permute(back)
            assert not turned.is_contiguous()
            assert_same(self.select(arguments | {"attn": turned}), wanted)
        self.check(arguments | {"attn": arguments["attn"][:1].expand(3, -1, -1, -1, -1)})

    @pytest.mark.parametrize(("patch_score", "token_score"), RULES)
    def test_not_finite(self, patch_score: str, token_score: str) -> None:
        arguments = case(3, 2, 5, 300, patch_score=patch_score, token_score=token_score)
        arguments["token_valid"][:] = True
        arguments["attn"][0, 0, 1, 0, 300] = arguments["attn"][0, 0, 1, 1, 1] = NAN
        arguments["attn"][0, 1, 1, 0, 3] = INF
        arguments["attn"][0, 2, 0, 4, 3] = -INF
        got = self.select(arguments)
        for ours, truth in zip(got[4:], true_scores(arguments), strict=True):
            torch.testing.assert_close(ours, truth.float(), rtol=1e-6, atol=0, equal_nan=True)
        assert_selects(got, arguments)

    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    def test_a_cls_row_that_is_no_word_shows_in_no_word(self, token_score: str) -> None:
        arguments = case(words=40, patch_score="cls", token_score=token_score)
        arguments["token_valid"][:, 0] = False
        clean = self.check(arguments)
        arguments["attn"][:, :, :, 0, 3:6] = torch.tensor([NAN, INF, -INF])
        got = self.select(arguments)
        assert torch.equal(got.token_scores, clean.token_scores)
        assert not got.patch_scores[:, 2:5].isfinite().any()
        assert torch.equal(got.patch_scores[:, 5:], clean.patch_scores[:, 5:])

    @pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
    def test_not_finite_lse(self, token_score: str) -> None:
        arguments = case(3, 2, 5, 9, token_score=token_score, lse=torch.randn(1, 3, 2, 5))
        arguments["token_valid"][:] = True
        arguments["lse"][0, 0, 0, 1] = NAN
        arguments["lse"][0, 1, 0, 3] = arguments["lse"][0, 2] = -INF
        got = self.select(arguments)
        truth = true_scores(arguments)[1].float()
        torch.testing.assert_close(got.token_scores, truth, rtol=1e-6, atol=0, equal_nan=True)
        assert (got.token_scores[2] == 0).all()

    @pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
    def test_not_finite_beside_a_word_without_weight(self, token_score: str) -> None:
        """NaN of one word is in the share of all; NaN of a word without weight is in no other's."""
        arguments = case(2, 2, 5, 9, token_score=token_score, lse=torch.randn(1, 2, 2, 5))
        arguments["token_valid"][:] = True
        arguments["lse"][..., 1] = -INF
        arguments["attn"][0, 0, 0, 3, 2] = arguments["attn"][0, 1, 0, 1, 2] = NAN
        got = self.select(arguments)
        truth = true_scores(arguments)[1].float()
        torch.testing.assert_close(got.token_scores, truth, rtol=1e-6, atol=0, equal_nan=True)
        assert got.token_scores[0].isnan().all()
        assert got.token_scores[1, [0, 2, 3, 4]].isfinite().all()

    def test_large_lse(self) -> None:
        self.check(case(token_score="dual", lse=torch.randn(1, 2, 3, 7) + 700))

    @pytest.mark.parametrize("token_score", ["max", "text_softmax"])
    def test_maximum_of_negative_values(self, token_score: str) -> None:
        """What lies beyond the last patch does not lift the maximum."""
        arguments = case(token_score=token_score)
        arguments["token_valid"][:] = True
        arguments["attn"] = 1 + arguments["attn"]
        arguments["attn"][..., 2, :] -= 3
        assert (self.check(arguments).token_scores[:, 2] < 0).all()

    @pytest.mark.parametrize(
        "given", [SCORES[:1], SCORES[1:], SCORES], ids=["patches", "words", "both"]
    )
    @pytest.mark.parametrize(("patch_score", "token_score"), [("mean", "dual"), ("cls", "max")])
    def test_own_scores(self, patch_score: str, token_score: str, given: tuple[str, ...]) -> None:
        """The caller's scores select; the side without is scored as ever."""
        own = {"patch_scores": adversarial(2, 49), "token_scores": adversarial(2, 7)}
        rules = {"patch_score": patch_score, "token_score": token_score}
        arguments = everything(case(**rules)) | {name: own[name] for name in given}
        got = self.select(arguments)
        truth = dict(zip(SCORES, true_scores(arguments), strict=True))
        for name in SCORES:
            wanted = own[name] if name in given else truth[name].float()
            torch.testing.assert_close(
                getattr(got, name), wanted, rtol=1e-6, atol=0, equal_nan=True
            )
        assert_selects(got, arguments)

    def test_pieces_of_words_are_chosen_together(self) -> None:
        scores = torch.tensor([[0.1, NAN, 0.9, 0.2, 0.9, 0.0, 0.3]])
        word_ids = torch.tensor([[4, 7, 4, -1, 7, 2, 2]])
        valid = torch.tensor([[True, True, True, True, True, True, False]])
        attn = torch.ones(1, 1, 7, 2)
        rows = {"attn": attn, "token_scores": scores, "word_ids": word_ids, "token_valid": valid}
        arguments = {name: value.expand(4, *value.shape[1:]) for name, value in rows.items()}
        arguments["token_k"] = torch.arange(1, 5)
        ids = [[0, 2], [0, 1, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 4, 5]]
        got = self.select(arguments)
        assert got.token_ids.tolist() == [row + [-1] * (7 - len(row)) for row in ids]
        assert [mask.nonzero().flatten().tolist() for mask in got.token_mask] == ids

    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    def test_same_bits_in_any_batch_run_after_run(self, token_score: str) -> None:
        arguments = case(2, 4, 37, 80, token_score=token_score, patch_k=20, token_k=5)
        whole = self.select(arguments)
        assert_same(self.select(arguments), whole)
        row = {"attn": arguments["attn"][:, 1:], "token_valid": arguments["token_valid"][1:]}
        alone = self.select(arguments | row)
        assert all(
            torch.equal(ours[0], theirs[1]) for ours, theirs in zip(alone, whole, strict=True)
        )

    def test_opcheck(self) -> None:
        topk, sync = (
            getattr(getattr(torch.ops.syncmask, op), self.backend)
            for op in ("topk_mask", "sync_topk_mask")
        )
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

    def check_compiles(self) -> None:
        def selected(attn: Tensor, valid: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
            return (
                *smk.sync_topk_mask(attn, valid, token_score="dual", token_k=2),
                *smk.topk_mask(scores, k=scores.shape[1] // 2),
            )

        calls = []
        for b, t, s in [(2, 5, 9), (4, 6, 12)]:
            attn, valid = torch.rand(b, 3, t, s).softmax(dim=-1), torch.rand(b, t) < 0.8
            calls.append((attn.to(DEVICE), valid.to(DEVICE), torch.randn(b, s).to(DEVICE)))
        with smk.use_backend(self.backend):
            assert_compiles_once(selected, calls)
