"""No GPU kernel takes more than docs/budgets.md allows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

import pytest

from syncmask_kernels.backends import triton as backend
from tests.gpu_on_cpu import build

triton = pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if missing := build.missing():
    pytest.skip(missing, allow_module_level=True)

from tests import budgets  # noqa: E402
from tests.budgets import Rows, tables  # noqa: E402

COMPILED, MOVED = tables(budgets.FILE.read_text())
BOTH = pytest.mark.parametrize("name", ["triton", "cuda"])


def skip_without_compiler(name: str) -> None:
    if name == "cuda" and (missing := build.missing_cuda()):
        pytest.skip(missing)


def rows_of(name: str, table: Rows) -> Rows:
    return {key: row for key, row in table.items() if key[0] == name}


@BOTH
@pytest.mark.parametrize(
    ("measure", "table"),
    [(budgets.compiled, COMPILED), (budgets.moved, MOVED)],
    ids=["compiled", "moved"],
)
def test_no_kernel_outgrows_its_row(measure: Callable[[str], Rows], table: Rows, name: str) -> None:
    skip_without_compiler(name)
    if (here := budgets.made_with(name)) not in budgets.FILE.read_text():
        pytest.skip(f"{here} makes other code than docs/budgets.md is of; `make budgets` renews it")
    found, budget = measure(name), rows_of(name, table)
    grown = budgets.outgrown(found, budget)
    assert not grown, "\n".join(
        [*grown, "If it must be so, `make budgets` writes docs/budgets.md."]
    )
    if shrunk := [" ".join(key) for key, row in found.items() if row != budget[key]]:
        message = "less than in docs/budgets.md, which `make budgets` renews: "
        warnings.warn(message + "; ".join(shrunk), stacklevel=1)


def test_nothing_may_spill() -> None:
    spilled = [n for row in COMPILED.values() for column, n in row.items() if "spilled" in column]
    assert set(spilled) == {0}


@BOTH
def test_sync_topk_mask_is_at_its_floor(name: str) -> None:
    """The floor is little more than attn: masks, ids and scores are one part in a hundred."""
    for types in ("", " bfloat16"):
        row = MOVED[name, f"sync_topk_mask [2, 12, 30, 257]{types}", budgets.WHOLE_CALL]
        assert row["launches"] <= 2
        assert max(row["bytes / floor"], row["sectors / floor"]) <= 1.08


def test_every_kernel_has_rows() -> None:
    modules = [
        import_module(m.name) for m in iter_modules(backend.__path__, f"{backend.__name__}.")
    ]
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {kernel for name, kernel, _ in COMPILED if name == "triton"}
    compiled = {(name, kernel) for name, kernel, _ in COMPILED}
    moved = {(name, kernel.partition("<")[0]) for name, _, kernel in MOVED}
    assert moved == compiled | {("triton", budgets.WHOLE_CALL), ("cuda", budgets.WHOLE_CALL)}


ROW: dict[str, float] = {"registers sm_80": 40, "registers sm_90": 42}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({("triton", "k", "a"): ROW}, []),
        ({("triton", "k", "a"): ROW | {"registers sm_90": 41}}, []),
        (
            {("triton", "k", "a"): ROW | {"registers sm_90": 43}},
            ["triton k a: registers sm_90 is 43, and its budget 42"],
        ),
        (
            {("triton", "k", "b"): ROW},
            ["triton k b: has no row", "triton k a: has a row, and is gone"],
        ),
    ],
)
def test_what_outgrows_a_row_is_named(found: Rows, message: list[str]) -> None:
    table = budgets.table(("backend", "kernel", "compiled for"), {("triton", "k", "a"): ROW})
    (budget,) = tables(f"# Title\n\n{table}\n")
    assert budgets.outgrown(found, budget) == message
