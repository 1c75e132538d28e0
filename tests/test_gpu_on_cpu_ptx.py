"""The interpreter of PTX on its own: what it computes, what it counts, what it stops at."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu import build
from tests.gpu_on_cpu.program import ExecutionError, Traffic, programs
from tests.gpu_on_cpu.ptx import PtxError

if missing := build.missing():
    pytest.skip(missing, allow_module_level=True)

# %rd1 and %rd2 are the addresses of x and y; %rd3 is that of this thread's 8 bytes of y.
KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 x, .param .u64 y)
{{
    .reg .pred %p<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    .shared .align 16 .b8 memory[256];
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 8, %rd2;
    {body}
    ret;
}}
"""
LINE = 1 + KERNEL[: KERNEL.index("{body}")].count("\n")  # of the first line of the body


def run(body: str, x: Tensor, y: Tensor, threads: int = 32, **options: Any) -> Traffic:
    kernel = programs(KERNEL.format(body=body))["kernel"]
    return kernel.run((1,), threads, {"x": x, "y": y}, **options)


def words(*values: int) -> Tensor:
    return torch.tensor([value - 2**64 if value >= 2**63 else value for value in values])


def result(instruction: str, *operands: int) -> int:
    """What the instruction leaves in %rd9 (64 bits), given %rd10, %rd11, ..."""
    loads = [f"ld.global.b64 %rd{10 + i}, [%rd1+{8 * i}];" for i in range(len(operands))]
    y = words(0)
    run(" ".join([*loads, instruction, "st.global.b64 [%rd2], %rd9;"]), words(*operands), y, 1)
    return int(y[0]) % 2**64


def f32(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def f64(number: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", number))[0]


NAN = 0x7FFFFFFF
INF = f32(float("inf"))


@pytest.mark.parametrize(
    ("instruction", "operands", "wanted"),
    [
        ("add.s32 %rd9, %rd10, %rd11;", (0xFFFFFFFF, 2), 1),
        ("sub.s64 %rd9, %rd10, -3;", (2**63,), 2**63 + 3),
        ("mul.hi.s32 %rd9, %rd10, %rd11;", (0xFFFFFFFF, 5), 0xFFFFFFFF),
        ("mul.hi.u64 %rd9, %rd10, %rd11;", (2**63, 6), 3),
        ("mul.wide.s32 %rd9, %rd10, -2;", (2**31,), 2**32),
        ("mad.lo.s16 %rd9, %rd10, %rd11, %rd12;", (300, 300, 1), 90001 % 2**16),
        ("div.s32 %rd9, %rd10, %rd11;", (2**32 - 7, 2), 2**32 - 3),
        ("rem.s32 %rd9, %rd10, %rd11;", (2**32 - 7, 2), 2**32 - 1),
        ("div.s32 %rd9, %rd10, %rd11;", (2**31, 2**32 - 1), 2**31),
        ("max.s32 %rd9, %rd10, %rd11;", (2**31, 1), 1),
        ("max.u32 %rd9, %rd10, %rd11;", (2**31, 1), 2**31),
        ("shr.s32 %rd9, %rd10, 40;", (2**31,), 2**32 - 1),
        ("shr.u32 %rd9, %rd10, 32;", (2**31,), 0),
        ("shl.b32 %rd9, %rd10, 31;", (3,), 2**31),
        ("shf.l.wrap.b32 %rd9, %rd10, %rd11, 36;", (0xABCDEF01, 0x12345678), 0x2345678A),
        ("shf.r.clamp.b32 %rd9, %rd10, %rd11, 99;", (1, 7), 7),
        ("bfe.u32 %rd9, %rd10, 4, 8;", (0xABCDE,), 0xCD),
        ("bfe.s32 %rd9, %rd10, 4, 8;", (0xABCDE,), 0xFFFFFFCD),
        ("bfe.s64 %rd9, %rd10, 60, 99;", (0xA << 60,), 2**64 - 6),
        ("bfi.b32 %rd9, %rd10, %rd11, 8, 4;", (0x5, 0xFFFF), 0xF5FF),
        ("brev.b32 %rd9, %rd10;", (1,), 2**31),
        ("clz.b32 %rd9, %rd10;", (1,), 31),
        ("popc.b64 %rd9, %rd10;", (2**64 - 1,), 64),
        ("bfind.u32 %rd9, %rd10;", (0,), 0xFFFFFFFF),
        ("prmt.b32 %rd9, %rd10, %rd11, 0x8A40;", (0x33221180, 0x77665544), 0xFF004480),
        ("lop3.b32 %rd9, %rd10, %rd11, %rd12, 0xE8;", (0b1100, 0b1010, 0b1001), 0b1000),
        ("selp.b32 %rd9, %rd10, %rd11, 0;", (1, 2), 2),
        ("cvt.s64.s8 %rd9, %rd10;", (0x180,), 2**64 - 128),
        ("cvt.u32.s16 %rd9, %rd10;", (0xFFFE,), 0xFFFFFFFE),
        ("cvt.rzi.s32.f32 %rd9, %rd10;", (f32(-2.7),), 2**32 - 2),
        ("cvt.rni.s32.f32 %rd9, %rd10;", (f32(2.5),), 2),
        ("cvt.rzi.u32.f32 %rd9, %rd10;", (f32(-2.7),), 0),
        ("cvt.rzi.s32.f32 %rd9, %rd10;", (f32(3e9),), 2**31 - 1),
        ("cvt.rzi.s32.f32 %rd9, %rd10;", (NAN,), 0),
        ("cvt.rn.f32.u64 %rd9, %rd10;", (2**64 - 1,), f32(2.0**64)),
        ("cvt.f64.f32 %rd9, %rd10;", (f32(-0.375),), f64(-0.375)),
        ("cvt.rna.tf32.f32 %rd9, %rd10;", (f32(1 + 2**-11),), f32(1 + 2**-10)),
        ("cvt.sat.f32.f32 %rd9, %rd10;", (f32(-3),), 0),
        ("add.rn.f32 %rd9, %rd10, 0f3F800000;", (f32(2**-24),), f32(1)),
        ("fma.rn.f32 %rd9, %rd10, %rd10, %rd11;", (f32(1 + 2**-12), f32(-1)), f32(2**-11 + 2**-24)),
        ("fma.rm.f32 %rd9, %rd10, %rd10, %rd11;", (f32(1), f32(2**-40)), f32(1)),
        ("fma.rm.f32 %rd9, %rd10, %rd10, %rd11;", (f32(1), f32(-(2**-40))), f32(1 - 2**-24)),
        ("mul.ftz.f32 %rd9, %rd10, %rd11;", (f32(2**-100), f32(-(2**-40))), f32(-0.0)),
        ("mul.f32 %rd9, %rd10, %rd11;", (f32(2**-100), f32(2**-40)), f32(2**-140)),
        ("sub.f32 %rd9, %rd10, %rd11;", (INF, INF), NAN),
        ("min.f32 %rd9, %rd10, %rd11;", (0xFFC00001, f32(2)), f32(2)),
        ("min.NaN.f32 %rd9, %rd10, %rd11;", (0xFFC00001, f32(2)), NAN),
        ("max.f32 %rd9, %rd10, %rd11;", (f32(-0.0), f32(0)), f32(0)),
        ("min.f32 %rd9, %rd10, %rd11;", (f32(0), f32(-0.0)), f32(-0.0)),
        ("add.f64 %rd9, %rd10, %rd11;", (f64(0.1), f64(0.2)), f64(0.1 + 0.2)),
        ("ex2.approx.f32 %rd9, %rd10;", (f32(-3),), f32(0.125)),
        ("copysign.f32 %rd9, %rd10, %rd11;", (f32(-1), f32(3)), f32(-3)),
        ("add.f16x2 %rd9, %rd10, %rd11;", (0x3C000000, 0x3C004000), 0x40004000),
        ("fma.rn.bf16x2 %rd9, %rd10, %rd10, %rd11;", (0x40003F80, 0x3F803F80), 0x40A04000),
        ("cvt.rn.bf16x2.f32 %rd9, %rd10, %rd11;", (f32(1), f32(2)), 0x3F804000),
        ("mov.b64 {%r8, %r9}, %rd10; mov.b64 %rd9, {%r9, %r8};", (2**32 * 5 + 7,), 2**32 * 7 + 5),
        ("mov.b64 %rd9, 1; @!%p1 mov.b64 %rd9, 2;", (), 1),
        ("setp.lt.f32 %p1|%p2, %rd10, 0f0; selp.b64 %rd9, 1, 2, %p2;", (NAN,), 1),
        ("setp.ltu.f32 %p1, %rd10, 0f0; selp.b64 %rd9, 1, 2, %p1;", (NAN,), 1),
        ("setp.ne.f32 %p1, %rd10, 0f0; selp.b64 %rd9, 1, 2, %p1;", (NAN,), 2),
        ("setp.eq.s32 %p1, %rd10, 1; setp.lt.and.s32 %p2, 0, 9, !%p1; selp.b64 %rd9, 1, 2, %p2;",
         (1,), 2),
        ("setp.lt.s64 %p1, %rd10, 0; selp.b64 %rd9, 1, 2, %p1;", (2**63,), 1),
    ],
)  # fmt: skip
def test_instructions(instruction: str, operands: tuple[int, ...], wanted: int) -> None:
    # A literal of a float instruction has 32 bits.
    instruction = instruction.replace("0f0;", "0f00000000;").replace("0f0,", "0f00000000,")
    assert result(instruction, *operands) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_convert_as_torch_does(dtype: torch.dtype) -> None:
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    exact = every[~every.isnan()].float()
    halfway = torch.cat([exact, (exact + exact.roll(1)) / 2])
    near = [halfway.nextafter(torch.tensor(float(way))) for way in ("-inf", "inf")]
    numbers = torch.cat([halfway, *near])
    numbers = torch.cat([numbers, torch.full((-len(numbers) % 1024,), float("nan"))]).view(-1, 1024)
    body = f"""
        mad.wide.u32 %rd4, %r1, 4, %rd1; ld.global.b32 %r2, [%rd4]; cvt.rn.{kind}.f32 %r3, %r2;
        cvt.f32.{kind} %r4, %r3; st.global.v2.b32 [%rd3], {{%r3, %r4}};"""
    for row in numbers[:: max(len(numbers) // 64, 1)]:
        y = torch.zeros(1024, 2, dtype=torch.int32)
        run(body, row.contiguous(), y, 1024)
        wanted = row.to(dtype)
        known = ~row.isnan()
        assert torch.equal(y[known, 0].to(torch.int16), wanted[known].view(torch.int16))
        torch.testing.assert_close(
            y[:, 1].view(torch.float32), wanted.float(), rtol=0, atol=0, equal_nan=True
        )


LANES = torch.arange(32)


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("shfl.sync.up.b32 %r9, %r1, 3, 0, -1;", (LANES - 3).where(LANES >= 3, LANES)),
        ("shfl.sync.down.b32 %r9, %r1, 3, 31, -1;", (LANES + 3).where(LANES < 29, LANES)),
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", LANES ^ 5),
        ("shfl.sync.idx.b32 %r9, %r1, 5, 0x181F, -1;", LANES // 8 * 8 + 5),
        ("vote.sync.ballot.b32 %r9, %p1, -1;", torch.full((32,), 0b111)),
        ("redux.sync.add.s32 %r9, %r1, -1;", torch.full((32,), 496)),
        ("redux.sync.max.s32 %r9, %r2, -1;", torch.full((32,), 0)),
        ("redux.sync.max.u32 %r9, %r2, -1;", torch.full((32,), 2**32 - 1)),
        ("match.any.sync.b32 %r9, %r3, -1;", 0x01010101 << LANES % 8),
        ("bar.red.popc.u32 %r9, 0, %p1;", torch.full((32,), 3)),
        ("bar.red.and.pred %p2, 0, %p1; selp.b32 %r9, 1, 0, %p2;", torch.zeros(32).long()),
        ("@%p1 shfl.sync.idx.b32 %r9, %r1, 2, 31, 7; @!%p1 mov.b32 %r9, 9;",
         torch.tensor(2).where(LANES < 3, 9)),
    ],
)  # fmt: skip
def test_lanes_exchange(instruction: str, wanted: Tensor) -> None:
    y = torch.zeros(32, dtype=torch.int64)
    setup = "setp.lt.u32 %p1, %r1, 3; neg.s32 %r2, %r1; and.b32 %r3, %r1, 7;"
    for seed in range(3):
        run(
            f"{setup} {instruction} cvt.u64.u32 %rd9, %r9; st.global.b64 [%rd3], %rd9;",
            y,
            y,
            seed=seed,
        )
        assert torch.equal(y, wanted)


def test_atomics() -> None:
    y = torch.tensor([0, 5], dtype=torch.int32)
    run("atom.global.add.u32 %r2, [%rd2], 2; red.global.max.s32 [%rd2+4], %r1;", y, y)
    assert y.tolist() == [64, 31]


def test_copies_happen_when_they_are_waited_for() -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    copy = "mad.wide.u32 %rd4, %r1, 8, %rd1; mov.u32 %r2, memory; mad.lo.u32 %r3, %r1, 8, %r2;"
    copy += "cp.async.ca.shared.global [%r3], [%rd4], 8; cp.async.commit_group;"
    load = "ld.shared.b64 %rd9, [%r3]; st.global.b64 [%rd3], %rd9;"
    run(f"{copy} cp.async.wait_group 0; {load}", x, y)
    assert torch.equal(y, x)
    run(f"{copy} cp.async.wait_group 1; {load}", x, y)
    assert y.isnan().all()


def test_local_memory_and_loops() -> None:
    """Each thread fills four words of its own and adds them up."""
    y = torch.zeros(32, dtype=torch.int64)
    body = """
    .local .align 8 .b8 depot[32];
    mov.u64 %rd4, depot; cvta.local.u64 %rd5, %rd4; mov.u32 %r2, 0;
    $fill:
    mad.wide.u32 %rd6, %r2, 4, %rd5; mul.lo.s32 %r3, %r1, %r2; st.local.u32 [%rd6], %r3;
    add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, 4; @%p1 bra $fill;
    ld.local.v4.u32 {%r4, %r5, %r6, %r7}, [depot];
    add.s32 %r4, %r4, %r5; add.s32 %r6, %r6, %r7; add.s32 %r4, %r4, %r6;
    cvt.u64.u32 %rd9, %r4; st.global.b64 [%rd3], %rd9;"""
    run(body, y, y)
    assert torch.equal(y, 6 * LANES)


# ---- counting ----


def test_counts_what_lanes_move() -> None:
    """16 of 32 lanes read 8 bytes at steps of 24; all write 4 bytes to one place."""
    x, y = torch.zeros(96, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    body = "setp.lt.u32 %p1, %r1, 16; mad.wide.u32 %rd4, %r1, 24, %rd1;"
    body += "@%p1 ld.global.b64 %rd9, [%rd4]; @!%p1 bra $skip; st.global.b32 [%rd2], %r1; $skip:"
    first = x.data_ptr()
    sectors = {(first + 24 * i + b) // 32 for i in range(16) for b in (0, 7)}
    assert run(body, x, y) == ("kernel", 16 * 8, 16 * 4, len(sectors), 1)


# ---- what stops a run ----

TWO_WARPS = (
    "shl.b32 %r2, %r1, 2; mov.u32 %r3, memory; add.s32 %r2, %r2, %r3; xor.b32 %r4, %r2, 128;"
)
RACE = "{first} ld.shared.b32 %r5, [%r4]; {second} st.shared.b32 [%r2], %r1;"


@pytest.mark.parametrize(
    ("sound", "broken", "threads", "message"),
    [
        ("ld.global.b64 %rd9, [%rd1+8];", "ld.global.b64 %rd9, [%rd1+16];", 1,
         "out of bounds: read of 8 bytes, 8 bytes past the end of 'x'"),
        ("st.global.b32 [%rd2], 0;", "st.global.b32 [%rd2+-4], 0;", 1,
         "out of bounds: write of 4 bytes, 4 bytes before 'y'"),
        ("st.shared.b32 [memory+252], %r1;", "st.shared.b32 [memory+256], %r1;", 1,
         "out of bounds: write of 4 bytes at byte 256 of 256 of shared memory"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd1];", "ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", 1,
         "read of 8 bytes at an address that is no multiple of that"),
        (TWO_WARPS + RACE.format(first="", second="bar.sync 0;"),
         TWO_WARPS + RACE.format(first="", second=""), 64, "a race"),
        (TWO_WARPS + "st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4];",
         TWO_WARPS + "st.shared.b32 [%r2], %r1; bar.warp.sync -1; ld.shared.b32 %r5, [%r4];", 64,
         "a race"),
        ("xor.b32 %r4, %r1, 1; shl.b32 %r2, %r1, 2; shl.b32 %r4, %r4, 2; st.shared.b32 [%r2], %r1;"
         "bar.warp.sync -1; ld.shared.b32 %r5, [%r4];",
         "xor.b32 %r4, %r1, 1; shl.b32 %r2, %r1, 2; shl.b32 %r4, %r4, 2; st.shared.b32 [%r2], %r1;"
         "ld.shared.b32 %r5, [%r4];", 32, "a race"),
        ("st.shared.b32 [memory], 7;", "st.shared.b32 [memory], %r1;", 2, "a race"),
        ("vote.sync.ballot.b32 %r2, 1, 0xFFFFFFFF;", "vote.sync.ballot.b32 %r2, 1, 0xFFFFFFFE;", 32,
         "lane 0 calls with mask fffffffe, which lacks it"),
        ("shfl.sync.idx.b32 %r2, %r1, 1, 31, 3;", "shfl.sync.idx.b32 %r2, %r1, 2, 31, 3;", 2,
         "the shuffle reads lane 2, which mask 00000003 lacks"),
        ("vote.sync.ballot.b32 %r2, 1, 3;", "vote.sync.ballot.b32 %r2, 1, 7;", 2,
         "mask 00000007 names lane 2, which the block does not have"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 vote.sync.ballot.b32 %r2, 1, 0x1FF;",
         "setp.lt.u32 %p1, %r1, 9; @%p1 vote.sync.ballot.b32 %r2, 1, 0x3FF;", 10, "lane 9|forever"),
        ("bar.sync 0;", "setp.eq.u32 %p1, %r1, 0; @%p1 bar.sync 0;", 33, "barrier"),
        ("bar.sync 0;", "setp.eq.u32 %p1, %r1, 0; @%p1 bra $a; bar.sync 0; ret;\n$a: bar.sync 0;",
         33, "the barrier diverges"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_forgive(sound: str, broken: str, threads: int, message: str) -> None:
    x, y = torch.zeros(2, dtype=torch.int64), torch.zeros(128)
    run(sound, x, y, threads)
    for seed in range(3):
        place = r"^kernel, block \(0, 0, 0\), thread \(\d+, 0, 0\): "
        with pytest.raises(ExecutionError, match=rf"{place}.*({message})"):
            run(broken, x, y, threads, seed=seed)


def test_a_failure_names_the_line_of_the_ptx() -> None:
    y = torch.zeros(1)
    with pytest.raises(ExecutionError, match=rf"line {LINE + 1}: .*\n  {LINE + 1}: ld.global.u8"):
        run("\nld.global.u8 %r9, [%rd1+4];", y, y, 1)


@pytest.mark.parametrize(
    "unknown",
    [
        "wgmma.fence.sync.aligned;",
        "add.rz.f32 %r1, %r2, %r3;",
        "bar.sync 1, 64;",
        "mov.u32 %r1, name;",
    ],
)
def test_unknown_instructions_are_named(unknown: str) -> None:
    y = torch.zeros(1)
    with pytest.raises(PtxError) as caught:
        run(f"\n\n{unknown}", y, y)
    assert f"line {LINE + 2}" in str(caught.value)
    assert unknown.split()[0].split(".")[0] in str(caught.value)


def test_impossible_launches() -> None:
    y = torch.zeros(1)
    with pytest.raises(ExecutionError, match=r"no GPU can launch .* 2000 x 1 x 1 threads"):
        run("", y, y, 2000)


def test_threads_run_in_another_order_with_another_seed() -> None:
    """Who writes last is up to the order; so is what a block that runs later sees."""
    seen = set()
    for seed in range(9):
        y = torch.zeros(1, dtype=torch.int32)
        run("bar.sync 0; atom.global.exch.b32 %r2, [%rd2], %r1;", y, y, 96, seed=seed)
        seen.add(int(y))
    assert len(seen) > 3
