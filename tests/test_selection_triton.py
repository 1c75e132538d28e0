"""The Triton kernels of selection, on a GPU or in Triton's interpreter.

The interpreter must be chosen before Triton is imported, and nothing compiles then. So without a
GPU these tests need a process of their own: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import syncmask_kernels as smk
from syncmask_kernels.backends import BackendError, triton
from tests.on_triton import DEVICE, serve
from tests.selection_cases import adversarial, positions
from tests.selection_contract import TOKEN_RULES, SelectionContract
from tests.sync_cases import case, seeded


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
class TestSelection(SelectionContract):
    backend = "triton"

    def serve(self, op: Any, arguments: dict[str, Any]) -> Any:
        return serve(op, "triton", arguments)

    @pytest.mark.parametrize("largest", [True, False])
    @pytest.mark.parametrize("size", [1, 49, 197, 257])
    def test_topk_orders_broken_scores(self, size: int, largest: bool) -> None:
        scores = adversarial(11, size)
        ks = torch.tensor([size // 2, 0, 1, size // 3, size, -1, 2**40, size - 1, 2, 3, 5])
        self.check_topk(scores, k=ks, valid=positions(11, size), largest=largest)
        self.check_topk(scores, k=ks.roll(3), largest=largest)

    def test_topk_counts_and_widths(self) -> None:
        k = torch.tensor([-3, 5 - 2**32, 5, 2**40])
        for width in (None, 0, 3, 90):
            self.check_topk(adversarial(4, 49), k=k, width=width)
        self.check_topk(adversarial(1, 7), k=12)
        self.check_topk(adversarial(1, 7), k=2**40, width=7)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_topk_half_types(self, dtype: torch.dtype) -> None:
        self.check_topk(adversarial(3, 65).to(dtype), k=20)

    def test_topk_long_rows(self) -> None:
        self.check_topk(adversarial(1, 4100), ratio=0.3)

    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    @pytest.mark.parametrize(("words", "patches"), [(1, 1), (33, 5), (5, 257), (65, 33)])
    def test_sizes(self, words: int, patches: int, token_score: str) -> None:
        """Sizes around those of the tiles."""
        self.check(case(1, 2, words, patches, token_score=token_score, patch_k=3, token_ratio=0.3))

    @pytest.mark.skipif(not triton.INTERPRETED, reason="watches the loads of the interpreter")
    @pytest.mark.parametrize("token_score", ["max", "dual"])
    def test_reads_each_weight_that_counts_once(self, token_score: str) -> None:
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
            self.select(arguments)
        offsets = (torch.cat(read) - attn.data_ptr()) // attn.element_size()
        offsets = offsets[(offsets >= 0) & (offsets < everywhere.numel())]
        counted = torch.cat([torch.zeros(1, 1).bool(), arguments["patch_valid"]], dim=1)
        wanted = arguments["token_valid"][:, None, :, None] & counted[:, None, None]
        places = torch.arange(attn.numel()).view(attn.shape)
        assert torch.equal(offsets.sort().values, places[wanted.expand(attn.shape)])

    def test_two_launches_at_most(self) -> None:
        from syncmask_kernels.backends.triton import selection

        own = {"patch_scores": torch.rand(2, 49), "token_scores": torch.rand(2, 7)}
        for arguments, launches in ((case(), 2), (case() | own, 1)):
            with mock.patch.object(selection, "run", wraps=selection.run) as run:
                self.select(arguments)
            assert len(run.call_args.args[0]) == launches

    def test_gradients_are_those_of_eager(self) -> None:
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

    def test_refusals(self) -> None:
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

    def test_compiles(self) -> None:
        self.check_compiles()
