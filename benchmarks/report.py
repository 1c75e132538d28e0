"""How comparisons are told: cases, text and CSV."""

from __future__ import annotations

import csv
import platform
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import syncmask_kernels as smk
from benchmarks.measure import DEVICE, Measurement


class Case(NamedTuple):
    """What is computed: operator, shape, type, and what is special (layout, words that count)."""

    op: str
    shape: Sequence[int]
    dtype: torch.dtype
    note: str = ""

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def inputs(self) -> str:
        """All but the operator, in words."""
        note = f", {self.note}" if self.note else ""
        return f"{list(self.shape)} {self.type_name}{note}"


class Comparison(NamedTuple):
    """One case; the first row is the floor, the last one this library."""

    case: Case
    rows: list[Measurement]

    @property
    def floor(self) -> float:
        return self.rows[0].median

    @property
    def ours(self) -> float:
        return self.rows[-1].median

    @property
    def lost(self) -> bool:
        """Whether another contender than the floor is faster than this library."""
        return any(row.median < self.ours for row in self.rows[1:-1])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def machine() -> dict[str, Any]:
    """Where and with what the times were taken; columns of the CSV."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "syncmask_kernels": smk.__version__,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def as_text(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The lines of a table for each case, and the cases where this library is not the fastest."""
    yield "this library: " + "; ".join(f"{b} {s}" for b, s in smk.build_info().backends.items())
    for comparison in comparisons:
        case, rows = comparison
        yield ""
        yield f"{case.op} {case.inputs}"
        width = max(len(row.contender) for row in rows)
        titles = ("median", "p20", "p80 ms", "x floor", "x ours", "extra MiB", "launches")
        yield f"  {'':<{width}}" + "".join(f"{title:>11}" for title in titles) + "  by"
        for row in rows:
            launches = "-" if row.launches is None else row.launches
            times = (row.median, row.percentile(0.2), row.percentile(0.8))
            ratios = (row.median / comparison.floor, row.median / comparison.ours)
            yield (
                f"  {row.contender:<{width}}"
                + "".join(f"{time:11.3f}" for time in times)
                + "".join(f"{ratio:11.2f}" for ratio in ratios)
                + f"{_size(row.extra_bytes):>11}{launches:>11}  {row.method}"
            )
    yield ""
    lost = [f"{c.case.op} {c.case.inputs}" for c in comparisons if c.lost]
    yield "another contender is faster than this library: " + ("; ".join(lost) or "nowhere")


def write_csv(path: Path, comparisons: Sequence[Comparison], machine: dict[str, Any]) -> None:
    records = [
        {
            "op": case.op,
            "shape": "x".join(map(str, case.shape)),
            "dtype": case.type_name,
            "note": case.note,
            "contender": row.contender,
            "method": row.method,
            "samples": len(row.milliseconds),
            "median_ms": f"{row.median:.5f}",
            "p20_ms": f"{row.percentile(0.2):.5f}",
            "p80_ms": f"{row.percentile(0.8):.5f}",
            "x_floor": f"{row.median / rows[0].median:.3f}",
            "x_library": f"{row.median / rows[-1].median:.3f}",
            "extra_bytes": row.extra_bytes,
            "launches": row.launches,
            **machine,
        }
        for case, rows in comparisons
        for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
