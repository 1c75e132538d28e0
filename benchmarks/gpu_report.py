"""`make gpu-report`: what this library does on a GPU, in one file to send back.

Parity of every backend with eager, capture in a CUDA graph, calls without waiting for the device,
launches, the tests of the GPU backends, compute-sanitizer, and the benchmarks. The exit status is 0
where everything passed, 1 where something did not (the report tells what), 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import syncmask_kernels as smk
from benchmarks import measure, report
from benchmarks.operators import OPERATORS, Operator, arguments, assert_agrees
from syncmask_kernels.backends import BACKENDS

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GPU_BACKENDS = ("cuda", "triton", "eager")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = 3600  # a part that takes longer is ended and counts as failed


class Section(NamedTuple):
    """`passed` is None where nothing was judged."""

    title: str
    text: str
    passed: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "passed", False: "FAILED", None: "not judged"}[self.passed]


class Outcome(NamedTuple):
    """Of one check: the cell of a table, and why it was refused or failed."""

    cell: str
    note: str | None = None


def outcome(check: Callable[[], str | None]) -> Outcome:
    """The report goes on after whatever a check raises."""
    try:
        return Outcome(check() or "ok")
    except smk.BackendError as error:
        no_kernel = "it has no kernel for" in str(error)
        return Outcome("-", None if no_kernel else str(error))
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        return Outcome("FAILED", f"{type(error).__name__}: {lines[0]}")


def replays(operator: Operator, backend: str) -> None:
    """A graph that is replayed on other arguments answers as a call does."""
    static = arguments(operator, "cuda")
    other = arguments(operator, "cuda", seed=1)
    with smk.use_backend(backend):
        graph, answer = measure.captured(lambda: operator.call(*static))
        for into, value in zip(static, other, strict=True):
            into.copy_(value)
        graph.replay()
        expected = operator.call(*other)
    for got, wanted in zip(measure.tensors_of(answer), measure.tensors_of(expected), strict=True):
        assert torch.equal(got, wanted), "the replayed graph answers differently"


def never_waits(operator: Operator, backend: str) -> None:
    given = arguments(operator, "cuda")
    with smk.use_backend(backend):
        operator.call(*given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            operator.call(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def launches(operator: Operator, backend: str) -> str:
    with smk.use_backend(backend):
        return str(
            measure.launches(lambda given: operator.call(*given), arguments(operator, "cuda"))
        )


def checks_of(operator: Operator, backend: str, device: str) -> dict[str, Callable[[], str | None]]:
    """Column -> check."""
    checks: dict[str, Callable[[], str | None]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        checks[name] = lambda d=dtype: assert_agrees(operator, backend, device, d)  # type: ignore[misc]
    if device == "cuda":
        checks["graph"] = lambda: replays(operator, backend)
        checks["no wait"] = lambda: never_waits(operator, backend)
        checks["launches"] = lambda: launches(operator, backend)
    return checks


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def operators(device: str = "cuda", backends: Sequence[str] = GPU_BACKENDS) -> Section:
    """Every operator on every backend; rows of backends that have no kernel are left out."""
    rows, notes, passed, columns = [], [], True, []
    out = {backend: BACKENDS[backend].unavailable(device) for backend in backends}
    notes += [f"- {backend} is left out: {reason}" for backend, reason in out.items() if reason]
    for name, operator in OPERATORS.items():
        for backend in (backend for backend, reason in out.items() if reason is None):
            found = {
                column: outcome(check)
                for column, check in checks_of(operator, backend, device).items()
            }
            columns = list(found)
            cells = [result.cell for result in found.values()]
            passed &= "FAILED" not in cells
            if set(cells) != {"-"}:
                rows.append([name, backend, *cells])
            notes += [
                f"- {name} on {backend}, {column}: {result.note}"
                for column, result in found.items()
                if result.note
            ]
    explained = (
        "A type is ok where numbers are at most 4 times as wrong as eager's in that type, by the "
        "float64 truth, and masks and ids are equal bit by bit; a dash is a call that is refused."
    )
    text = "\n\n".join(
        [explained, table(["operator", "backend", *columns], rows), "\n".join(notes)]
    )
    return Section("Operators", text.strip(), passed)


def ran(command: Sequence[str], environment: dict[str, str] | None = None) -> tuple[bool, str]:
    """Whether a command succeeded, and what it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout


def fenced(text: str, last: int | None = None) -> str:
    lines = text.rstrip().splitlines()
    return "\n".join(["```", *(lines if last is None else lines[-last:]), "```"])


def environment() -> Section:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    _, driver = ran(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    _, revision = ran(["git", "describe", "--always", "--dirty"])
    facts = {**report.machine(), "capability": capability, "driver": driver.strip()}
    facts["revision"] = revision.strip()
    listed = table(["what", "value"], [[name, str(value)] for name, value in facts.items()])
    return Section("Environment", f"{listed}\n\n{fenced(str(smk.build_info()))}")


def tests() -> Section:
    """The tests of the GPU backends, which run on the GPU where there is one."""
    files = sorted({*ROOT.glob("tests/test_*_triton.py"), *ROOT.glob("tests/test_*_cuda.py")})
    chosen = [str(file) for file in files if "gpu_on_cpu" not in file.name]
    passed, output = ran([sys.executable, "-m", "pytest", "-q", *chosen])
    return Section("Tests", fenced(output, last=40), passed)


def sanitizers() -> Section:
    if shutil.which("compute-sanitizer") is None:
        return Section("compute-sanitizer", "Not run: `compute-sanitizer` is not on the PATH.")
    parts, all_passed = [], True
    for tool in SANITIZERS:
        watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        passed, output = ran(
            [*watch, sys.executable, "-m", "benchmarks.gpu_report", "--kernels-only"],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor is an allocation to watch
        )
        all_passed &= passed
        parts.append(f"### {tool}: {'passed' if passed else 'FAILED'}\n\n{fenced(output, last=30)}")
    return Section("compute-sanitizer", "\n\n".join(parts), all_passed)


def timings() -> Section:
    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder) / "comparisons.csv"
        benchmarks = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-only"]
        passed, output = ran([*benchmarks, "--csv", str(csv)])
        written = csv.read_text() if csv.exists() else "(no table was written)"
    text = f"{fenced(output, last=400)}\n\n### As CSV\n\n{fenced(written)}"
    return Section("Timings", text, passed)


def kernels_only() -> int:
    """A small run of our kernels, for compute-sanitizer to watch."""
    for operator in OPERATORS.values():
        for backend in ("cuda", "triton"):
            for dtype in DTYPES:
                result = outcome(lambda: assert_agrees(operator, backend, "cuda", dtype))  # noqa: B023
                if result.cell == "FAILED":
                    print(result.note)
                    return 1
    return 0


def write(path: Path, sections: Iterable[Callable[[], Section]]) -> bool:
    """The report is written after each section, so that a crash leaves what was found."""
    done: list[Section] = []
    for make in sections:
        try:
            done.append(make())
        except Exception as error:
            done.append(Section(make.__name__, fenced(f"{type(error).__name__}: {error}"), False))
        print(f"{done[-1].title}: {done[-1].verdict}", flush=True)
        verdict = [f"- {s.title}: {s.verdict}" for s in done]
        body = [f"## {s.title}\n\n{s.text}" for s in done]
        parts = ["# syncmask_kernels on a GPU", "\n".join(verdict), *body]
        path.write_text("\n\n".join(parts) + "\n")
    return all(section.passed is not False for section in done)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(".benchmarks/gpu-report.md"))
    parser.add_argument("--kernels-only", action="store_true", help="what the sanitizers watch")
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        print(
            f"no report: torch {torch.__version__} sees no CUDA device, and everything in the "
            "report is measured on one",
            file=sys.stderr,
        )
        return 2
    if options.kernels_only:
        return kernels_only()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    passed = write(options.output, [environment, operators, tests, sanitizers, timings])
    print(f"written: {options.output}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
