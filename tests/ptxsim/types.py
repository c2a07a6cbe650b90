"""What PTX operands are, and how wide its types."""

from dataclasses import dataclass

SPECIAL_NAMES = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid", "%warpid", "%nwarpid", "%lanemask_lt", "%lanemask_le", "%lanemask_eq", "%lanemask_ge", "%lanemask_gt",
    "%smid", "%dynamic_smem_size",
)  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A register: where it starts in a lane's register bytes, and 4 or 8 bytes (sub-words and predicates take 4)."""

    at: int
    size: int


@dataclass(frozen=True)
class Special:
    """A special register, by its position in SPECIAL_NAMES; the engine fills it in."""

    index: int
    size: int = 4


@dataclass(frozen=True)
class Immediate:
    """A number, as bits."""

    bits: int
    size: int


@dataclass(frozen=True)
class Address:
    """[base + offset]; `space` is where a named base lies, or '' to go by the opcode. A 32-bit base or none."""

    base: Register | None
    offset: int
    space: str = ""


class WideAddress(Address):
    """An address whose base is a 64-bit register."""


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}; also the two results a|b."""

    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Label:
    """`_`, a result that is not wanted."""

    name: str


Operand = Register | Special | Immediate | Address | Vector | Label
SPECIAL = {name: Special(index) for index, name in enumerate(SPECIAL_NAMES)}


def width(kind: str) -> int:
    """Bytes of the type 'b32', 'f64', 's8' ..."""
    return int(kind.lstrip(".bsuf")) // 8


def align(at: int, to: int) -> int:
    return -(-at // to) * to
