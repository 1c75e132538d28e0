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
from tests.gpu_on_cpu.build import missing_cuda
from tests.gpu_on_cpu.cuda_launch import cuda_on_cpu
from tests.gpu_on_cpu.program import Traffic
from tests.selection_cases import SIZES, adversarial, positions
from tests.selection_contract import DEVICE, TOKEN_RULES, SelectionContract, assert_same
from tests.sync_cases import case, everything

if DEVICE == "cpu" and missing_cuda() is not None:
    pytest.skip(f"no CUDA device, and none in its place: {missing_cuda()}", allow_module_level=True)


@pytest.fixture(
    scope="module", autouse=True, params=[None, 80, 90], ids=["source", "sm_80", "sm_90"]
)
def traffic(request: pytest.FixtureRequest) -> Iterator[list[Traffic] | None]:
    """Runs the kernels on a GPU, or on a CPU from their source or PTX; then with what they move."""
    with nullcontext() if DEVICE == "cuda" else cuda_on_cpu(request.param) as launches:
        yield launches if request.param else None


class TestSelection(SelectionContract):
    backend = "cuda"

    def serve(self, op: Any, arguments: dict[str, Any]) -> Any:
        moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        with smk.use_backend("cuda"):
            answer = op(**moved)
        return type(answer)(*(t.cpu() for t in answer))

    @pytest.mark.parametrize("largest", [True, False])
    @pytest.mark.parametrize("size", SIZES)
    def test_topk_orders_broken_scores(self, size: int, largest: bool) -> None:
        scores = adversarial(11, size)
        ks = torch.tensor([size // 2, 0, 1, size // 3, size, -1, 2**40, size - 1, 2, 3, 5])
        self.check_topk(scores, k=ks, valid=positions(11, size), largest=largest)
        self.check_topk(scores, k=ks.roll(3), largest=largest)

    @pytest.mark.parametrize("size", [4097, 8193])
    def test_topk_of_rows_too_long_for_registers(self, size: int) -> None:
        self.check_topk(
            adversarial(2, size), ratio=0.3, valid=positions(2, size, share=0.9)[:1].expand(2, -1)
        )
        self.check_topk(torch.zeros(1, size), k=size - 700)

    @pytest.mark.parametrize("width", [0, 3, 90, 700])
    @pytest.mark.parametrize("size", [49, 300])
    def test_topk_widths(self, size: int, width: int) -> None:
        self.check_topk(adversarial(3, size), k=torch.tensor([5 - 2**32, 5, size]), width=width)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [65, 600, 8200])
    def test_topk_half_types(self, dtype: torch.dtype, size: int) -> None:
        self.check_topk(adversarial(2, size).to(dtype), k=20)

    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    @pytest.mark.parametrize(
        ("words", "patches"),
        [(1, 1), (8, 128), (9, 129), (30, 257), (128, 64), (129, 33), (256, 65)],
    )
    def test_sizes(self, words: int, patches: int, token_score: str) -> None:
        """Sizes around those of the tiles."""
        self.check(case(1, 2, words, patches, token_score=token_score, patch_k=3, token_ratio=0.3))

    @pytest.mark.parametrize(("words", "patches"), [(300, 5), (3, 8200)])
    def test_long_rows(self, words: int, patches: int) -> None:
        self.check(everything(case(1, 1, words, patches, token_ratio=0.4)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("patches", [4, 132, 196])
    def test_aligned_rows_are_read_several_patches_at_a_time(
        self, patches: int, dtype: torch.dtype
    ) -> None:
        """The same bits as from rows that are not aligned."""
        aligned = everything(case(heads=5, words=9, patches=patches, skip_keys=0, dtype=dtype))
        shifted = torch.nn.functional.pad(aligned["attn"], (1, 0))
        got = self.check(aligned)
        assert_same(self.select(aligned | {"attn": shifted, "skip_keys": 1}), got)
        for odd in (shifted[..., 1:], shifted.new_zeros(1, 2, 5, 9, patches + 4)[..., 2:-2]):
            odd.copy_(aligned["attn"])
            assert_same(self.select(aligned | {"attn": odd}), got)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("token_score", TOKEN_RULES)
    def test_reads_attention_once(
        self, traffic: list[Traffic] | None, token_score: str, dtype: torch.dtype
    ) -> None:
        """In two launches, which move at most a tenth more, in bytes and in sectors."""
        if traffic is None:
            pytest.skip("needs what the PTX counts")
        arguments = case(1, 12, 30, 256, dtype=dtype, token_score=token_score)
        arguments["token_valid"][:] = True
        traffic.clear()
        self.select(arguments)
        assert len(traffic) == 2
        floor = 12 * 30 * 256 * dtype.itemsize
        assert floor <= sum(launch.bytes_read + launch.bytes_written for launch in traffic)
        assert sum(launch.bytes_read + launch.bytes_written for launch in traffic) <= 1.1 * floor
        assert (
            32 * sum(launch.sectors_read + launch.sectors_written for launch in traffic)
            <= 1.1 * floor
        )

    def test_refusals(self) -> None:
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

    def test_compiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Dynamo cannot trace the mock that stands there where a CPU runs the kernels.
        monkeypatch.setattr(cuda, "unavailable", lambda device_type: None)
        self.check_compiles()
