"""A PTX text that can be launched: its variables in memory, its entries made ready when first used."""

from collections.abc import Sequence

import numpy as np

from . import parser
from .engine import Program
from .memory import Buffer, Memory
from .report import Report
from .schedule import Options

Argument = Buffer | np.generic | bytes


class Module:
    """`text` is PTX. Entries are named as there (mangled); `entry` finds one by a part of its name."""

    def __init__(self, text: str) -> None:
        self.parsed = parser.Module(text)
        self.memory = Memory()
        self.symbols: dict[str, int] = {}
        self._programs: dict[str, Program] = {}
        for variable in self.parsed.variables.values():
            if variable.space in ("global", "const"):
                values = np.zeros(max(variable.size, 1), np.uint8)
                values[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
                self.symbols[variable.name] = self.memory.put(values).address

    @property
    def entries(self) -> list[str]:
        return self.parsed.entries

    def entry(self, part: str) -> str:
        """The one entry whose name contains `part`."""
        found = [name for name in self.entries if part in name]
        if len(found) != 1:
            raise KeyError(f"expected one entry with {part!r} in its name, got {found} of {self.entries}")
        return found[0]

    def program(self, name: str) -> Program:
        if name not in self._programs:
            self._programs[name] = Program(self.parsed, name, self.symbols)
        return self._programs[name]

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Argument], memory: Memory,
        shared: int = 0, options: Options = Options(),  # noqa: B008 - frozen
    ) -> Report:  # fmt: skip
        """Runs entry `name`; `arguments` are buffers, numpy scalars of the parameter's type, or a struct's bytes."""
        program = self.program(name)
        packed = pack(program.kernel.parameters, [_bytes(a) for a in arguments])
        return program.launch(grid, block, packed, [memory, self.memory], shared, options)


def _bytes(argument: Argument) -> bytes:
    if isinstance(argument, Buffer):
        return np.uint64(argument.address).tobytes()
    return argument if isinstance(argument, bytes) else np.asarray(argument).tobytes()


def pack(parameters: dict[str, tuple[int, int]], values: Sequence[bytes]) -> bytes:
    """Parameter memory. Each value must have its parameter's size."""
    places = sorted(parameters.values())
    sizes, given = [size for _, size in places], [len(v) for v in values]
    if sizes != given:
        raise TypeError(f"expected arguments of {sizes} bytes, got {given}")
    packed = bytearray(max((offset + size for offset, size in places), default=0))
    for (offset, size), value in zip(places, values, strict=True):
        packed[offset : offset + size] = value
    return bytes(packed)
