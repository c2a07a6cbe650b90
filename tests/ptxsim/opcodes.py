"""From a PTX mnemonic to the engine's handler: its name, its integer arguments, its operands in the handler's order.

Most handlers carry the mnemonic itself, without what changes nothing here (cache hints, `.rn` where it is the default,
`.aligned`). The rest, where one handler serves a family, is written out below.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .types import Address, Immediate, Label, Operand, Register, Vector, width

SPACES = {"generic": 0, "global": 1, "shared": 2, "param": 3, "local": 4, "const": 1}
_HINTS = re.compile(
    r"\.(volatile|relaxed|acquire|release|acq_rel|weak|nc|ca|cg|cs|lu|cv|wb|wt|cta|gpu|sys|cluster|L[12]::\w+|unified)(?=\.|$)"
)


@dataclass(frozen=True)
class Bound:
    """An instruction as the engine takes it. `access` is (space, bytes) of a load, store or copy, else None."""

    handler: str
    operands: tuple[Operand, ...]
    arguments: tuple[int, ...] = ()
    access: tuple[int, int] | None = None
    uses_carry: bool = False


Rule = Callable[[str, tuple[Operand, ...]], Bound]


def bind(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    """Which handler runs `opcode`. The handler's name need not exist: engine.py says so, with the line."""
    rule = _RULES.get(opcode.split(".")[0], _plain)
    return rule(opcode, operands)


def _flat(operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
    return tuple(each for o in operands for each in (o.items if isinstance(o, Vector) else (o,)))


def _space(opcode: str, address: Operand) -> int:
    named = re.search(r"\.(global|shared|param|local|const)\b", opcode)
    if isinstance(address, Address) and address.space:
        return SPACES[address.space]  # a parameter of an inlined function lies in local memory
    return SPACES[named[1] if named else "generic"]


def _plain(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    name = re.sub(r"^((?:add|sub|mul|fma|div|rcp|sqrt)\.)(?:rn\.)", r"\1", opcode)
    name = re.sub(r"^(mad)\.(?:rn)\.(.*f\d+)$", r"fma.\2", name)
    return Bound(name, _flat(operands), uses_carry=bool(re.match(r"(add|sub|mad)(c\.|\.(lo\.|hi\.)?cc)", name)))


def _mov(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    for handler, vector in (("mov.pack", operands[1]), ("mov.unpack", operands[0])):
        if isinstance(vector, Vector):
            bits = 8 * width(opcode.split(".")[-1]) // len(vector.items)
            return Bound(handler, _flat(operands), (len(vector.items), bits))
    return Bound(opcode, operands)


def _load(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    kind = opcode.split(".")[-1]
    items = operands[0].items if isinstance(operands[0], Vector) else (operands[0],)
    space, size = _space(opcode, operands[1]), width(kind)
    arguments = (space, size, int(kind[0] == "s"), len(items))
    return Bound("ld", (*items, operands[1]), arguments, (space, size * len(items)))


def _store(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    kind = opcode.split(".")[-1]
    items = operands[1].items if isinstance(operands[1], Vector) else (operands[1],)
    space, size = _space(opcode, operands[0]), width(kind)
    return Bound("st", (operands[0], *items), (space, size, 0, len(items)), (space, size * len(items)))


def _atomic(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    base, *parts = _HINTS.sub("", opcode).split(".")
    operation = ".".join(p for p in parts if p not in SPACES)
    results = int(base == "atom")
    space = _space(opcode, operands[results])
    return Bound(f"atom.{operation}", operands, (space, results), (space, width(opcode.split(".")[-1])))


def _copy(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    if ".commit_group" in opcode:
        return Bound("cp.async.commit_group", ())
    if ".wait_all" in opcode:
        return Bound("cp.async.wait_group", (), (-1,))
    if ".wait_group" in opcode and isinstance(operands[0], Immediate):
        return Bound("cp.async.wait_group", (), (operands[0].bits,))
    if re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\w+)?", opcode) and len(operands) in (3, 4):
        bytes_ = operands[2].bits if isinstance(operands[2], Immediate) else 4
        return Bound("cp.async", operands, (len(operands) - 3,), (SPACES["shared"], bytes_))
    return Bound(opcode, operands)


def _cvta(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    return Bound("cvta", operands, (_space(opcode, operands[1]), int(".to." in opcode)))


def _ldmatrix(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    found = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared(?:::cta)?\.b16", opcode)
    if found is None:
        return Bound(opcode, operands)
    return Bound("ldmatrix", _flat(operands), (int(found[1]), int(found[2] is not None)), (SPACES["shared"], 16))


def _mma(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    items = _flat(operands)
    results = len(operands[0].items) if isinstance(operands[0], Vector) else 1
    name = opcode.replace(".sync.aligned", "").replace(".kind::f8f6f4", "").replace(".satfinite", ".satfinite")
    return Bound(name, items, (results,))


def _shfl(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    found = re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", opcode)
    if found is None:
        return Bound(opcode, operands)
    results = 2 if isinstance(operands[0], Vector) else 1
    return Bound("shfl.sync", _flat(operands), (("up", "down", "bfly", "idx").index(found[1]), results))


def _vote(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    found = re.fullmatch(r"vote\.sync\.(ballot|any|all|uni)\.(b32|pred)", opcode)
    if found is None:
        return Bound(opcode, operands)
    return Bound("vote.sync", operands, (("ballot", "any", "all", "uni").index(found[1]),))


def _bar(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    name = opcode.replace("barrier.", "bar.").replace(".aligned", "").replace(".cta", "")
    if name in ("bar.sync", "bar.arrive"):
        return Bound("bar", operands, (int(name == "bar.arrive"),))
    return Bound(name, operands)


def _setp(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    return Bound(opcode, _flat(operands), (2 if isinstance(operands[0], Vector) else 1,))


def _nothing(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    return Bound("nop", ())


def _branch(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    return Bound("brx.idx" if opcode.startswith("brx.idx") else "bra", operands)


def _return(opcode: str, operands: tuple[Operand, ...]) -> Bound:
    return Bound("ret", ())


_RULES: dict[str, Rule] = {
    "mov": _mov,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy,
    "cvta": _cvta,
    "ldmatrix": _ldmatrix,
    "mma": _mma,
    "shfl": _shfl,
    "vote": _vote,
    "bar": _bar,
    "barrier": _bar,
    "setp": _setp,
    "bra": _branch,
    "brx": _branch,
    "ret": _return,
    "exit": _return,
    **dict.fromkeys(
        ("membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol"), _nothing
    ),
}

__all__ = ["SPACES", "Bound", "Label", "Register", "bind"]
