"""torch.compile as the first thing that a process does with the library."""

from __future__ import annotations

import subprocess
import sys

FIRST = """
import torch, syncmask_kernels as smk
from tests.compiling import assert_compiles_once
seed = torch.tensor([3, 4])
assert_compiles_once(
    lambda sim: smk.sample_negatives(sim, seed=seed), [(torch.rand(n, n),) for n in (5, 7)]
)
"""


def test_nothing_is_compiled_twice() -> None:
    """What a first call remembers must not look like a change to the second."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST], check=True)
