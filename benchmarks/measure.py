"""How contenders are measured: in turns, on inputs that rotate beyond the caches."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_INPUTS = 256
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_IN_HEAP = 2**25  # where glibc's own limit, which grows with what is freed, ends
FEWEST_TURNS, MOST_SECONDS = 5, 3.0  # a slow comparison ends early, but not before these turns

Function = Callable[[Any], Any]
Check = Callable[[Any], None]


class Measurement(NamedTuple):
    """What one contender costs. `extra_bytes` is the peak of memory beyond the result."""

    contender: str
    method: str
    milliseconds: list[float]
    extra_bytes: int | None
    launches: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.milliseconds)
        return ordered[round(share * (len(ordered) - 1))]


class Sampler(NamedTuple):
    """`sample(turn)` -> milliseconds of one call."""

    method: str
    sample: Callable[[int], float]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a result or of an input: one, or nested sequences of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)


def cache_bytes() -> int:
    """The size of the last cache before memory."""
    if DEVICE == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().rstrip("K\n")) * 1024 for size in sizes), default=2**25)


def rotation(make: Callable[[torch.Generator], Any]) -> list[Any]:
    """Inputs on the device, as many as are together four times as large as the last cache."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Any] = []
    total = 0
    while len(inputs) < 2 or (total < 4 * cache_bytes() and len(inputs) < MOST_INPUTS):
        made = tuple(part.to(DEVICE) for part in tensors_of(make(generator)))
        inputs.append(made if len(made) > 1 else made[0])
        total += sum(part.nbytes for part in made)
    return inputs


def _wall_clock(function: Function, inputs: Sequence[Any]) -> Sampler:
    def sample(turn: int) -> float:
        argument = inputs[turn % len(inputs)]
        start = time.perf_counter()
        function(argument)
        return 1000 * (time.perf_counter() - start)

    return Sampler("wall clock", sample)


def _between_events(method: str, run: Callable[[], Any], calls: int) -> Sampler:
    def sample(turn: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return Sampler(method, sample)


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `run` and its result; RuntimeError where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what compiles or plans on first use does so before
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def sampler(function: Function, inputs: Sequence[Any]) -> Sampler:
    """On a GPU one sample is the mean over all inputs, of a graph that calls on one after the other
    and so finds none in the cache; where there is no graph, of calls one by one.
    """
    if DEVICE == "cpu":
        return _wall_clock(function, inputs)

    def all_inputs() -> None:
        for argument in inputs:
            function(argument)

    try:
        graph, _ = captured(all_inputs)
    except RuntimeError:
        torch.cuda.synchronize()
        return _between_events("eager calls", all_inputs, len(inputs))
    return _between_events("graph replay", graph.replay, len(inputs))


def _new_bytes(result: Any, argument: Any) -> int:
    """Bytes of the storages of a result that are not those of its input."""
    given = {part.untyped_storage().data_ptr() for part in tensors_of(argument)}
    storages = {part.untyped_storage().data_ptr(): part for part in tensors_of(result)}
    return sum(part.untyped_storage().nbytes() for at, part in storages.items() if at not in given)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _limit_heap(largest: int) -> None:
    """Larger blocks are new to the process each time; of others the heap keeps twice that much.

    These are glibc's proportions. Without a limit of trimming beside that of blocks, what a
    contender frees would go back to the system, and it would pay for new pages in each call.
    """
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # another library of C
        libc.mallopt(M_MMAP_THRESHOLD, largest)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * largest)


def _growth_of_process(function: Function, argument: Any) -> int:
    """Of resident memory, which sees the scratch of C++ threads as well as PyTorch's allocator."""
    # What is freed goes back at once, or what a contender before left in the heap would count.
    _limit_heap(2**20)
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        result = function(argument)
        return _resident("VmHWM") - before - _new_bytes(result, argument)
    finally:
        _limit_heap(LARGEST_IN_HEAP)


def _growth_of_device(function: Function, argument: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(argument)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _new_bytes(result, argument)


def extra_bytes(function: Function, argument: Any) -> int | None:
    """Peak memory of a call beyond its input and result; None where nothing tells (no Linux)."""
    growth = _growth_of_device if DEVICE == "cuda" else _growth_of_process
    try:
        return max(0, min(growth(function, argument) for _ in range(2)))
    except (OSError, AttributeError):
        return None


def launches(function: Function, argument: Any) -> int | None:
    """Kernels, copies and fills that one call starts on the GPU; None where there is none."""
    if DEVICE == "cpu":
        return None
    function(argument)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function(argument)
        torch.cuda.synchronize()
    return sum(
        event.device_type.name == "CUDA" and not event.is_user_annotation
        for event in profile.events()
    )


def compare(
    contenders: dict[str, Function], inputs: Sequence[Any], check: Check, rounds: int
) -> list[Measurement]:
    """What each contender costs; the first is the floor, whose result is not looked at.

    All others are checked on the first input before anything is timed: a wrong result has no time.
    """
    names = list(contenders)
    _limit_heap(LARGEST_IN_HEAP)
    for name in names[1:]:
        check(contenders[name](inputs[0]))
    samplers = {name: sampler(function, inputs) for name, function in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(rounds):
        first = turn % len(names)
        for i, name in enumerate(names[first:] + names[:first]):
            times[name].append(samplers[name].sample(turn + i))
        if turn + 1 >= FEWEST_TURNS and time.perf_counter() - start > MOST_SECONDS:
            break
    gc.collect()
    return [
        Measurement(
            name,
            samplers[name].method,
            times[name],
            extra_bytes(function, inputs[0]),
            launches(function, inputs[0]),
        )
        for name, function in contenders.items()
    ]
