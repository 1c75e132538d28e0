"""Compiles the runtime, CUDA sources and their PTX; what does not change is compiled once."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import native
import torch

RUNTIME = Path(__file__).parent / "runtime"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off", "-fwrapv"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZER = os.environ.get("GPU_ON_CPU_SANITIZER", "")  # of this process; see `sanitized`


def missing() -> str | None:
    """Why GPU code cannot be run here, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "GPU code is run on x86-64 Linux only"
    return None if shutil.which("g++") else "needs g++"


def missing_cuda() -> str | None:
    """Why CUDA sources cannot be compiled here, or None."""
    try:
        native.find_nvcc()
    except native.Unbuildable as error:
        return str(error)
    return missing()


def folder() -> Path:
    path = Path(tempfile.gettempdir(), f"gpu_on_cpu-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def built(name: str, inputs: Iterable[Path], command: list[str]) -> Path:
    """The file that the command makes, which names it ``{}``; anew where the inputs changed."""
    contents = [path.read_bytes() for path in inputs]
    target = folder() / f"{digest(repr(command).encode(), *contents)}-{name}"
    if not target.exists():
        unfinished = folder() / f"{os.getpid()}-{target.name}"
        call([word.replace("{}", str(unfinished)) for word in command])
        unfinished.rename(target)
    return target


def call(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@functools.cache
def runtime() -> Path:
    """The runtime. Only the fibers tell a sanitizer what they do, and nothing is instrumented."""
    headers = sorted(RUNTIME.glob("*.h"))
    switches = {"address": ["-DGPU_ASAN"], "thread": ["-DGPU_TSAN"]}.get(SANITIZER, [])
    objects = []
    for source in sorted(RUNTIME.glob("*.cc")):
        flags = FLAGS + (switches if source.stem == "fibers" else [])
        command = ["g++", *flags, "-c", str(source), "-o", "{}"]
        objects.append(str(built(f"{source.stem}.o", [source, *headers], command)))
    return built("libgpu_on_cpu.so", [], ["g++", "-shared", *objects, "-ldl", "-o", "{}"])


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(runtime()))
    loaded.gpu_failure.restype = ctypes.c_char_p
    loaded.gpu_program.restype = ctypes.c_void_p
    loaded.gpu_run.restype = ctypes.c_bool
    return loaded


def sanitized(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python under a sanitizer, which the CUDA sources it compiles are checked by."""
    names = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[sanitizer]
    libraries = [call(["g++", f"-print-file-name={name}"]).strip() for name in names]
    environment = os.environ | {
        "GPU_ON_CPU_SANITIZER": sanitizer,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ---- CUDA sources ----


def for_fibers(text: str) -> str:
    """CUDA C++ in C++: launches become calls, shared variables references."""
    kind = r"(?:__align__\(\d+\)\s*)?([\w:][\w:<>, ]*?)"
    text = re.sub(
        rf"extern\s+__shared__\s+{kind}\s+(\w+)\s*\[\s*\]\s*;",
        r"\1* \2 = gpu::dynamic_shared<\1>();",
        text,
    )
    text = re.sub(
        rf"__shared__\s+{kind}\s+(\w+)\s*((?:\[[^\]]*\]\s*)*);",
        r"auto& \2 = gpu::shared<\1\3>([] {});",
        text,
    )
    while (start := text.find("<<<")) >= 0:
        end = text.index(">>>", start)
        given = re.compile(r"\s*\((\s*\))?").match(text, end + 3)
        if given is None:
            raise ValueError(f"a launch without arguments: {text[start : end + 3]}")
        kernel = _kernel_before(text, start)
        name = " ".join(kernel.split())
        text = (
            text[: start - len(kernel)]
            + f'gpu::launch("{name}", {kernel}, {{{text[start + 3 : end]}}}'
            + (")" if given[1] else ", ")
            + text[given.end() :]
        )
    return text


def _kernel_before(text: str, end: int) -> str:
    """The expression, a name with template arguments or without, that ends there."""
    start = end
    while text[start - 1].isspace():
        start -= 1
    depth = 0
    while depth > 0 or re.match(r"[\w:>]", text[start - 1]):
        start -= 1
        depth += {">": 1, "<": -1}.get(text[start], 0)
    return text[start:end]


@functools.cache
def cuda_include() -> Path:
    """The folder of CUDA's headers."""
    report = call([native.find_nvcc(), "--dryrun", "-c", "none.cu"])
    (top,) = re.findall(r"TOP=(.*)", report)
    return Path(top) / "include"


def rewritten(root: Path) -> Path:
    """A copy of a folder of CUDA sources in C++; its lines are those of the original."""
    files = [f for f in sorted(root.rglob("*")) if f.suffix in (".cu", ".cuh", ".h")]
    texts = [f'#line 1 "{f}"\n{for_fibers(f.read_text())}' for f in files]
    target = folder() / f"{digest(*map(str.encode, texts))}-sources"
    unfinished = folder() / f"{os.getpid()}-{target.name}"
    for file, text in zip(files, texts, strict=True):
        copy = unfinished / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    if not target.exists():
        unfinished.rename(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    return target


@functools.cache
def cuda_library(root: Path) -> Path:
    """A library of the ``.cu`` files below a folder, in which launches run on the CPU.

    Their operators are registered for CPU tensors: SYNCMASK_CUDA_KEY is CPU.
    """
    sources = rewritten(root)
    torch_folder = Path(torch.__file__).parent
    flags = [*FLAGS, *SANITIZERS[SANITIZER], *native.DEFINES, "-DUSE_CUDA", "-x", "c++"]
    flags += ["-DSYNCMASK_CUDA_KEY=CPU", f"-I{RUNTIME}", "-include", "cuda_shim.h"]
    flags += [f"-I{sources / 'include'}", "-isystem", str(cuda_include())]
    flags += ["-isystem", str(torch_folder / "include")]
    inputs = [*sorted(RUNTIME.glob("*.h")), *(f for f in sources.rglob("*") if f.is_file())]
    objects = [
        str(built(f"{source.stem}.o", inputs, ["g++", *flags, "-c", str(source), "-o", "{}"]))
        for source in sorted(sources.rglob("*.cu"))
    ]
    link = ["g++", "-shared", *SANITIZERS[SANITIZER], *objects, str(runtime())]
    link += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", "{}"]
    return built("libcuda_on_cpu.so", map(Path, objects), link)


@functools.cache
def nvcc_ptx(root: Path, arch: int) -> list[str]:
    """The PTX of the ``.cu`` files below a folder."""
    flags = [*native.NVCC_FLAGS, f"-I{root / 'include'}", f"-arch=sm_{arch}", "-lineinfo"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include")]
    inputs = [f for f in sorted(root.rglob("*")) if f.suffix in (".cu", ".cuh", ".h")]
    return [
        built(
            f"{source.stem}.ptx",
            inputs,
            [native.find_nvcc(), *flags, "-ptx", str(source), "-o", "{}"],
        ).read_text()
        for source in sorted(root.rglob("*.cu"))
    ]
