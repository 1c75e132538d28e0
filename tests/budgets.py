"""The table of what the GPU kernels take, docs/budgets.md: `make budgets` writes it.

All of it comes from the code that ships: the machine code of every launch, and what its PTX reads
and writes while it runs on the CPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import native
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import syncmask_kernels as smk
from syncmask_kernels import backends
from tests import negatives_calls, queue_cases
from tests.cross_entropy_calls import cross_entropy
from tests.gpu_on_cpu.build import call, nvcc_ptx
from tests.gpu_on_cpu.cuda_launch import SOURCES, cuda_on_cpu
from tests.gpu_on_cpu.triton_launch import TargetOnly, triton_on_cpu
from tests.triton_launches import CASES

Key = tuple[str, str, str]
Rows = dict[Key, dict[str, float]]

FILE = Path(__file__).parents[1] / "docs" / "budgets.md"
ARCHITECTURES = native.CUDA_ARCHITECTURES
PTX_ARCHITECTURE = ARCHITECTURES[0]  # of the PTX that runs on the CPU
RESERVED_SHARED = 1024  # bytes of a block that CUDA keeps, and a cubin counts from sm_90 on
WHOLE_CALL = "all"


# ---- machine code ----


class Resources(NamedTuple):
    """Registers of a thread, bytes of shared memory of a block, spilled bytes of a thread."""

    registers: int
    shared: int
    spilled: int


def resources(cubin: Path, arch: int) -> dict[str, Resources]:
    """What each kernel of a cubin takes, by its mangled name; only static shared memory."""
    report = call([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)])
    reserved = RESERVED_SHARED if arch >= 90 else 0
    return {
        name: Resources(int(registers), max(int(shared) - reserved, 0), int(stack) + int(local))
        for name, registers, stack, shared, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report
        )
    }


def triton_code(arch: int, folder: Path) -> Iterator[tuple[Key, Resources]]:
    cubin = folder / "launch.cubin"
    target = TargetOnly(GPUTarget("cuda", arch, 32))
    with mock.patch.object(triton.runtime.driver, "_active", target):
        for case, launches in CASES.items():
            for launch in launches():
                made = launch.kernel.warmup(**launch.args, grid=launch.grid, **launch.options)
                cubin.write_bytes(made.asm["cubin"])
                ((kernel, static),) = resources(cubin, arch).items()
                shared = static.shared + made.metadata.shared
                yield ("triton", kernel, case), static._replace(shared=shared)


def cuda_code(arch: int, folder: Path) -> Iterator[tuple[Key, Resources]]:
    ptx, cubin = folder / "module.ptx", folder / "module.cubin"
    for text in nvcc_ptx(SOURCES, arch):
        ptx.write_text(text)
        call([native.find_nvcc(), "-cubin", f"-arch=sm_{arch}", str(ptx), "-o", str(cubin)])
        found = resources(cubin, arch)
        for name, taken in sorted(zip(demangled(found), found.values(), strict=True)):
            kernel, _, types = name.partition("<")
            yield ("cuda", kernel, types.removesuffix(">")), taken


def demangled(names: Iterable[str]) -> list[str]:
    """Names of kernels with template arguments, without namespaces and parameters."""
    listed = "\n".join(names)
    done = subprocess.run(["c++filt"], input=listed, capture_output=True, text=True, check=True)
    return [re.sub(r"^void |\w+::|\(.*", "", name) for name in done.stdout.splitlines()]


def compiled(backend: str) -> Rows:
    """What the machine code takes; the most of it, where a row is compiled more than once."""
    code = {"triton": triton_code, "cuda": cuda_code}[backend]
    columns = [(field, arch) for field in Resources._fields for arch in ARCHITECTURES]
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHITECTURES:
            for key, taken in code(arch, Path(folder)):
                row = rows.setdefault(key, {f"{name} sm_{sm}": 0 for name, sm in columns})
                for name, number in taken._asdict().items():
                    row[f"{name} sm_{arch}"] = max(row[f"{name} sm_{arch}"], number)
    return rows


# ---- memory traffic ----

Call = tuple[Callable[..., Any], dict[str, Any]]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def chosen_by_topk(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Mask and ids, for the scores are gathered by PyTorch."""
    chosen = smk.topk_mask(**arguments)
    return chosen.mask, chosen.ids


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """The gradient of a mask token, by itself."""
    total: Tensor = backends.choose("masked_sum", x, x)(x, mask)
    return total


def selection_calls() -> dict[str, Call]:
    shape = "[2, 12, 30, 257]"
    attn = drawn(2, 12, 30, 257).softmax(dim=-1)
    half = torch.arange(30).expand(2, 30) < 15
    return {
        "topk_mask [64, 256]": (chosen_by_topk, {"scores": drawn(64, 256), "k": 128}),
        f"sync_topk_mask {shape}": (smk.sync_topk_mask, {"attn": attn}),
        f"sync_topk_mask {shape} bfloat16": (smk.sync_topk_mask, {"attn": attn.bfloat16()}),
        f"sync_topk_mask {shape}, 15 valid words": (
            smk.sync_topk_mask,
            {"attn": attn, "token_valid": half},
        ),
        f"sync_topk_mask {shape}, dual": (
            smk.sync_topk_mask,
            {"attn": attn, "token_score": "dual"},
        ),
    }


def attention_calls() -> dict[str, Call]:
    attn = {"attn": drawn(2, 12, 30, 257)}
    calls: dict[str, Call] = {"head_average [2, 12, 30, 257]": (smk.head_average, attn)}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, " bfloat16")):
        q, k = drawn(1, 12, 30, 64, dtype=dtype), drawn(1, 12, 257, 64, dtype=dtype)
        heads = {"q": q, "k": k}
        patches, tokens = drawn(2, 256, 512, dtype=dtype), drawn(2, 30, 512, dtype=dtype)
        pairs = {"patches": patches, "tokens": tokens}
        shape = f"[1, 12, 30, 64] x [1, 12, 257, 64]{suffix}"
        calls |= {
            f"attention_map {shape}": (smk.attention_map, heads),
            f"attention_with_map {shape}": (smk.attention_with_map, heads | {"v": k.flip(2)}),
            f"sync_topk_mask_qk {shape}": (smk.sync_topk_mask_qk, heads),
            f"max_similarity [2, 256, 512] x [2, 30, 512]{suffix}": (smk.max_similarity, pairs),
        }
    return calls


def masking_calls() -> dict[str, Call]:
    x, mask, ids = drawn(2, 128, 768), drawn(2, 128) < -0.67, torch.arange(40).expand(2, 40)
    token, calls = drawn(768), {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, " bfloat16")):
        x = x.to(dtype)
        masked = {"patches": x, "patch_mask": mask, "mask_token": token}
        calls |= {
            f"mask_patches [2, 128, 768]{suffix}": (smk.mask_patches, masked),
            f"masked_sum [2, 128, 768]{suffix}": (masked_sum, {"x": x, "mask": mask}),
            f"gather_masked [2, 128, 768], 40 ids{suffix}": (
                smk.gather_masked,
                {"x": x, "ids": ids},
            ),
            f"scatter_masked [2, 40, 768] to 128{suffix}": (
                smk.scatter_masked,
                {"x": x[:, :40].clone(), "ids": ids, "N": 128},
            ),
        }
    return calls


def loss_and_gradient(pred: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Of masked_patch_loss."""
    leaf = pred.detach().requires_grad_()
    loss = smk.masked_patch_loss(leaf, **arguments, kind="mse", patch_size=16, norm_pix=True)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def patch_calls() -> dict[str, Call]:
    """Patches of 768 values, all of them masked or a quarter."""
    pred, image = drawn(2, 16, 768), drawn(2, 3, 64, 64)
    calls: dict[str, Call] = {}
    for share in (1, 4):
        mask = (torch.arange(16) % share == 0).expand(2, 16)
        given = {"pred": pred, "target": image, "ids_or_mask": mask}
        name = f"masked_patch_loss [2, 16, 768], {16 // share} masked, and its gradient"
        calls[name] = (loss_and_gradient, given)
    return calls


def grouping_calls() -> dict[str, Call]:
    features = {"image_feat": drawn(64, 32), "text_feat": drawn(64, 32).flip(0)}
    halves = {name: x.bfloat16() for name, x in features.items()}
    return {
        "grouped_order [64, 32]": (smk.grouped_order, features),
        "grouped_order [64, 32] bfloat16": (smk.grouped_order, halves),
    }


def loss_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, " bfloat16")):
        shape = f"[96, 64] x [1000, 64]{suffix}"
        for form, gathered in (("ids", True), ("streamed", False)):
            calls[f"masked_linear_cross_entropy {shape}, {form}"] = cross_entropy(
                96, 64, 1000, dtype, gathered=gathered, times=1.0
            )
    return calls


def moved(backend: str) -> Rows:
    """What calls move, in all and by kernel, next to their inputs and outputs, moved once."""
    calls = selection_calls()
    if backend == "triton":
        calls |= attention_calls() | masking_calls() | patch_calls() | loss_calls()
        calls |= negatives_calls.counted() | queue_cases.counted()
    else:
        calls |= grouping_calls()
    on_cpu = {"triton": triton_on_cpu, "cuda": cuda_on_cpu}[backend]
    rows: Rows = {}
    with on_cpu(PTX_ARCHITECTURE) as traffic, smk.use_backend(backend):
        for name, (operator, arguments) in calls.items():
            traffic.clear()
            answer = operator(**arguments)
            outputs = [answer] if isinstance(answer, Tensor) else answer
            tensors = [x for x in (*arguments.values(), *outputs) if isinstance(x, Tensor)]
            floor = sum(tensor.nbytes for tensor in tensors)
            kernels = demangled(launch.kernel for launch in traffic)
            for kernel in dict.fromkeys([WHOLE_CALL, *kernels]):
                counted = [
                    launch
                    for launch, its in zip(traffic, kernels, strict=True)
                    if kernel in (WHOLE_CALL, its)
                ]
                size = sum(launch.bytes_read + launch.bytes_written for launch in counted)
                sectors = sum(launch.sectors_read + launch.sectors_written for launch in counted)
                rows[backend, name, kernel] = {
                    "launches": len(counted),
                    "bytes / floor": round(size / floor, 4),
                    "sectors / floor": round(32 * sectors / floor, 4),
                }
    return rows


# ---- the table ----

TEXT = """\
# Budgets of the GPU kernels

Written by `make budgets`, and compared by the tests with what they find: no number may grow, and a
kernel without a row fails. Made with {triton} and {cuda}; other compilers make other code.

## Machine code

Registers of a thread, bytes of shared memory of a block (static and dynamic), and bytes that a
thread spills, on each architecture. Triton compiles a kernel for each launch; the rows name the
launches in `tests/triton_launches.py`. Those of CUDA name template arguments.

{compiled}

## Memory traffic

Launches of a call, and what they read and write, counted while the PTX for sm_{arch} runs on the
CPU. The floor is every input and output of the call, moved once. Sectors are the pieces of 32 bytes
that a launch touches, each counted once, times 32. Types are float32 unless said; all words are
valid unless said.

{moved}
"""


def made_with(backend: str) -> str:
    if backend == "triton":
        return f"Triton {triton.__version__}"
    version = re.search(r"V([\d.]+)", call([native.find_nvcc(), "--version"]))
    return f"nvcc {version[1] if version else 'of no version'}"


def table(header: Key, rows: Rows) -> str:
    columns = list(next(iter(rows.values())))
    cells = [
        [*header, *columns],
        ["---"] * len(header) + ["---:"] * len(columns),
        *([*key, *map(str, row.values())] for key, row in rows.items()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def written() -> str:
    return TEXT.format(
        triton=made_with("triton"),
        cuda=made_with("cuda"),
        arch=PTX_ARCHITECTURE,
        compiled=table(
            ("backend", "kernel", "compiled for"), compiled("triton") | compiled("cuda")
        ),
        moved=table(("backend", "call", "kernel"), moved("triton") | moved("cuda")),
    )


def tables(text: str) -> list[Rows]:
    """The tables of a Markdown text."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
        (_, _, _, *columns), _, *rows = cells
        found.append(
            {
                (first, second, third): dict(zip(columns, map(_number, numbers), strict=True))
                for first, second, third, *numbers in rows
            }
        )
    return found


def _number(cell: str) -> float:
    return float(cell) if "." in cell else int(cell)


def outgrown(found: Rows, budget: Rows) -> list[str]:
    """What is more than its row allows, has no row, or has a row and is gone."""
    grown = [
        f"{' '.join(key)}: {column} is {number}, and its budget {budget[key].get(column)}"
        for key, row in found.items()
        if key in budget
        for column, number in row.items()
        if number > budget[key].get(column, 0)
    ]
    missing = [f"{' '.join(key)}: has no row" for key in found.keys() - budget.keys()]
    gone = [f"{' '.join(key)}: has a row, and is gone" for key in budget.keys() - found.keys()]
    return grown + sorted(missing) + sorted(gone)


if __name__ == "__main__":
    FILE.write_text(written())
