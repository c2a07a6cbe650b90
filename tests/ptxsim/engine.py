"""The C++ engine from Python: an entry of a PTX module becomes a program, and a program is launched."""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

from . import compiler
from .memory import Memory
from .opcodes import SPACES, Bound, bind
from .parser import Instruction, Kernel, Module, PtxError
from .report import COUNTERS, KINDS, Finding, RawFinding, Report, Row, source_name
from .schedule import Options
from .types import SPECIAL_NAMES, Address, Immediate, Label, Operand, Register, Special, WideAddress, align

_ENCODED = np.dtype([(name, np.int32) for name in ("handler", "line", "guard", "negated")] + [("arg", np.int32, 6)]
                    + [(name, np.int32) for name in ("first", "count")])  # fmt: skip
_OPERAND = np.dtype([("slot", np.int32), ("width", np.int32), ("offset", np.int64)])
_CONSTANT = np.dtype([("slot", np.int32), ("width", np.int32), ("bits", np.uint64)])
_FINDINGS = 64
_Size = ctypes.c_uint32 * 3


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(compiler.engine()))
    loaded.ptxsim_handler_name.restype = ctypes.c_char_p
    loaded.ptxsim_handler_widths.restype = ctypes.c_char_p
    loaded.ptxsim_program.restype = ctypes.c_void_p
    loaded.ptxsim_free.argtypes = [ctypes.c_void_p]
    return loaded


@cache
def handlers() -> dict[str, int]:
    """The engine's handlers: {name: index}."""
    count = library().ptxsim_handler_count()
    return {library().ptxsim_handler_name(i).decode(): i for i in range(count)}


@dataclass(frozen=True)
class _Encoded:
    code: np.ndarray
    operands: np.ndarray
    constants: np.ndarray
    special: np.ndarray
    sizes: np.ndarray


class _Encoder:
    """A kernel as the engine's arrays: constants and special registers get places in the register file too."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.at = align(kernel.registers, 8)
        self.constants: dict[tuple[int, int], int] = {}
        self.special = np.full(len(SPECIAL_NAMES), -1, np.int32)
        self.operands: list[tuple[int, int, int]] = []
        self.carry = Register(self._take(4), 4)
        self.grain = {SPACES["shared"]: 4, SPACES["global"]: 16}

    def _take(self, size: int) -> int:
        at = align(self.at, size)
        self.at = at + size
        return at

    def _constant(self, bits: int, size: int) -> int:
        key = (bits, size)
        if key not in self.constants:
            self.constants[key] = self._take(size)
        return self.constants[key]

    def _operand(self, o: Operand) -> tuple[int, int, int]:
        match o:
            case Register(at, size):
                return at, size, 0
            case Immediate(bits, size):
                return self._constant(bits, size), size, 0
            case Special(index, size):
                if self.special[index] < 0:
                    self.special[index] = self._take(size)
                return int(self.special[index]), size, 0
            case WideAddress(base, offset) | Address(base, offset):
                if base is None:
                    return self._constant(0, 8), 8, _signed(offset)
                return base.at, base.size, offset
            case Label():
                return -1, 4, 0
        raise TypeError(f"expected a flat operand, got {o}")

    def _instruction(self, instruction: Instruction) -> tuple:
        bound = bind(instruction.opcode, instruction.operands)
        handler = handlers().get(bound.handler)
        if handler is None:
            raise PtxError(
                f"PTX line {instruction.line}: unknown opcode {instruction.opcode!r} (engine: {bound.handler!r})"
            )
        operands = [self._operand(o) for o in bound.operands]
        expected = [int(w) for w in library().ptxsim_handler_widths(handler).decode()]
        if expected and expected != (given := [o[1] for o in operands]):
            raise PtxError(
                f"PTX line {instruction.line}: {instruction.opcode!r}: "
                f"expected operands of {expected} bytes, got {given}"
            )
        if bound.uses_carry:
            operands.append(self._operand(self.carry))
        operands += [(0, 4, target) for target in instruction.targets]
        first = len(self.operands)
        self.operands += operands
        self._access(bound)
        arguments = list(bound.arguments) + [0] * (6 - len(bound.arguments))
        guard = instruction.guard.at if instruction.guard else -1
        return handler, instruction.line, guard, instruction.negated, arguments, first, len(operands)

    def _access(self, bound: Bound) -> None:
        """The shadows' cells are as small as the smallest access, so that neighbours are not mistaken for one."""
        if bound.access is None:
            return
        space, size = bound.access
        for each in (SPACES["shared"], SPACES["global"]):
            if space in (each, SPACES["generic"]):
                self.grain[each] = min(self.grain[each], size)

    def encode(self) -> _Encoded:
        code = np.array([self._instruction(i) for i in self.kernel.code], _ENCODED)
        shared, global_ = (max(1, self.grain[SPACES[name]]) for name in ("shared", "global"))
        constants = np.array([(slot, size, bits) for (bits, size), slot in self.constants.items()], _CONSTANT)
        kernel = self.kernel
        dynamic_at = kernel.dynamic_at or align(kernel.shared, 16)
        sizes = np.array([align(self.at, 8), kernel.shared, dynamic_at, kernel.local, shared, global_], np.uint32)
        return _Encoded(code, np.array(self.operands or [(0, 4, 0)], _OPERAND), constants, self.special, sizes)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class Program:
    """One entry of a module, ready to run."""

    def __init__(self, module: Module, name: str, symbols: dict[str, int]) -> None:
        self.module = module
        self.kernel = module.kernel(name, symbols)
        encoded = _Encoder(self.kernel).encode()
        self._handle = library().ptxsim_program(
            _pointer(encoded.code), len(encoded.code), _pointer(encoded.operands), len(encoded.operands),
            _pointer(encoded.constants), len(encoded.constants), _pointer(encoded.special), len(encoded.special),
            _pointer(encoded.sizes),
        )  # fmt: skip

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            library().ptxsim_free(handle)

    def launch(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: bytes, memory: list[Memory], shared: int,
        options: Options,
    ) -> Report:  # fmt: skip
        """Runs the entry over `grid` blocks of `block` threads, with `shared` bytes of dynamic shared memory."""
        grid, block = _three(grid), _three(block)
        ranges = np.concatenate([m.ranges() for m in memory])
        ranges = ranges[np.argsort(ranges["address"])]
        counters = np.zeros(len(self.kernel.code), COUNTERS)
        found = (RawFinding * _FINDINGS)()
        count = library().ptxsim_launch(
            ctypes.c_void_p(self._handle), ctypes.byref(options.raw()), _Size(*grid),
            _Size(*block), ctypes.c_uint32(shared), arguments, len(arguments), _pointer(ranges),
            len(ranges), _pointer(counters), found, _FINDINGS,
        )  # fmt: skip
        return self._report(found[:count], counters, f"{self.kernel.name}<<<{grid}, {block}, {shared}>>>")

    def _report(self, found: list[RawFinding], counters: np.ndarray, launch: str) -> Report:
        code, files = self.kernel.code, self.module.files
        findings = [
            Finding(
                KINDS[raw.kind], self.kernel.name, code[raw.instruction].opcode, code[raw.instruction].line,
                source_name(files, code[raw.instruction].source), tuple(raw.block), raw.thread, raw.count,
                raw.text.decode(),
            )
            for raw in found
        ]  # fmt: skip
        rows = [
            Row(self.kernel.name, at.opcode, at.line, source_name(files, at.source), *(int(n) for n in row))
            for at, row in zip(code, counters, strict=True)
        ]
        return Report(findings, rows, [launch])


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
