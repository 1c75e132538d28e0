"""The CUDA kernels, run on the CPU under sanitizers: nothing out of bounds, no race."""

from __future__ import annotations

import pytest

from tests.gpu_on_cpu import build

# Every kernel, with rows that end where the allocation ends.
CUDA = """
import torch
import syncmask_kernels as smk
from tests.gpu_on_cpu.cuda_launch import cuda_on_cpu
from tests.grouping_cases import items, whole_numbers
from tests.selection_cases import adversarial, positions
from tests.sync_cases import assert_right, case, everything

CASES = [
    (9, 132, "max"), (9, 129, "max"), (17, 65, "dual"), (129, 33, "text_softmax"), (3, 4097, "max")
]
with cuda_on_cpu(), smk.use_backend("cuda"):
    for size, dtype in [(5, torch.float32), (257, torch.bfloat16), (4097, torch.float16)]:
        scores, valid = adversarial(3, size).to(dtype), positions(3, size)
        smk.topk_mask(scores, ratio=0.3, valid=valid, width=9)
    for words, patches, rule in CASES:
        arguments = everything(case(2, 5, words, patches, skip_keys=0, token_score=rule))
        arguments["token_valid"][-1, -1] = True
        assert_right(smk.sync_topk_mask(**arguments), arguments)
    for size in (1, 70):
        smk.grouped_order(*whole_numbers(size, 9), items(size, 9), window=5, mode="semi_hard")
print("clean")
"""


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_cuda_sources(sanitizer: str) -> None:
    if missing := build.missing_cuda():
        pytest.skip(missing)
    done = build.sanitized(sanitizer, "-c", CUDA)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clean\n"
