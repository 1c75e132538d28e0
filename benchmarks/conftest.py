"""`pytest benchmarks --benchmark-only`: times, memory and launches, as text, CSV and figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figure, measure, report

CSV = Path(".benchmarks/comparisons.csv")
_comparisons: list[report.Comparison] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("comparisons")
    group.addoption("--csv", type=Path, default=CSV, help="table to write; the figure goes beside")
    group.addoption("--rounds", type=int, default=60, help="turns of a comparison, at most")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Callable[..., dict[str, measure.Function]]:
    """``compiled(function)`` -> the contender that torch.compile makes of it, unless left out."""

    def compile_(function: measure.Function) -> dict[str, measure.Function]:
        if request.config.getoption("--no-compile"):
            return {}
        torch._dynamo.reset()
        return {"torch.compile": torch.compile(function, dynamic=False)}

    return compile_


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Measure contenders (the first is the floor, the last this library) that pass `check`."""

    def run(
        case: report.Case,
        contenders: dict[str, measure.Function],
        inputs: Sequence[Any],
        check: measure.Check,
    ) -> None:
        with torch.no_grad():
            rounds = request.config.getoption("--rounds")
            rows = measure.compare(contenders, inputs, check, rounds)
            _comparisons.append(report.Comparison(case, rows))
            benchmark.extra_info["medians_ms"] = {row.contender: row.median for row in rows}
            ours, turns = list(contenders.values())[-1], iter(range(10**9))

            def call() -> None:
                ours(inputs[next(turns) % len(inputs)])
                if measure.DEVICE == "cuda":
                    torch.cuda.synchronize()

            benchmark.pedantic(call)

    return run


def pytest_configure(config: pytest.Config) -> None:
    # Its table would show this library alone, timed by the wall clock.
    config.option.benchmark_quiet = True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _comparisons:
        return
    machine = report.machine()
    terminalreporter.section(f"comparisons on {machine['device']}, threads: {machine['threads']}")
    for line in report.as_text(_comparisons):
        terminalreporter.write_line(line)
    table = config.getoption("--csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    picture = table.with_suffix(".png")
    report.write_csv(table, _comparisons, machine)
    figure.draw(picture, _comparisons, machine)
    terminalreporter.write_line(f"\nwritten: {table}, {picture}")
