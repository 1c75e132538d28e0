"""How operators are compared: in turns, on inputs that rotate beyond the caches, by medians.

A benchmark names its contenders; the first one is the floor, the last one this library. Before
anything is timed, the results of all but the floor are checked, so that a wrong result has no time.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

ROUNDS = 60

Function = Callable[[Any], Any]


class Comparison(NamedTuple):
    title: str
    milliseconds: dict[str, float]


_comparisons: list[Comparison] = []


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(function: Function, argument: Any) -> float:
    _synchronize()
    start = time.perf_counter()
    function(argument)
    _synchronize()
    return 1000 * (time.perf_counter() - start)


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., dict[str, float]]:
    """``compare(title, contenders, inputs, check)`` -> each contender's median milliseconds."""

    def run(
        title: str,
        contenders: dict[str, Function],
        inputs: Sequence[Any],
        check: Callable[[Any, Any], None],
    ) -> dict[str, float]:
        names = list(contenders)
        floor, *judged = names
        truth = contenders[judged[0]](inputs[0])
        for name in judged[1:]:
            check(contenders[name](inputs[0]), truth)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(ROUNDS):
            first = turn % len(names)
            for i, name in enumerate(names[first:] + names[:first]):
                argument = inputs[(turn + i) % len(inputs)]
                times[name].append(_timed(contenders[name], argument))
        medians = {name: statistics.median(t) for name, t in times.items()}
        benchmark.extra_info.update({"medians_ms": medians, "floor": floor})
        _comparisons.append(Comparison(title, medians))
        turns = iter(range(10**9))
        benchmark.pedantic(
            contenders[names[-1]],
            setup=lambda: ((inputs[next(turns) % len(inputs)],), {}),
            rounds=10,
        )
        return medians

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _comparisons:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    threads = torch.get_num_threads()
    write = terminalreporter.write_line
    terminalreporter.section(f"comparisons: {device or platform.machine()}, {threads} threads")
    for title, medians in _comparisons:
        write(title)
        floor = next(iter(medians.values()))
        ours = list(medians.values())[-1]
        for name, median in medians.items():
            write(
                f"  {name:<16}{median:9.3f} ms {median / floor:7.2f} x floor"
                f"{median / ours:7.2f} x this library"
            )
