"""Install the package as users do: isolated or not, editable, and where tools are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import native
import pytest
import setuptools
import torch

from syncmask_kernels.backends import native as loader

pytestmark = pytest.mark.install

ROOT = Path(__file__).parent.parent
NO_TOOLS = {"PATH": "/nonexistent"}

PROBE_CPP = """
#include <torch/csrc/stable/library.h>
int64_t answer() { return 42; }
STABLE_TORCH_LIBRARY_FRAGMENT(install_test, library) { library.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(install_test, CompositeExplicitAutograd, library) {
  library.impl("answer", TORCH_BOX(&answer));
}
"""
PROBE_CU = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
__global__ void twice_kernel(const float* x, float* y, int64_t n) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}
Tensor twice(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  Tensor y = torch::stable::empty_like(x);
  twice_kernel<<<(x.numel() + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(
      x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}
STABLE_TORCH_LIBRARY_FRAGMENT(install_test, library) { library.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(install_test, CUDA, library) {
  library.impl("twice", TORCH_BOX(&twice));
}
"""


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """What the command prints; it runs outside the checkout, whose packages it must not see."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCMASK_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd or Path(sys.prefix),
        env={**environment, "CXXFLAGS": "-O0", **variables},  # what is built here is not timed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(done.stdout)
    return done.stdout


def make_environment(folder: Path) -> Path:
    """An empty virtual environment; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has torch and pip (those of this one), but not the package."""
    found = make_environment(tmp_path_factory.mktemp("environment"))
    site = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """The source distribution, unpacked, without the CUDA sources: they take minutes to build, and
    the install of the checkout, which every test run starts with, builds them."""
    folder = tmp_path_factory.mktemp("sdist")
    build = f"import build_hooks; build_hooks.build_sdist({str(folder)!r})"
    run(python, "-c", build, cwd=ROOT, PYTHONPATH=str(ROOT / "build_backend"))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    for kernel in (unpacked / "csrc" / "cuda").glob("*.cu"):
        kernel.unlink()
    return unpacked


def build_wheel(python: Path, source: Path, out: Path, *options: str, **variables: str) -> Path:
    command = [python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, *options, source]
    run(*command, **variables)
    (wheel,) = out.glob("*.whl")
    return wheel


def record(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("syncmask_kernels/lib/build.json"))


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def install(python: Path, wheel: Path, target: Path) -> dict[str, str]:
    """Install into a folder; returns the variables to import from there."""
    run(python, "-m", "pip", "install", "--no-deps", "--target", target, wheel)
    return {"PYTHONPATH": str(target)}


@pytest.mark.parametrize("options", [(), ("--no-build-isolation",)], ids=["isolated", "shared"])
def test_wheel_builds_against_the_installed_torch(
    python: Path,
    source: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(source)
    wheel = build_wheel(python, source, tmp_path, *options, SYNCMASK_REQUIRE_CPU="1")
    assert "Installing backend dependencies" not in capsys.readouterr().out  # no second torch
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert record(wheel)["cpu"]["detail"].endswith(f"torch {torch.__version__}")
    assert files(source) == before

    variables = install(python, wheel, tmp_path / "target")
    assert "cpu" in run(python, "-m", "syncmask_kernels", **variables)
    code = "import syncmask_kernels as smk; print(smk.build_info().operators['topk_mask']['cpu'])"
    assert run(python, "-c", code, **variables).split() == ["cpu"]


def test_without_a_compiler_the_package_is_pure_and_says_so(
    python: Path, source: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(python, source, tmp_path, **NO_TOOLS)
    variables = install(python, wheel, tmp_path / "target")
    code = """
import torch, syncmask_kernels as smk
print(smk.topk_mask(torch.tensor([1.0, 3.0, 2.0]), k=1).ids.item(), flush=True)
with smk.use_backend("cpu"):
    smk.topk_mask(torch.ones(3), k=1)
"""
    with pytest.raises(RuntimeError, match=r"\A1\n(.|\n)*BackendError.*no C\+\+ compiler"):
        run(python, "-c", code, **variables)


def test_a_compiler_that_fails_is_the_recorded_reason(
    python: Path, source: Path, tmp_path: Path
) -> None:
    options = ("--no-build-isolation",)
    detail = record(build_wheel(python, source, tmp_path, *options, CXX="false"))["cpu"]["detail"]
    assert detail.startswith("false failed with exit status 1")


@pytest.mark.parametrize("name", ["CPU", "CUDA"])
def test_a_missing_part_that_is_required_is_an_error(
    python: Path, source: Path, tmp_path: Path, name: str
) -> None:
    flag = f"SYNCMASK_REQUIRE_{name}"
    with pytest.raises(RuntimeError, match=f"error: {flag} is set, but: "):
        build_wheel(python, source, tmp_path, "--no-build-isolation", **NO_TOOLS, **{flag: "1"})


def test_editable_install_rebuilds(python: Path, source: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    command = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", checkout]
    ask = "import torch, syncmask_kernels; print(torch.ops.install_test.answer())"
    try:
        run(*command)
        with pytest.raises(RuntimeError, match="answer"):
            run(python, "-c", ask)
        (checkout / "csrc" / "cpu" / "probe.cpp").write_text(PROBE_CPP)
        run(*command)
        assert run(python, "-c", ask).split() == ["42"]
        run(*command, **NO_TOOLS)
        assert [path.name for path in (checkout / native.LIB).iterdir()] == ["build.json"]
    finally:
        run(python, "-m", "pip", "uninstall", "--yes", "syncmask_kernels")


def test_torch_is_a_build_requirement_only_where_none_is_found(
    python: Path, source: Path, tmp_path: Path
) -> None:
    bare = make_environment(tmp_path / "bare")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    site = Path(setuptools.__file__).parent.parent
    for part in [site / "_distutils_hack", *site.glob("setuptools*")]:
        (overlay / part.name).symlink_to(part)
    path = os.pathsep.join([str(source / "build_backend"), str(overlay)])
    code = "import build_hooks; print(build_hooks.get_requires_for_build_wheel())"

    assert run(bare, "-c", code, PYTHONPATH=path).strip() == "['torch>=2.11']"
    assert run(bare, "-c", code, PYTHONPATH=path, **NO_TOOLS).strip() == "[]"
    assert run(python, "-c", code, PYTHONPATH=path).strip() == "[]"
    named = {"SYNCMASK_TORCH_DIR": str(Path(torch.__file__).parent)}
    assert run(bare, "-c", code, PYTHONPATH=path, **named).strip() == "[]"


def test_torch_must_be_recent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCMASK_TORCH_DIR", str(tmp_path))
    with pytest.raises(native.Unbuildable, match="no torch package"):
        native.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
    with pytest.raises(native.Unbuildable, match=r"torch 2\.10\.1\+cpu .* older than 2\.11"):
        native.find_torch()
    (tmp_path / "version.py").write_text("__version__ = '2.11.0'\n")
    assert native.find_torch() == native.Torch(tmp_path, "2.11.0")


def test_cuda_library_needs_the_torch_of_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        native.find_nvcc()
    except native.Unbuildable as error:
        pytest.skip(str(error))
    source, library = tmp_path / "probe.cu", tmp_path / "libsyncmask_cuda.so"
    source.write_text(PROBE_CU)
    detail = native.build_cuda([source], ROOT / "csrc" / "include", tmp_path / "work", library)
    assert "sm_80 sm_90" in detail
    record = {"cuda": {"built": True, "detail": detail}}
    (tmp_path / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(loader, "LIB", tmp_path)
    reason, state = loader.load("cuda")
    if torch.cuda.is_available():
        assert reason is None
        x = torch.arange(1000.0, device="cuda")
        assert torch.ops.install_test.twice(x).equal(2 * x)
    elif not torch.version.cuda:
        assert reason is not None
        assert "libtorch_cuda.so" in reason
        assert state.startswith("built, but does not load: ")
