"""PTX text to programs of the interpreter: names of instructions made few, operands made slots.

What an instruction does is written in ``runtime/ptx_*.cc``; what it is called there and which
operands it has, here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "pred": 1}
SIZES |= {f"{sign}{8 * size}": size for sign in "us" for size in (1, 2, 4, 8)}
SPACES = {"global", "shared", "local", "param", "const"}
# What makes no difference to the result here: the default rounding, approximations (the C library
# is better), hints for caches, orders of memory in a run of one thread at a time.
WITHOUT_EFFECT = {"rn", "approx", "full", "sync", "aligned", "uni", "nc", "ca", "cg", "cs", "cv"}
WITHOUT_EFFECT |= {"lu", "wb", "wt", "volatile", "weak", "relaxed", "acquire", "release"}
WITHOUT_EFFECT |= {"acq_rel", "gpu", "cta", "sys", "unified"}
NO_OPERATION = {"membar", "fence", "prefetch", "prefetchu", "createpolicy", "griddepcontrol"}
NO_OPERATION |= {"nanosleep", "discard", "applypriority"}


class PtxError(Exception):
    """PTX that the interpreter cannot run."""


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


class Kernel(NamedTuple):
    """An entry of a PTX module, ready for the interpreter."""

    name: str
    parameters: list[Parameter]
    program: str


class Statement(NamedTuple):
    line: int
    text: str


def kernels(ptx: str) -> dict[str, Kernel]:
    """The entries of a PTX module by name."""
    bare = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), ptx, flags=re.S)
    bare = re.sub(r"//[^\n]*", "", bare)
    entry = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?[^{;]*\{", re.S)
    result = {}
    for found in entry.finditer(bare):
        end = _closing_brace(bare, found.end())
        first_line = bare.count("\n", 0, found.end()) + 1
        body = list(_statements(bare[found.end() : end], first_line))
        parameters = _parameters(found[2] or "")
        translation = _Translation(_module_shared(bare), parameters)
        for statement in body:
            translation.add(statement)
        result[found[1]] = Kernel(found[1], parameters, translation.program())
    return result


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return start + found.start()
    raise PtxError("a brace is not closed")


def _statements(body: str, line: int) -> Iterator[Statement]:
    """Instructions, directives and labels; braces of scopes are dropped."""
    text, start = "", line
    in_vector = False
    for piece in re.split(r"([;{}\n]|(?<=[\w$]):(?=\s))", body):
        if piece == "\n":
            line += 1
            directive = text.strip()
            if directive.startswith((".loc", ".file", ".pragma")) or not directive:
                text, start = "", line
        elif piece == ";" or (piece == ":" and not text.strip().startswith("@")):
            yield Statement(start, text.strip() + (":" if piece == ":" else ""))
            text, start = "", line
        elif piece in ("{", "}"):
            # A brace within an instruction holds the parts of a vector.
            if piece == "{" and text.strip():
                in_vector = True
            if in_vector:
                text += piece
            else:
                text, start = "", line
            in_vector = in_vector and piece == "{"
        else:
            text += piece + " "


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    pattern = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(.*)", re.S)
    for declared in filter(None, map(str.strip, text.split(","))):
        found = pattern.match(declared)
        if found is None:
            raise PtxError(f"not a parameter: {declared}")
        name, _, count = found[3].split()[-1].rstrip("]").partition("[")
        size = SIZES[found[2]] * int(count or 1)
        align = int(found[1] or SIZES[found[2]])
        offset = -(-offset // align) * align
        parameters.append(Parameter(name, offset, size))
        offset += size
    return parameters


_VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)$")


def _variable(text: str) -> tuple[str, int, int]:
    """Name, size and alignment of what a directive declares, after the word for its space."""
    found = _VARIABLE.match(text.strip())
    if found is None:
        raise PtxError(f"not a variable: {text}")
    size = SIZES[found[2]]
    for count in re.findall(r"\[(\d*)\]", found[4]):
        size *= int(count or 0)
    return found[3], size, int(found[1] or SIZES[found[2]])


def _module_shared(ptx: str) -> list[tuple[str, int, int]]:
    """Shared variables that are declared outside of the entries."""
    pattern = re.compile(r"^[ \t]*(?:\.(?:extern|visible|weak)\s+)*\.shared\s+([^;]*);", re.M)
    outside = re.sub(r"\{.*?\n\}", "", ptx, flags=re.S)
    return [_variable(found[1]) for found in pattern.finditer(outside)]


def _split(operands: str) -> list[str]:
    """Operands between the commas that are in no bracket."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", operands) if part.strip()]


def _parts(operand: str) -> list[str]:
    return _split(operand[1:-1]) if operand.startswith("{") else [operand]


class _Translation:
    """The body of one entry, on its way to the interpreter."""

    def __init__(self, shared: list[tuple[str, int, int]], parameters: list[Parameter]) -> None:
        self.slots: dict[str, int] = {"_": 0}
        self.specials: dict[str, str] = {}
        self.constants: dict[int, str] = {}
        self.lines: list[tuple[int, int, str, int | str, list[int]]] = []
        self.labels: dict[str, int] = {}
        self.registers: set[str] = set()
        self.shared_addresses: dict[str, int] = {}
        self.local_addresses: dict[str, int] = {}
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.shared_bytes = self.local_bytes = 0
        self.dynamic = [name for name, size, _ in shared if size == 0]
        for variable in shared:
            if variable[1] > 0:
                self.add_shared(*variable)

    def program(self) -> str:
        for name in self.dynamic:
            self.shared_bytes = -(-self.shared_bytes // 16) * 16
            self.constants[self.slot(name)] = str(self.shared_bytes)
        header = [f"local {self.local_bytes}", f"shared {self.shared_bytes}"]
        header += [f"parameter {offset} {size}" for _, offset, size in self.parameters.values()]
        header += [f"constant {slot} {value}" for slot, value in self.constants.items()]
        header += [f"special {self.slots[name]} {what}" for name, what in self.specials.items()]
        code = []
        for line, guard, name, immediate, slots in self.lines:
            if isinstance(immediate, str):
                immediate = len(self.lines) if immediate == "%end" else self.labels[immediate]
            code.append(" ".join(map(str, [line, guard, name, immediate, *slots])))
        return "\n".join([f"slots {len(self.slots)}", *header, *code])

    def add_shared(self, name: str, size: int, align: int) -> None:
        self.shared_bytes = -(-self.shared_bytes // align) * align
        self.shared_addresses[name] = self.shared_bytes
        self.shared_bytes += size

    def add(self, statement: Statement) -> None:
        text = statement.text
        if text.endswith(":"):
            self.labels[text[:-1].strip()] = len(self.lines)
        elif text.startswith(".reg"):
            names = re.sub(r"^\.reg\s+\.\w+", "", text)
            self.registers |= {re.sub(r"<\d+>", "", name) for name in _split(names)}
        elif text.startswith(".shared"):
            self.add_shared(*_variable(text.removeprefix(".shared")))
        elif text.startswith(".local"):
            name, size, _ = _variable(text.removeprefix(".local"))
            self.local_addresses[name] = self.local_bytes
            self.local_bytes += -(-size // 16) * 16
        elif not text.startswith("."):
            self.add_instruction(statement)

    def add_instruction(self, statement: Statement) -> None:
        found = re.match(r"(?:@(!?)\s*(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", statement.text, re.S)
        if found is None:
            raise PtxError(f"line {statement.line}: not an instruction: {statement.text}")
        self.line = statement.line
        self.guard = 0
        if found[2]:
            self.guard = (self.slot(found[2]) + 1) * (-1 if found[1] else 1)
        try:
            self.translate(found[3], _split(found[4]))
        except (PtxError, KeyError, IndexError, ValueError) as error:
            raise PtxError(
                f"line {self.line}: cannot be translated: {statement.text} ({error})"
            ) from error

    def emit(self, name: str, *operands: str, immediate: int | str = 0) -> None:
        slots = [self.slot(operand) for operand in operands]
        self.lines.append((self.line, self.guard, name, immediate, slots))

    def slot(self, operand: str) -> int:
        """Where the interpreter keeps the operand."""
        if operand not in self.slots:
            constant = self.constant(operand)
            self.slots[operand] = len(self.slots)
            if constant is not None:
                self.constants[self.slots[operand]] = str(constant)
        return self.slots[operand]

    def constant(self, operand: str) -> int | None:
        """The bits of a literal or the address of a variable; None for what is a register."""
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return int(found[1], 16)
        if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return int(found[1], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0) % 2**64
        if operand in self.shared_addresses:
            return self.shared_addresses[operand]
        if operand == "WARP_SZ":
            return 32
        if operand in ("%param", "%local") or re.fullmatch(
            r"%(n?tid|n?ctaid)\.[xyz]|%laneid|%warpid|%lanemask_\w\w", operand
        ):
            self.specials[operand] = operand[1:]
        elif not operand.startswith("%") and operand not in self.registers | {*self.dynamic, "_"}:
            raise PtxError(f"{operand} is not known")
        return None

    def temporary(self) -> str:
        name = f"%temporary{len(self.slots)}"
        self.slot(name)
        return name

    def address(self, operand: str) -> tuple[str, int]:
        """Base and offset of ``[base + offset]``."""
        base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
        shift = int(offset or "0", 0)
        if base in self.parameters:
            return "%param", self.parameters[base].offset + shift
        if base in self.local_addresses:
            return "%local", self.local_addresses[base] + shift
        return base, shift

    def translate(self, instruction: str, operands: list[str]) -> None:
        opcode, *modifiers = instruction.split(".")
        kept = [word for word in modifiers if word not in WITHOUT_EFFECT and "::" not in word]
        spaces = [word.split("::")[0] for word in modifiers]
        space = next((word for word in spaces if word in SPACES), "")
        if opcode in NO_OPERATION:
            self.emit("nop")
        elif opcode in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix"):
            if any("cache_hint" in word for word in modifiers):
                operands = operands[:-1]
            kept = [word for word in kept if word not in SPACES]
            self.translate_access(opcode, kept, space, operands)
        elif opcode == "cp":
            self.translate_copy(modifiers, operands)
        elif opcode == "bra":
            self.emit("bra", immediate=operands[0])
        elif opcode in ("ret", "exit"):
            self.emit("bra", immediate="%end")
        elif opcode == "mov":
            self.translate_move(kept[-1], *operands)
        elif opcode == "cvta":
            to = ["to"] if "to" in modifiers else []
            name = ".".join(["cvta", *to, "shared.u64"]) if space == "shared" else "mov.u64"
            self.emit(name, *operands)
        elif opcode == "setp":
            self.translate_comparison(kept, operands)
        elif opcode in ("bar", "barrier"):
            self.translate_barrier(kept, operands)
        elif opcode == "shfl":
            value, _, inside = operands[0].partition("|")
            self.emit(".".join([opcode, *kept]), value, inside or "_", *operands[1:])
        else:
            flat = [part for operand in operands for part in _parts(operand)]
            self.emit(".".join([opcode, *kept]), *map(self.positive, flat))

    def positive(self, operand: str) -> str:
        """The operand, or a register that holds the contrary of ``!operand``."""
        if not operand.startswith("!"):
            return operand
        inverse = self.temporary()
        self.emit("not.pred", inverse, operand[1:])
        return inverse

    def translate_access(
        self, opcode: str, modifiers: list[str], space: str, operands: list[str]
    ) -> None:
        if opcode == "red":
            opcode, operands = "atom", ["_", *operands]
        where = next(i for i, operand in enumerate(operands) if operand.startswith("["))
        base, offset = self.address(operands[where])
        flat = [part for operand in operands for part in _parts(operand)]
        flat[next(i for i, part in enumerate(flat) if part.startswith("["))] = base
        if space in ("param", "local", "const"):
            space = "private"
        if opcode in ("ld", "st") and modifiers[-1] not in ("s8", "s16", "s32"):
            modifiers = [*modifiers[:-1], f"b{8 * SIZES[modifiers[-1]]}"]
        if opcode.endswith("matrix"):
            modifiers = [*modifiers[:-1], "shared", modifiers[-1]]
            space = ""
        self.emit(".".join(filter(None, [opcode, space, *modifiers])), *flat, immediate=offset)

    def translate_copy(self, modifiers: list[str], operands: list[str]) -> None:
        if modifiers[:1] != ["async"]:
            raise PtxError("only cp.async is known")
        if modifiers[1] in ("commit_group", "wait_group", "wait_all"):
            self.emit(f"cp.async.{modifiers[1]}", *operands)
            return
        to, source = (self.offset_register(operand) for operand in operands[:2])
        size = operands[2]
        read = operands[3] if len(operands) > 3 else size
        self.emit("cp.async", to, source, size, read)

    def offset_register(self, operand: str) -> str:
        base, offset = self.address(operand)
        if offset == 0:
            return base
        moved = self.temporary()
        self.emit("add.u64", moved, base, str(offset))
        return moved

    def translate_move(self, kind: str, to: str, source: str) -> None:
        if to.startswith("{"):
            parts = _parts(to)
            width = 8 * SIZES[kind] // len(parts)
            for i, part in enumerate(parts):
                self.emit(f"bfe.u{8 * SIZES[kind]}", part, source, str(i * width), str(width))
        elif source.startswith("{"):
            parts = _parts(source)
            width = 8 * SIZES[kind] // len(parts)
            whole = self.temporary()
            self.emit("mov.u64", whole, "0")
            for i, part in enumerate(parts):
                self.emit("bfi.b64", whole, part, whole, str(i * width), str(width))
            self.emit("mov.b64", to, whole)
        elif (base := self.address(source)[0]) in ("%param", "%local"):
            self.emit("add.u64", to, base, str(self.address(source)[1]))
        else:
            self.emit(f"mov.{kind}", to, source)

    def translate_comparison(self, modifiers: list[str], operands: list[str]) -> None:
        combine = next((word for word in modifiers if word in ("and", "or", "xor")), None)
        name = ".".join(["setp", *(word for word in modifiers if word != combine)])
        holds, _, fails = operands[0].partition("|")
        compared = self.temporary() if combine or fails else holds
        self.emit(name, compared, *operands[1:3])
        if combine:
            other = self.positive(operands[3])
            self.emit(f"{combine}.pred", holds, compared, other)
        elif fails:
            self.emit("mov.pred", holds, compared)
        if fails:
            self.emit("not.pred", fails, compared)
            if combine:
                self.emit(f"{combine}.pred", fails, fails, other)

    def translate_barrier(self, modifiers: list[str], operands: list[str]) -> None:
        if modifiers == ["warp"]:
            self.emit("bar.warp", *operands)
        elif modifiers[:1] == ["red"] and len(operands) == 3 and operands[1] == "0":
            self.emit(".".join(["bar", *modifiers]), operands[0], self.positive(operands[2]))
        elif not modifiers and operands == ["0"]:
            self.emit("bar")
        else:
            raise PtxError("only barrier 0 of all threads is known")
