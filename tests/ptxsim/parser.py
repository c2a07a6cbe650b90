"""PTX text to kernels: registers, constants and addresses resolved to places, calls inlined, lines remembered.

Grammar: PTX ISA 9.0, chapters 4 (syntax), 5 (state spaces) and 9 (instructions), as far as nvcc writes it.
What an opcode means is not decided here: `opcodes.py` names it for the engine.
"""

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .types import SPECIAL, Address, Immediate, Label, Operand, Register, Vector, WideAddress, align, width

LOCAL_WINDOW = 0x6000_0000_0000_0000  # where generic addresses of local memory start (engine/machine.h)
SHARED_WINDOW = 0x7000_0000_0000_0000
PARAM_WINDOW = 0x5000_0000_0000_0000


class PtxError(ValueError):
    """PTX that this tool cannot run. The message names the line and what was expected."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; `line` is its line in the PTX text, `source` the (file, line) that nvcc says it comes from."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    source: tuple[int, int]
    targets: tuple[int, ...] = ()


@dataclass
class Variable:
    """A variable of the module in global, constant or (without a size: dynamic) shared memory."""

    name: str
    space: str
    alignment: int
    size: int
    initial: bytes = b""


@dataclass
class Kernel:
    """One entry: its code, its parameters {name: (offset, size)} and the bytes that a thread and a block need."""

    name: str
    parameters: dict[str, tuple[int, int]]
    code: list[Instruction] = field(default_factory=list)
    registers: int = 0  # bytes per lane
    shared: int = 0  # static bytes per block
    dynamic_at: int = 0  # where dynamic shared memory starts
    local: int = 0  # bytes per thread
    max_threads: int = 1024

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


@dataclass(frozen=True)
class _Source:
    """A function or an entry, not parsed yet."""

    name: str
    is_entry: bool
    results: str
    parameters: str
    directives: str
    start: int  # of the body in the text, after its brace
    end: int


_HEADER = re.compile(
    r"\.(?P<kind>entry|func)\b\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$%]+)\s*(?:\((?P<parameters>[^)]*)\))?"
    r"(?P<directives>[^;{]*)(?P<end>[;{])"
)
_VARIABLE = re.compile(
    r"(?P<linkage>\.(?:visible|extern|weak|common)\s+)?\.(?P<space>global|const|shared)\s+(?P<attributes>(?:\.\w+(?:\(\d+\))?\s+|\d+\s+)*?)"
    r"\.(?P<type>[bsuf]\d+)\s+(?P<name>[\w$%]+)\s*(?P<array>(?:\[\d*\])*)\s*(?:=\s*(?P<initial>[^;]*))?;"
)
_STATEMENT = re.compile(
    r"\s*(?:(?P<location>\.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n]*)|(?P<label>[\w$]+)\s*:(?!:)|(?P<open>\{)|(?P<close>\})"
    r"|(?P<text>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);)"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")
_DECLARED = re.compile(
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[bsuf]\d+)\s+(?P<name>[\w$%]+)\s*(?P<array>(?:\[\d*\])*)"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)


class Module:
    """A PTX text: which entries and variables it has. Bodies are parsed when asked for, by `kernel`."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", self.text)
        self._ends = [m.start() for m in re.finditer("\n", self.text)]
        self.files = {int(m[1]): m[2] for m in _FILE.finditer(self.text)}
        self.functions = {found.name: found for found in self._functions()}
        self.variables = {found.name: found for found in self._variables()}

    @property
    def entries(self) -> list[str]:
        return [name for name, function in self.functions.items() if function.is_entry]

    def line(self, position: int) -> int:
        return bisect.bisect_left(self._ends, position) + 1

    def kernel(self, name: str, symbols: dict[str, int]) -> Kernel:
        """The entry `name`; `symbols` are the addresses of the module's variables in global and constant memory."""
        function = self.functions.get(name)
        if function is None or not function.is_entry:
            raise PtxError(f"expected one of the entries {self.entries}, got {name!r}")
        return _Body(self, function, symbols).kernel

    def _functions(self) -> Iterator[_Source]:
        position = 0
        while header := _HEADER.search(self.text, position):
            position = header.end()
            if header["end"] == ";":
                continue
            end = self._closing_brace(position)
            yield _Source(
                header["name"], header["kind"] == "entry", header["results"] or "", header["parameters"] or "",
                header["directives"], position, end,
            )  # fmt: skip
            position = end

    def _closing_brace(self, position: int) -> int:
        depth = 1
        for brace in re.compile("[{}]").finditer(self.text, position):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.start()
        raise PtxError(f"PTX line {self.line(position)}: expected a closing brace, got the end of the text")

    def _variables(self) -> Iterator[Variable]:
        inside = [(f.start, f.end) for f in self.functions.values()]
        for found in _VARIABLE.finditer(self.text):
            if any(start <= found.start() < end for start, end in inside):
                continue
            element = width(found["type"])
            alignment = re.search(r"\.align\s+(\d+)", found["attributes"])
            size = element * _elements(found["array"])
            initial = _initial(found["initial"], found["type"], self.line(found.start()))
            yield Variable(found["name"], found["space"], int(alignment[1]) if alignment else element, size, initial)


def _elements(array: str) -> int:
    """Elements of '[4][8]'; 1 without brackets, 0 for '[]'."""
    return int(np.prod([int(n or 0) for n in re.findall(r"\[(\d*)\]", array)], dtype=np.int64))


def _initial(text: str | None, kind: str, line: int) -> bytes:
    if text is None:
        return b""
    values = re.findall(r"[^\s{},]+", text)
    try:
        bits = [_number(value, width(kind)) for value in values]
    except ValueError:
        raise PtxError(f"PTX line {line}: expected numbers as initial values, got {text[:60]!r}") from None
    return b"".join(value.to_bytes(width(kind), "little") for value in bits)


def _number(text: str, size: int) -> int:
    """The bits of a PTX number, `size` bytes wide."""
    text = text.strip()
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) & (1 << 8 * size) - 1


class _Body:
    """Parses one entry's body, with every function that it calls inlined at the call."""

    def __init__(self, module: Module, entry: _Source, symbols: dict[str, int]) -> None:
        self.module, self.symbols = module, symbols
        self.kernel = Kernel(entry.name, {})
        self.scopes: list[dict[str, Operand]] = [{}]
        self.memory: list[dict[str, tuple[str, int]]] = [{}]  # name: (space, offset)
        self.calls: list[str] = []
        self._parameters(entry.parameters)
        self._shared_variables()
        if limit := re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", entry.directives):
            self.kernel.max_threads = int(np.prod([int(n) for n in limit[1].split(",")]))
        self._statements(entry)

    # -------------------------------------------------------------------------------------------- declarations

    def _parameters(self, text: str) -> None:
        at = 0
        for found in _DECLARED.finditer(text):
            element = width(found["type"])
            at = align(at, int(found["align"] or element))
            size = element * _elements(found["array"])
            self.kernel.parameters[found["name"]] = (at, size)
            self.memory[0][found["name"]] = ("param", at)
            at += size

    def _shared_variables(self) -> None:
        """Static ones first, then dynamic memory, which every extern array names."""
        shared = [v for v in self.module.variables.values() if v.space == "shared"]
        for variable in shared:
            if variable.size:
                self.memory[0][variable.name] = ("shared", self._take_shared(variable.alignment, variable.size))
        self.dynamic = [v for v in shared if not v.size]

    def _take_shared(self, alignment: int, size: int) -> int:
        at = align(self.kernel.shared, alignment)
        self.kernel.shared = at + size
        return at

    def _take_local(self, alignment: int, size: int) -> int:
        at = align(self.kernel.local, alignment)
        self.kernel.local = at + size
        return at

    def _register(self, size: int) -> Register:
        at = align(self.kernel.registers, size)
        self.kernel.registers = at + size
        return Register(at, size)

    def _declare(self, text: str) -> None:
        kind, _, rest = text.partition(" ")
        if kind == ".reg":
            name_of, _, names = rest.strip().lstrip(".").partition(" ")
            size = 4 if name_of == "pred" else max(4, width(name_of))
            for name in re.split(r"\s*,\s*", names.strip()):
                counted = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
                for each in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
                    self.scopes[-1][each] = self._register(size)
            return
        found = _DECLARED.search(rest)
        assert found
        element = width(found["type"])
        alignment, size = int(found["align"] or element), element * _elements(found["array"])
        if kind == ".shared":
            self.memory[-1][found["name"]] = ("shared", self._take_shared(alignment, size))
        else:  # .local, and .param around a call, which is local to the thread as well
            self.memory[-1][found["name"]] = ("local", self._take_local(alignment, size))

    # ---------------------------------------------------------------------------------------------- statements

    def _statements(self, function: _Source) -> None:
        """Appends the code of `function`, its labels resolved."""
        code, labels, waiting, tables = self.kernel.code, {}, [], {}
        position, depth, source = function.start, len(self.scopes), (0, 0)
        while position < function.end:
            found = _STATEMENT.match(self.module.text, position, function.end)
            if found is None:
                if self.module.text[position : function.end].strip():
                    self._fail(position, "expected a statement")
                break
            position = found.end()
            if found["location"]:
                source = (int(found["file"]), int(found["row"]))
            elif found["label"]:
                labels[found["label"]] = len(code)
                tables["last"] = found["label"]
            elif found["open"]:
                self.scopes.append({})
                self.memory.append({})
            elif found["close"]:
                self.scopes.pop()
                self.memory.pop()
            else:
                self._statement(found, source, waiting, tables)
        for index, names in waiting:
            targets = tuple(labels[name] if name else len(code) for name in names)
            code[index] = _with_targets(code[index], targets)
        del self.scopes[depth:], self.memory[depth:]

    def _statement(self, found: re.Match, source: tuple[int, int], waiting: list, tables: dict) -> None:
        text, at = " ".join(found["text"].split()), found.start("text")
        if text.startswith((".reg", ".local", ".shared", ".param")):
            self._declare(text)
        elif text.startswith(".branchtargets"):
            tables[tables["last"]] = re.findall(r"[\w$]+", text.removeprefix(".branchtargets"))
            for _, names in waiting:
                if names == [("table", tables["last"])]:
                    names[:] = tables[tables["last"]]
        elif not text.startswith((".pragma", ".file")):
            self._instruction(text, at, source, waiting, tables)

    def _instruction(self, text: str, at: int, source: tuple[int, int], waiting: list, tables: dict) -> None:
        found = re.fullmatch(r"(?:@(?P<not>!?)(?P<guard>[\w$%]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<rest>.*)", text)
        if found is None:
            self._fail(at, "expected an instruction")
        line, opcode = self.module.line(at), found["opcode"]
        guard = self._lookup(found["guard"], at) if found["guard"] else None
        operands = _OPERAND.findall(found["rest"])
        if opcode.split(".")[0] == "call":
            if guard is not None:
                self._fail(at, "expected a call without a guard")
            self._call([o.strip() for o in operands], at)
            return
        index = len(self.kernel.code)
        if opcode in ("bra", "bra.uni"):
            waiting.append((index, [operands.pop().strip()]))
        elif opcode.startswith("brx.idx"):
            table = operands.pop().strip()
            waiting.append((index, list(tables[table]) if table in tables else [("table", table)]))
        elif opcode in ("ret", "ret.uni") and self.calls:
            opcode = "bra"
            waiting.append((index, [""]))  # to the end of the inlined function
        size = _immediate_width(opcode)
        parsed = tuple(self._operand(o.strip(), size, opcode, i, at) for i, o in enumerate(operands))
        self.kernel.code.append(Instruction(opcode, parsed, guard, bool(found["not"]), line, source))

    def _call(self, operands: list[str], at: int) -> None:
        """The callee's body in place, its parameters being the caller's places."""
        results = re.findall(r"[\w$%]+", operands.pop(0)) if operands[0].startswith("(") else []
        callee = self.module.functions.get(operands[0])
        if callee is None:
            self._fail(at, f"expected a call of a function of this module, got {operands[0]!r}")
        if callee.name in self.calls:
            self._fail(at, f"expected no recursion, got {callee.name!r} inside itself")
        arguments = re.findall(r"[\w$%]+", operands[1]) if len(operands) > 1 else []
        formal = [m["name"] for text in (callee.results, callee.parameters) for m in _DECLARED.finditer(text)]
        places = {name: self._place(actual, at) for name, actual in zip(formal, results + arguments, strict=True)}
        outer = self.scopes, self.memory
        self.scopes, self.memory = [{}], [self.memory[0] | places]
        self.calls.append(callee.name)
        self._statements(callee)
        self.calls.pop()
        self.scopes, self.memory = outer

    # ------------------------------------------------------------------------------------------------ operands

    def _fail(self, at: int, what: str) -> None:
        line = self.module.line(at)
        raise PtxError(f"PTX line {line}: {what}: {self.module.text.splitlines()[line - 1].strip()!r}")

    def _lookup(self, name: str, at: int) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        self._fail(at, f"expected a declared register, got {name!r}")

    def _place(self, name: str, at: int) -> tuple[str, int]:
        for scope in reversed(self.memory):
            if name in scope:
                return scope[name]
        if any(v.name == name for v in self.dynamic):
            alignment = max([16, *(v.alignment for v in self.dynamic)])
            self.kernel.dynamic_at = align(self.kernel.shared, alignment)
            return ("shared", self.kernel.dynamic_at)
        if name in self.symbols:
            return ("global", self.symbols[name])
        self._fail(at, f"expected a register, a variable or a number, got {name!r}")

    def _operand(self, text: str, size: int, opcode: str, position: int, at: int) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(o.strip(), size, opcode, 1, at) for o in text[1:-1].split(",")))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), at)
        if "|" in text:
            return Vector(tuple(self._operand(o.strip(), size, opcode, 0, at) for o in text.split("|")))
        if text in SPECIAL:
            return SPECIAL[text]
        if text == "_":
            return Label("_")
        if re.match(r"-?\d", text):
            wanted = _shift_width(opcode, position) or size
            return Immediate(_number(text, wanted), wanted)
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text == "WARP_SZ":
            return Immediate(32, size)
        name, _, offset = text.partition("+")
        space, place = self._place(name.strip(), at)
        window = PARAM_WINDOW if space == "param" else 0
        return Immediate(window + place + int(offset or "0", 0), size)

    def _address(self, text: str, at: int) -> Operand:
        base, _, offset = text.partition("+")
        base, offset = base.strip(), int(offset.strip() or "0", 0)
        if re.match(r"-?\d", base):
            return Address(None, int(base, 0) + offset)
        for scope in reversed(self.scopes):
            if base in scope:
                register = scope[base]
                return WideAddress(register, offset) if register.size == 8 else Address(register, offset)
        space, place = self._place(base, at)
        return Address(None, place + offset, space)


def _with_targets(instruction: Instruction, targets: tuple[int, ...]) -> Instruction:
    return Instruction(
        instruction.opcode, instruction.operands, instruction.guard, instruction.negated, instruction.line,
        instruction.source, targets,
    )  # fmt: skip


def _immediate_width(opcode: str) -> int:
    """Bytes of an immediate operand: of the opcode's last type, halved for a product that is twice as wide."""
    types = re.findall(r"\.([bsuf]\d+|pred)\b", opcode)
    return max(4, width(types[-1])) if types and types[-1] != "pred" else 4


def _shift_width(opcode: str, position: int) -> int:
    """4 where an operand is a count or a selector, whatever the instruction's type; else 0."""
    base = opcode.split(".")[0]
    counts = {"shl": 2, "shr": 2, "shf": 3, "bfe": 2, "bfi": 3, "cp": 0, "lop3": 0, "shfl": 0, "bar": 0, "barrier": 0}
    return 4 if base in counts and position >= counts[base] else 0
