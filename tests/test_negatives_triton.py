"""The Triton kernels of `sample_negatives`.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends.eager import philox
from syncmask_kernels.backends.triton import negatives
from syncmask_kernels.backends.triton.negatives_kernels import gumbel
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, inside_nan, serve

NAN, INF = float("nan"), float("inf")
SEED = torch.tensor([-3, 2**40 + 5])
MODES = [
    {"mode": "multinomial", "seed": SEED},
    {"mode": "hardest"},
    {"mode": "hardest", "seed": SEED},
    {"mode": "semi_hard", "margin": 0.125},
    {"mode": "semi_hard", "margin": -0.5, "quantile": 0.0},
    {"mode": "semi_hard", "quantile": 1 / 3},
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int, columns: int) -> Tensor:
    """With ties, infinities, both zeros, denormals and NaN, and a row of NaN alone."""
    special = torch.tensor([0.5, -0.0, 0.0, NAN, INF, -INF, 1e-45, -1e-45, 3e-45])
    picked = special[torch.randint(len(special), (rows, columns), generator=seeded(1))]
    drawn = (8 * torch.randn(rows, columns, generator=seeded())).round() / 8
    sim = torch.where(torch.rand(rows, columns, generator=seeded(2)) < 0.7, drawn, picked)
    sim[-1] = NAN
    return sim


def bars(rows: int, columns: int) -> dict[str, Tensor]:
    """Everything that bars a column; the second row bars all."""
    exclude = torch.rand(rows, columns, generator=seeded(3)) < 0.2
    exclude[1:2] = True
    return {
        "positive": torch.randint(columns, (rows,), generator=seeded(4)),
        "exclude": exclude,
        "row_ids": torch.arange(rows),
        "col_ids": torch.randint(2 * rows, (columns,), generator=seeded(5)),
    }


def check(arguments: dict[str, Any]) -> smk.Negatives:
    got, plain = (serve(smk.sample_negatives, b, arguments) for b in ("triton", "eager"))
    assert all(map(torch.equal, got, plain))
    return got


@pytest.fixture
def short_blocks() -> Any:
    with mock.patch.object(negatives, "MAX_COLUMNS", 32):
        yield


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("columns", [5, 41])
def test_equals_eager(short_blocks: Any, columns: int, options: dict[str, Any]) -> None:
    """Rows of a part of a block, and of two; one is barred, one NaN."""
    got = check({"sim": logits(3, columns), **bars(3, columns), **options})
    assert got.found.tolist() == [True, False, False]


@pytest.mark.parametrize("columns", [1, 32, 97])
def test_sizes(short_blocks: Any, columns: int) -> None:
    check({"sim": torch.zeros(2, columns), "seed": SEED})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", MODES[::3], ids=str)
def test_half_types(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check({"sim": logits(2, 2).to(dtype), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise(short_blocks: Any, dtype: torch.dtype) -> None:
    noise = torch.randint(-2, 3, (3, 70), generator=seeded(6)).to(dtype) / 8
    check({"sim": logits(3, 70), **bars(3, 70), "noise": noise})


@pytest.mark.parametrize("options", MODES[:4:3], ids=str)
def test_reads_only_its_rows(options: dict[str, Any]) -> None:
    given = {"sim": logits(2, 9), **bars(2, 9), **options}
    whole = check(given)
    assert all(map(torch.equal, check(given | {"sim": inside_nan(given["sim"])}), whole))
    alone = {name: value[:1] for name, value in given.items() if name not in ("col_ids", *options)}
    top = check(alone | {"col_ids": given["col_ids"]} | options)
    assert all(torch.equal(ours, theirs[:1]) for ours, theirs in zip(top, whole, strict=True))


@pytest.mark.parametrize("options", MODES[:2], ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1)])
def test_empty(shape: tuple[int, int], options: dict[str, Any]) -> None:
    got = check({"sim": torch.zeros(shape), **options})
    assert got.ids.tolist() == [0] * shape[0]
    assert got.found.tolist() == [False] * shape[0]


@pytest.mark.parametrize("options", MODES[::3], ids=str)
def test_every_row_in_one_launch(options: dict[str, Any]) -> None:
    seen = []
    with mock.patch.object(negatives, "run", lambda launches, _: seen.append(launches)):
        serve(smk.sample_negatives, "triton", {"sim": torch.zeros(7, 7), **options})
    assert [len(launches) for launches in seen] == [1]
    assert seen[0][0].grid == (7,)


@triton.jit
def gumbel_kernel(words, noise, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(noise + at, gumbel(tl.load(words + at)))


def test_gumbel_noise_is_within_two_units_of_the_last_place() -> None:
    """At both ends, where the inner logarithm is 1, and in between."""
    steps = torch.arange(2**12) << 9
    inverse_e = (torch.tensor(2.0**32 / 2.718281828459045).long() >> 9) << 9
    spread = torch.randint(2**32, (2**13,), generator=seeded())
    words = torch.cat([steps, 2**32 - 1 - steps, inverse_e + steps, inverse_e - steps, spread])
    words = torch.cat([words, words[: 2**15 - len(words)]])
    noise = torch.full(words.shape, NAN, device=DEVICE)
    unsigned = words.to(torch.uint32).to(DEVICE)
    gumbel_kernel[(1,)](unsigned, noise, len(words), enable_fp_fusion=False)
    truth = -((((words >> 9).double() + 0.5) * 2.0**-23).log().neg().log())
    plain = philox.gumbel(words)
    unit = (torch.nextafter(plain.abs(), torch.tensor(INF)) - plain.abs()).clamp(min=2.0**-24)
    assert ((noise.cpu().double() - truth).abs() <= 2 * unit).all()


def test_opcheck() -> None:
    sim, ids = torch.randn(2, 5, device=DEVICE), torch.arange(5, device=DEVICE)
    seed = SEED.to(DEVICE)
    for call in [
        (sim.t(), None, None, None, None, 0, 0.0, 1, 1, seed, None),
        (sim, ids[:2], sim > 1, ids[:2], ids, 1, 0.0, 1, 1, None, None),
    ]:
        torch.library.opcheck(negatives.sample_negatives, call)


def test_compiles() -> None:
    def sampled(sim: Tensor, items: Tensor, seed: Tensor) -> smk.Negatives:
        return smk.sample_negatives(sim, row_ids=items, col_ids=items, seed=seed)

    calls = [
        tuple(t.to(DEVICE) for t in (torch.randn(n, n), torch.arange(n) // 2, SEED)) for n in (4, 6)
    ]
    with smk.use_backend("triton"):
        assert_compiles_once(sampled, calls)


def test_refuses_float64() -> None:
    with smk.use_backend("triton"), pytest.raises(smk.BackendError, match="float64"):
        smk.sample_negatives(torch.zeros(2, 2, device=DEVICE, dtype=torch.float64))
