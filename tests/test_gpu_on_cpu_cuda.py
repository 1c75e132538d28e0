"""CUDA sources on the CPU, compiled by g++ or run from PTX: right answers, and defects found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu import build, examples

if missing := build.missing_cuda():
    pytest.skip(missing, allow_module_level=True)

from tests.gpu_on_cpu.cuda_launch import launches_on_cpu
from tests.gpu_on_cpu.program import ExecutionError

ROWS, COLUMNS = 5, 300
PTX = [None, 80, 90]
NAMES = ["g++", "sm_80", "sm_90"]


def numbers() -> Tensor:
    """Small integers: their sums are exact in any order."""
    drawn = torch.randint(-9, 9, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    return drawn.float()


@pytest.mark.parametrize("arch", PTX, ids=NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_row_sums(arch: int | None, seed: int) -> None:
    x = numbers()
    with launches_on_cpu(examples.ROOT, arch, seed) as traffic:
        assert torch.equal(examples.row_sum(x), x.sum(1))
    counted = [tuple(launch)[1:3] for launch in traffic]
    assert counted == ([] if arch is None else [(x.nbytes, 4 * ROWS)])


@pytest.mark.parametrize("arch", PTX, ids=NAMES)
@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("wrong lanes", r"lane 0.* mask fffffffe"),
        ("divergent barrier", r"barrier"),
    ],
)
def test_defects_stop_the_kernel(arch: int | None, defect: str, message: str) -> None:
    where = r"row_sum.*, block \(\d.*, thread \(\d.*"
    with pytest.raises(RuntimeError, match=where + message), launches_on_cpu(examples.ROOT, arch):
        examples.row_sum(numbers(), defect)


@pytest.mark.parametrize("arch", [80, 90], ids=NAMES[1:])
def test_ptx_finds_a_missing_barrier_in_any_order(arch: int) -> None:
    for seed in range(5):
        with pytest.raises(ExecutionError) as caught, launches_on_cpu(examples.ROOT, arch, seed):
            examples.row_sum(numbers(), "no barrier")
        assert "race" in str(caught.value)
        assert "row_sum.cu:" in str(caught.value)


def test_a_missing_barrier_shows_in_some_order() -> None:
    x, wrong = numbers(), 0
    for seed in range(5):
        with launches_on_cpu(examples.ROOT, seed=seed):
            wrong += not torch.equal(examples.row_sum(x, "no barrier"), x.sum(1))
    assert wrong > 0


@pytest.mark.parametrize("arch", PTX, ids=NAMES)
def test_threads_exchange(arch: int | None) -> None:
    i = torch.arange(64)
    lane, warp = i % 32, i // 32
    wanted = [
        63 - i,
        i // 8 * 8 + 5,
        (i - 3).where(i % 16 >= 3, i),
        (i + 3).where(i % 16 < 13, i),
        i ^ 9,
        7,
        warp == 1,
        warp == 0,
        torch.tensor([496, 1520])[warp],
        torch.tensor([-31, -63])[warp],
        torch.tensor([31, 63])[warp],
        torch.where(lane < 30, 5, 2),
        22,
        1,
        0,
        (i / 7).half(),
        (torch.tensor(1.0).view(torch.int32) + i.int()).view(torch.float32),
        torch.tensor([(n & -n).bit_length() + 32 - n.bit_length() for n in range(64)]),
    ]
    for seed in range(3):
        with launches_on_cpu(examples.ROOT, arch, seed):
            results, counters = examples.exchange(64)
        for got, row in zip(results, wanted, strict=True):
            assert torch.equal(got, torch.as_tensor(row).float().expand(64))
        assert counters.tolist() == [128, 63, 0, 11]


# Prints "clean" after the example without a defect, and must not live to print "defect".
UNDER_SANITIZER = """
import torch
from tests.gpu_on_cpu import examples
from tests.gpu_on_cpu.cuda_launch import launches_on_cpu
x = torch.ones(5, 300)
with launches_on_cpu(examples.ROOT):
    assert torch.equal(examples.row_sum(x), x.sum(1))
    print("clean", flush=True)
    examples.row_sum(x, {defect!r})
print("defect")
"""


@pytest.mark.parametrize(
    ("sanitizer", "defect", "report"),
    [
        ("address", "out of bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("thread", "no barrier", "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers_find(sanitizer: str, defect: str, report: str) -> None:
    done = build.sanitized(sanitizer, "-c", UNDER_SANITIZER.format(defect=defect))
    assert done.stdout == "clean\n", done.stderr
    assert done.returncode != 0
    assert report in done.stderr
    assert "row_sum.cu:" in done.stderr


def test_rewrites_what_is_no_cpp() -> None:
    rewritten = build.for_fibers(
        "extern __shared__ float all[];\n"
        "__shared__ __align__(16) int slots[2][kWarps];\n"
        "space::kernel<T, f()>\n    <<<dim3(n, 2), 64, 0, stream>>>(a, b[i]);\n"
        "plain<<<1, 32>>>();"
    )
    assert rewritten == (
        "float* all = gpu::dynamic_shared<float>();\n"
        "auto& slots = gpu::shared<int[2][kWarps]>([] {});\n"
        'gpu::launch("space::kernel<T, f()>", space::kernel<T, f()>\n    , '
        "{dim3(n, 2), 64, 0, stream}, a, b[i]);\n"
        'gpu::launch("plain", plain, {1, 32});'
    )
