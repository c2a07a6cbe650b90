"""What a TensorRT-RTX engine says about itself, read from its bytes: `read`. No GPU, no TensorRT.

An engine starts with a header and a record of each input and output; further on it holds its plan as text, the main
graphs first and then the body of each fused kernel. NVIDIA documents none of it, so that everything here is a check and
a report, nothing that running depends on; what is not found, or has become another, is `None`, never a guess. Written
for 1.7.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"vtrt"
SECTION = b"header {\n"
"""How a graph's text starts."""
HEADER = 32
"""Bytes read of the header: magic, the size of the whole at 16, the version at 24."""

TYPES = {"float": "fp32", "half": "fp16", "bf16": "bf16", "fp8_e4m3": "fp8", "int8": "int8"}
"""What the plan calls the types that matter here."""

CODES = {0: "fp32", 1: "fp16", 2: "int8", 3: "int32", 4: "bool", 5: "uint8", 6: "fp8", 7: "bf16", 8: "int64"}
"""TensorRT's numbers for types, in the records of inputs and outputs."""

_STRING, _INT, _LIST = rb"\x01\x80\x0c\x80\x01\x00", rb"\x07\x80\x01\x00", rb"\x01\x80\x09\x80\x01\x00"
RECORD = re.compile(
    _STRING + rb"(?P<length>.{8})(?P<name>[ -~]+?)\x1c\x80\x01\x00\x03\x80\x01\x00.\x0d\x80\x01\x00"
    + _INT + rb"(?P<type>.{4}).{60,200}?Y\x80\x01\x00"
    + _INT + rb"(?P<rank>.{4})" + _LIST + rb".{8}(?P<shape>(?:.{8}){0,8}?)..\x15\x80\x01\x00"
    + _INT + rb".{4}\x28\x80\x01\x00" + _INT + rb"(?P<output>.{4})",
    re.DOTALL,
)  # fmt: skip
"""An input or output: its name, type, extents, and whether it is an output."""


@dataclass(frozen=True)
class Port:
    """An input or output, its type as bundles call it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in an engine."""

    version: str
    """Of the TensorRT that built it: "1.7.1.116"."""
    targets: tuple[str, ...]
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    device_memory: int
    """Bytes of scratch that a context needs."""
    stream_capturable: bool
    attentions: int
    """Attentions run by one fused kernel each."""
    fused_gelu: int
    """Products whose GELU is in the same kernel."""
    rounded_gelu: int
    """GELUs in one kernel with the rounding to 8 bits of the product that follows."""
    scaled_gelu: int
    """GELUs in one kernel with the scales and the bias of an 8-bit product, which its own kernel does not apply."""
    gemms: dict[str, tuple[str, ...]]
    """Types of the two factors of each matrix product, by the name of its layer."""

    def gemm_types(self) -> dict[str, int]:
        """Matrix products by the type of their factors."""
        return dict(Counter(" x ".join(dict.fromkeys(types)) for types in self.gemms.values()))

    def summary(self) -> dict[str, Any]:
        """For a manifest: plain data."""
        return {
            "version": self.version,
            "targets": list(self.targets),
            "device_memory": self.device_memory,
            "stream_capturable": self.stream_capturable,
            "fused_attentions": self.attentions,
            "fused_gelu": self.fused_gelu,
            "rounded_gelu": self.rounded_gelu,
            "scaled_gelu": self.scaled_gelu,
            "gemms": self.gemm_types(),
        }


def read(path: Path) -> Report | None:
    """The plan in an engine file; None where there is none that can be read."""
    blob = path.read_bytes()
    version = _version(blob)
    sections = list(_sections(blob))
    mains = [text for text in sections if _targets(text)]
    if version is None or not mains:
        return None
    main = "".join(mains)
    ports = list(_ports(blob[: blob.find(SECTION)]))
    return Report(
        version=version,
        targets=_targets(mains[0]),
        inputs={name: port for name, port, output in ports if not output},
        outputs={name: port for name, port, output in ports if output},
        device_memory=sum(int(size) for size in re.findall(r"name=devmem\w* size=(\d+)", main)),
        stream_capturable=all("stream_capturable=1" in text for text in mains),
        attentions=len(re.findall(r"function=\{ name=_gemm_mha", main)),
        fused_gelu=len(re.findall(r"runtime_fusion=\{ name=__myl_\w*Fc\w*(?:Tanh|Erf|Gelu)", main)),
        rounded_gelu=len(re.findall(r"\bfunction=\{ name=__myl_\w*(?:Tanh|Erf|Gelu)\w*Cast\b", main)),
        scaled_gelu=len(re.findall(r"\bfunction=\{ name=__myl_MulAdd\w*(?:Tanh|Erf|Gelu)(?!\w*Cast)", main)),
        gemms=dict(gemm for text in sections for gemm in _gemms(text)),
    )


def _version(blob: bytes) -> str | None:
    """None for what is no engine, or not the whole of one."""
    if blob[:4] != MAGIC or len(blob) < HEADER or int.from_bytes(blob[16:24], "little") > len(blob):
        return None
    return ".".join(str(number) for number in blob[24:28])


def _sections(blob: bytes) -> Iterator[str]:
    """Every graph's text, which a zero byte ends."""
    at = blob.find(SECTION)
    while at >= 0:
        end = blob.find(b"\0", at)
        end = len(blob) if end < 0 else end
        yield blob[at:end].decode("latin-1")
        at = blob.find(SECTION, end)


def _targets(section: str) -> tuple[str, ...]:
    """Empty for the body of a fused kernel, which is for any GPU."""
    found = re.search(r"accelerators=\{((?:sm\d+ ?)+)\}", section)
    return tuple(found[1].split()) if found else ()


def _ports(head: bytes) -> Iterator[tuple[str, Port, bool]]:
    """Name, port, and whether it is an output."""
    for found in RECORD.finditer(head):
        name, shape = found["name"].decode(), found["shape"]
        if int.from_bytes(found["length"], "little") != len(name):
            continue
        extents = struct.unpack(f"<{len(shape) // 8}q", shape)
        if int.from_bytes(found["rank"], "little") == len(extents):
            code = int.from_bytes(found["type"], "little")
            yield name, Port(extents, CODES.get(code, str(code))), found["output"] != bytes(4)


def _tensors(section: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    pattern = r'^  (?:sub_)?tensor=\{.*?dims=\{ ([\d ]*)\}.*?name="([^"]*)".*?type=(\w+) \}'
    for dims, name, kind in re.findall(pattern, section, re.MULTILINE):
        yield name, tuple(map(int, dims.split())), TYPES.get(kind, kind)


def _gemms(section: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Behind the name of a product that took its scales in, TensorRT puts a number."""
    types = {name: kind for name, _, kind in _tensors(section)}
    pattern = r'fully_connected=\{ name="([^"]*)" output=\{[^}]*\} input=\{"([^"]*)" "([^"]*)"'
    for layer, a, b in re.findall(pattern, section):
        yield re.sub(r"_U\d+$", "", layer), (types.get(a, "?"), types.get(b, "?"))
