"""The CUDA kernel of grouped_order: on a GPU, or on the CPU in place of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops.grouping import grouped_order as oracle
from syncmask_kernels.backends import BackendError, cuda
from tests.compiling import assert_compiles_once
from tests.gpu_on_cpu.build import missing_cuda
from tests.gpu_on_cpu.cuda_launch import cuda_on_cpu
from tests.gpu_on_cpu.program import Traffic
from tests.grouping_cases import MODES, NAN, broken, items, whole_numbers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and missing_cuda() is not None:
    pytest.skip(f"no CUDA device, and none in its place: {missing_cuda()}", allow_module_level=True)


@pytest.fixture(
    scope="module", autouse=True, params=[None, 80, 90], ids=["source", "sm_80", "sm_90"]
)
def traffic(request: pytest.FixtureRequest) -> Iterator[list[Traffic] | None]:
    """Runs the kernels on a GPU, or on a CPU from their source or PTX; then with what they move."""
    with nullcontext() if DEVICE == "cuda" else cuda_on_cpu(request.param) as launches:
        yield launches if request.param else None


def serve(image: Tensor, text: Tensor, ids: Tensor | None = None, **options: object) -> list[int]:
    on_device = [x if x is None else x.to(DEVICE) for x in (image, text, ids)]
    with smk.use_backend("cuda"):
        return smk.grouped_order(*on_device, **options).tolist()


def check(image: Tensor, text: Tensor, ids: Tensor | None = None, **options: object) -> list[int]:
    got = serve(image, text, ids, **options)
    assert got == oracle(image.double(), text.double(), ids, **options)
    return got


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "dim"), [(0, 3), (1, 1), (2, 40), (5, 0), (33, 1), (70, 9)])
def test_equals_oracle(size: int, dim: int, mode: str) -> None:
    image, text = whole_numbers(size, dim)
    check(image, text, mode=mode, start=size // 2)
    check(image, text, items(size, max(size // 3, 1)), mode=mode, window=7)


def test_long_rows() -> None:
    check(*whole_numbers(9, 257))


@pytest.mark.parametrize("mode", MODES)
def test_broken_features(mode: str) -> None:
    image, text = broken(40)
    check(image, text, items(40, 11), mode=mode, start=4, window=9)
    check(torch.full((5, 2), NAN), text[:5, :2], mode=mode, start=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype) for x in whole_numbers(30, 12))
    check(image, text)
    check(image, text.float())


def test_views() -> None:
    image, text = whole_numbers(20, 6)
    turned = serve(image.t().contiguous().t(), text.repeat(1, 2)[:, :6])
    assert turned == check(image, text)


def test_one_item_only() -> None:
    image, text = whole_numbers(9, 4)
    ids = torch.full((9,), -1)
    assert check(image, text, ids, window=3, start=4) == [4, 0, 1, 2, 3, 5, 6, 7, 8]


def test_one_launch_reads_what_is_unused(traffic: list[Traffic] | None) -> None:
    """Each step reads the rows that are left, each beside the row it is compared with."""
    if traffic is None:
        pytest.skip("needs what the PTX counts")
    size, dim = 64, 32
    traffic.clear()
    serve(*whole_numbers(size, dim))
    assert len(traffic) == 1
    rows = 4 * dim * size * (size - 1) // 2
    assert 2 * rows <= traffic[0].bytes_read <= 2.5 * rows


def test_opcheck() -> None:
    image, text = (x.to(DEVICE) for x in whole_numbers(9, 4))
    overload = torch.ops.syncmask.grouped_order.cuda
    torch.library.opcheck(overload, (image, text, items(9, 3).to(DEVICE), 2, True, 4))
    torch.library.opcheck(overload, (image.half(), text.t().contiguous().t(), None, 0, False, 1))


def test_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo cannot trace the mock that stands there where a CPU runs the kernels.
    monkeypatch.setattr(cuda, "unavailable", lambda device_type: None)
    calls = [tuple(x.to(DEVICE) for x in whole_numbers(n, d)) for n, d in [(7, 3), (9, 5)]]
    with smk.use_backend("cuda"):
        assert_compiles_once(lambda image, text: smk.grouped_order(image, text), calls)


def test_refuses_float64() -> None:
    with smk.use_backend("cuda"), pytest.raises(BackendError, match="float64"):
        smk.grouped_order(*(x.double().to(DEVICE) for x in whole_numbers(3, 2)))
