"""Build the native libraries: one for the CPU with the C++ compiler, one for CUDA with nvcc.

Both keep to LibTorch's stable ABI and hold no Python symbol, so one binary serves every Python and
every torch from `MINIMUM_TORCH` on. They are loaded with `torch.ops.load_library`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LIB = Path("syncmask_kernels", "lib")
MINIMUM_TORCH = "2.11"
CUDA_ARCHITECTURES = (80, 90, 100)

DEFINES = ["-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# No -march: the sources choose the instruction set at run time (target_clones). Where it has fused
# multiply-add it is used, so scores may differ in the last place from machine to machine.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    *DEFINES,
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *DEFINES]
# A CPU build of torch has no libtorch_cuda to link with, so every build links with an empty double
# of these functions of it; at run time the real library is there, or the load fails.
CUDA_SHIMS = (
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
)


class Unbuildable(Exception):
    """Why a library cannot be built here."""


class Torch(NamedTuple):
    folder: Path
    version: str


def find_torch() -> Torch:
    """The torch to compile against: the one named, importable here, or in the environment that
    an isolated build is for (`python -E` does not see pip's overlay, which is a PYTHONPATH)."""
    named = os.environ.get("SYNCMASK_TORCH_DIR")
    folder = Path(named) if named else _importable_torch() or _torch_outside_isolation()
    if folder is None:
        raise Unbuildable(
            "no torch to compile against; install it first or name its folder in SYNCMASK_TORCH_DIR"
        )
    try:
        text = (folder / "version.py").read_text()
    except OSError as error:
        raise Unbuildable(f"{folder} is no torch package: {error}") from error
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    if found is None:
        raise Unbuildable(f"no version in {folder / 'version.py'}")
    if (int(found[2]), int(found[3])) < tuple(map(int, MINIMUM_TORCH.split("."))):
        raise Unbuildable(f"torch {found[1]} in {folder} is older than {MINIMUM_TORCH}")
    return Torch(folder, found[1])


def _importable_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch_outside_isolation() -> Path | None:
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
    done = subprocess.run(
        [sys.executable, "-E", "-c", probe], capture_output=True, text=True, cwd="/", check=False
    )
    origin = done.stdout.strip()
    return Path(origin).parent if origin else None


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of the usual names."""
    if sys.platform != "linux":
        raise Unbuildable("native libraries are built on Linux only")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates)
    raise Unbuildable(f"no C++ compiler ({names} not found)")


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [f"{home}/bin/nvcc" for home in homes]
    for candidate in [*named, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(candidate):
            return found
    raise Unbuildable("no nvcc in CUDA_HOME or on PATH")


def build_cpu(sources: list[Path], include: Path, work: Path, output: Path) -> str:
    """Build the CPU library and tell what built it."""
    compiler, torch = find_compiler(), find_torch()
    flags = [*CXX_FLAGS, *_includes(torch, include), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    objects = _compile_all([*compiler, *flags], sources, work)
    link = ["-shared", "-Wl,-z,defs", f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
    _call([*compiler, *objects, *link, "-o", str(output)])
    return f"{_version_line(compiler)}, torch {torch.version}"


def build_cuda(sources: list[Path], include: Path, work: Path, output: Path) -> str:
    """Build the CUDA library and tell what built it."""
    compiler, torch = find_compiler(), find_torch()
    nvcc = [find_nvcc(), "-ccbin", compiler[-1]]
    architectures = _architectures(nvcc)
    nvcc += [*_gencode(architectures), f"--threads={_jobs()}"]
    objects = _compile_all([*nvcc, *NVCC_FLAGS, *_includes(torch, include)], sources, work)
    double = work / "libtorch_cuda.so"
    source = work / "libtorch_cuda.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in CUDA_SHIMS))
    soname = f"-Wl,-soname,{double.name}"
    _call([*compiler, "-shared", "-fPIC", soname, str(source), "-o", str(double)])
    link = ["-shared", "-Xlinker=-z,defs", "-Xlinker=--no-as-needed", f"-L{work}"]
    link += ["-ltorch_cuda", f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
    _call([*nvcc, *objects, *link, "-o", str(output)])
    names = " ".join(f"sm_{number}" for number in architectures)
    return f"{_version_line(nvcc)}, {names}, torch {torch.version}"


def _includes(torch: Torch, include: Path) -> list[str]:
    return [f"-I{include}", "-isystem", str(torch.folder / "include")]


def _architectures(nvcc: list[str]) -> list[int]:
    known = {
        int(number) for number in re.findall(r"compute_(\d+)", _call([*nvcc, "--list-gpu-arch"]))
    }
    return [number for number in CUDA_ARCHITECTURES if number in known]


def _gencode(architectures: list[int]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those after it."""
    newest = architectures[-1]
    binaries = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in architectures]
    return [*binaries, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def _compile_all(command: list[str], sources: list[Path], work: Path) -> list[str]:
    work.mkdir(parents=True, exist_ok=True)
    objects = [str(work / f"{source.stem}.o") for source in sources]
    commands = [
        [*command, "-c", str(source), "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(_jobs()) as pool:
        list(pool.map(_call, commands))
    return objects


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _call(command: list[str]) -> str:
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unbuildable(f"{command[0]} does not run: {error}") from error
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise Unbuildable(f"{command[0]} failed with exit status {done.returncode}: {tail}")
    return done.stdout


def _version_line(compiler: list[str]) -> str:
    lines = _call([*compiler, "--version"]).strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0])


BUILDERS: dict[str, tuple[str, Callable[[list[Path], Path, Path, Path], str]]] = {
    "cpu": ("*.cpp", build_cpu),
    "cuda": ("*.cu", build_cuda),
}
