"""The benchmarks and the report of a GPU, as far as they run without one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from benchmarks import gpu_report, measure, report
from benchmarks.checks import as_accurate, assert_chooses_best
from benchmarks.operators import OPERATORS, arguments, assert_agrees
from syncmask_kernels import backends
from syncmask_kernels.backends import eager
from syncmask_kernels.backends.kernel import Kernel

ROOT = Path(__file__).parent.parent
MIB = 2**20
on_cpu = pytest.mark.skipif(measure.DEVICE != "cpu", reason="measures the CPU")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of memory")


def nothing(_: Any) -> None:
    pass


def test_a_wrong_result_has_no_time() -> None:
    calls = []

    def ours(x: Tensor) -> Tensor:
        calls.append("ours")
        return x + 1

    def check(got: Any) -> None:
        assert got == 1

    inputs = [torch.zeros(())]
    contenders = {"floor": lambda x: x - 1, "plain": lambda x: x + 1, "this library": ours}
    assert [row.contender for row in measure.compare(contenders, inputs, check, 2)] == [*contenders]
    calls.clear()
    with pytest.raises(AssertionError):
        measure.compare({**contenders, "plain": lambda x: x + 2}, inputs, check, 2)
    assert calls == []


@on_cpu
def test_contenders_take_turns_on_rotating_inputs() -> None:
    seen: dict[str, list[int]] = {"floor": [], "plain": [], "this library": []}
    order = []

    def contender(name: str) -> Callable[[int], None]:
        def call(x: int) -> None:
            seen[name].append(x)
            order.append(name)

        return call

    with mock.patch.object(measure, "extra_bytes", return_value=None):
        measure.compare({name: contender(name) for name in seen}, [0, 1], nothing, 6)
    assert order[2:5] == ["floor", "plain", "this library"]  # after the two that were checked
    assert order[5:8] == ["plain", "this library", "floor"]
    assert all(name.count(0) >= 3 <= name.count(1) for name in seen.values())


@on_cpu
def test_time_is_that_of_the_call() -> None:
    contenders = {"floor": lambda x: time.sleep(0.002), "this library": lambda x: time.sleep(0.02)}
    floor, ours = measure.compare(contenders, [torch.zeros(())], nothing, 5)
    assert 2 <= floor.percentile(0.2) <= floor.median <= floor.percentile(0.8)
    assert ours.median >= 20


class Event:
    """In the place of a CUDA event: ten milliseconds pass between any two."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 10.0


@pytest.mark.parametrize("capturable", [True, False])
def test_on_a_gpu_a_time_is_the_mean_over_all_inputs(
    monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    calls: list[Any] = []

    def captured(run: Callable[[], None]) -> tuple[Any, None]:
        if not capturable:
            raise RuntimeError("not permitted when stream is capturing")
        run()
        return SimpleNamespace(replay=lambda: calls.append("replay")), None

    monkeypatch.setattr(measure, "DEVICE", "cuda")
    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    method, sample = measure.sampler(calls.append, [0, 1, 2, 3])
    assert sample(0) == 2.5
    assert calls == ([0, 1, 2, 3, "replay"] if capturable else [0, 1, 2, 3])
    assert method == ("graph replay" if capturable else "eager calls")


@on_cpu
@on_linux
@pytest.mark.parametrize("temporary", [0, 16, 48])
def test_extra_memory_is_the_peak_beyond_the_result(temporary: int) -> None:
    def call(x: Tensor) -> Tensor:
        torch.ones(temporary * MIB // 4)
        return x + 1

    extra = measure.extra_bytes(call, torch.zeros(8 * MIB // 4))
    assert extra is not None
    # The result may take the place of what was freed, and the process has pages of its own.
    assert (max(temporary - 8, 0) - 1) * MIB <= extra <= (temporary + 1) * MIB


@on_linux
def test_a_view_of_the_input_is_no_new_memory() -> None:
    x = torch.zeros(4, 4)
    assert measure._new_bytes((x[:2], x + 1, [x + 1]), (x,)) == 2 * x.nbytes


def test_inputs_are_together_larger_than_the_cache() -> None:
    with mock.patch.object(measure, "cache_bytes", return_value=1000):
        made = measure.rotation(lambda generator: torch.randn(100, generator=generator))
        assert len(made) == 10
        assert not torch.equal(made[0], made[1])
        pairs = measure.rotation(lambda _: (torch.zeros(2000), torch.zeros(1)))
        assert [len(pair) for pair in pairs] == [2, 2]


def test_checks_see_what_is_wrong() -> None:
    truth = torch.linspace(0, 1, 16, dtype=torch.float64)
    check = as_accurate([truth.float()], [truth])
    check(truth.float())
    with pytest.raises(AssertionError, match="error"):
        check(truth.float() + 1e-6)
    with pytest.raises(ValueError, match="zip"):
        check((truth.float(), truth.float()))

    scores = torch.tensor([[0.5, 0.1, 0.4, 0.9]], dtype=torch.float64)
    valid, counts = torch.tensor([[True, True, True, False]]), torch.tensor([2])

    def judge(*chosen: bool) -> None:
        assert_chooses_best(torch.tensor([chosen]), scores, valid, counts, torch.float32)

    judge(True, False, True, False)
    for wrong in [
        (True, True, False, False),
        (True, False, False, True),
        (True, True, True, False),
    ]:
        with pytest.raises(AssertionError):
            judge(*wrong)


def test_text_tells_where_another_is_faster() -> None:
    def row(name: str, time: float) -> measure.Measurement:
        return measure.Measurement(name, "wall clock", [time], 3 * MIB, None)

    case = report.Case("topk_mask", (2, 3), torch.float32, "half")
    won = report.Comparison(case, [row("floor", 1), row("plain", 4), row("this library", 2)])
    lost = report.Comparison(
        case._replace(note="all"), [row("floor", 1), row("plain", 1.5), row("this library", 2)]
    )
    lines = list(report.as_text([won, lost]))
    assert "this library      2.000" in "\n".join(lines)
    assert lines[-1].endswith("than this library: topk_mask [2, 3] float32, all")
    assert list(report.as_text([won]))[-1].endswith("nowhere")


@on_cpu
def test_benchmarks_run_and_write_their_table_and_figure(tmp_path: Path) -> None:
    """One small case of most benchmarks, once."""
    some = "37 and float32 and not views and not all-words or 577 or attentive or vote"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--no-compile"]
    # pytest-benchmark times nothing in a worker of pytest-xdist, which it tells by these.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-q", "-k", some, "--rounds=1", f"--csv={tmp_path}/folder/all.csv"],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "folder" / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    operators = {
        *("head_average", "attention_map", "attention_with_map", "sync_topk_mask"),
        *("sync_topk_mask_qk", "topk_mask", "attentive_mask", "vote_keywords", "max_similarity"),
        *("mask_patches", "gather_masked", "scatter_masked"),
    }
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["contender"] in done.stdout
        assert row["torch"] == torch.__version__
        assert row["launches"] == ""
    ours = [row for row in rows if row["contender"] == "this library"]
    assert {row["op"] for row in ours} == {row["op"] for row in rows} == operators
    assert {row["x_library"] for row in ours} == {"1.000"}
    assert (tmp_path / "folder" / "all.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_calls_every_operator() -> None:
    functions = {name for name in smk.__all__ if isfunction(getattr(smk, name))}
    assert set(OPERATORS) == functions - {"build_info", "use_backend"}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_the_report_agree(backend: str, name: str) -> None:
    for dtype in gpu_report.DTYPES:
        try:
            assert_agrees(OPERATORS[name], backend, "cpu", dtype)
        except smk.BackendError as error:
            others = dtype != torch.float32 and "by eager only" in str(error)
            assert others or "it has no kernel" in str(error)  # noqa: PT017


def broken(kernel: Kernel) -> Kernel:
    """Twice the numbers, the opposite masks."""

    def run(*call: Any) -> Any:
        answer = kernel.run(*call)
        parts = [answer] if isinstance(answer, Tensor) else answer
        wrong = [
            p * 2 if p.is_floating_point() else ~p if p.dtype == torch.bool else p for p in parts
        ]
        return wrong[0] if isinstance(answer, Tensor) else wrong

    return Kernel(run)


def test_the_report_tells_of_a_wrong_backend() -> None:
    kernels = {op: eager.KERNELS[op] for op in ("attention_map", "topk_mask")}
    module = SimpleNamespace(KERNELS=kernels, unavailable=lambda device_type: None)
    few = {name: OPERATORS[name] for name in ("attention_map", "topk_mask", "token_valid")}
    with (
        mock.patch.dict(backends.BACKENDS, {"tried": module}),
        mock.patch.object(gpu_report, "OPERATORS", few),
    ):
        good = gpu_report.operators("cpu", ["tried", "cuda"])
        assert good.passed
        assert "| topk_mask | tried | ok | ok | ok |" in good.text
        assert "| token_valid |" not in good.text  # there is no kernel for it
        assert "cuda is left out: it serves CUDA tensors" in good.text
        for op in kernels:
            with mock.patch.dict(kernels, {op: broken(kernels[op])}):
                bad = gpu_report.operators("cpu", ["tried"])
            assert bad.passed is False
            assert f"| {op} | tried | FAILED | FAILED | FAILED |" in bad.text
            assert f"- {op} on tried, float16: AssertionError" in bad.text


def test_arguments_of_the_report_differ_by_seed_alone() -> None:
    for operator in OPERATORS.values():
        one, same, other = (arguments(operator, "cpu", seed=seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, one, same))
        assert not all(map(torch.equal, one, other))
        assert [x.shape for x in one] == [x.shape for x in other]


def test_the_report_is_written_as_far_as_it_goes(tmp_path: Path) -> None:
    def good() -> gpu_report.Section:
        return gpu_report.Section("First", "all well", True)

    def crashes() -> gpu_report.Section:
        raise RuntimeError("the device is gone")

    def unjudged() -> gpu_report.Section:
        return gpu_report.Section("Last", "only told")

    path = tmp_path / "report.md"
    assert gpu_report.write(path, [good, unjudged])
    assert not gpu_report.write(path, [good, crashes, unjudged])
    text = path.read_text()
    assert "- First: passed\n- crashes: FAILED\n- Last: not judged\n" in text
    assert "RuntimeError: the device is gone" in text
    assert "## Last\n\nonly told" in text


@on_cpu
def test_there_is_no_report_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.md"
    assert gpu_report.main(["--output", str(path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not path.exists()


def test_commands_of_the_report_tell_how_they_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_report.ran([sys.executable, "-c", "print('out')"]) == (True, "out\n")
    assert gpu_report.ran([sys.executable, "-c", "exit('why')"]) == (False, "why\n")
    assert gpu_report.ran(["no-such-command"])[0] is False
    monkeypatch.setenv("PATH", "")
    assert gpu_report.sanitizers().passed is None
