"""Compiles the runtime with g++: once for each way of checking, kept in a cache between runs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fwrapv"]


def missing() -> str | None:
    """Why GPU code cannot be run here, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "GPU code is run on x86-64 Linux only"
    return None if shutil.which("g++") else "needs g++"


def built(name: str, inputs: Iterable[str | Path], *commands: list[str]) -> Path:
    """The file that the commands make; ``{}`` in them is its name.

    Made anew only when the commands or the inputs (files, or texts) have changed.
    """
    contents = [i.read_bytes() if isinstance(i, Path) else i.encode() for i in inputs]
    key = hashlib.sha256(b"\0".join([repr(commands).encode(), *contents])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"gpu_on_cpu-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key}-{name}"
    if not target.exists():
        unfinished = folder / f"{os.getpid()}-{target.name}"
        for command in commands:
            call([word.replace("{}", str(unfinished)) for word in command])
        unfinished.rename(target)
    return target


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def runtime() -> Path:
    """The runtime as a shared library."""
    sources = sorted(RUNTIME.glob("*.cc"))
    inputs = sorted(RUNTIME.glob("*"))
    objects = [
        built(f"{source.stem}.o", inputs, ["g++", *FLAGS, "-c", str(source), "-o", "{}"])
        for source in sources
    ]
    link = ["g++", "-shared", *map(str, objects), "-o", "{}"]
    return built("libgpu_on_cpu.so", inputs, link)


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(runtime()), mode=ctypes.RTLD_GLOBAL)
    loaded.gpu_failure.restype = ctypes.c_char_p
    loaded.gpu_program.restype = ctypes.c_void_p
    loaded.gpu_run.restype = ctypes.c_bool
    return loaded
