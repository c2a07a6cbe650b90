"""What a TensorRT-RTX engine says about itself, read from its bytes: `read`. No GPU, no TensorRT.

An engine holds its plan as text, the main graphs first and then the body of each fused kernel. NVIDIA documents none of
it, so that everything here is a check and a report, nothing that running depends on; a text that is not found, or has
become another, is `None`, never a guess. Written for 1.7.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"vtrt"
HEADER = 32
"""Bytes read of the header: magic, the size of the whole at 16, the version at 24."""

TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3", "int8": "int8"}
"""What the plan calls the types that matter here."""


@dataclass(frozen=True)
class Port:
    """An input or output."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Plan:
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
            "gemms": self.gemm_types(),
        }


def read(path: Path) -> Plan | None:
    """The plan in an engine file; None where there is none that can be read."""
    blob = path.read_bytes()
    version = _version(blob)
    sections = list(_sections(blob))
    mains = [text for text in sections if _targets(text)]
    if version is None or not mains:
        return None
    main = "".join(mains)
    return Plan(
        version=version,
        targets=_targets(mains[0]),
        inputs=_ports(main, "inputs"),
        outputs=_ports(main, "outputs"),
        device_memory=sum(int(size) for size in re.findall(r"name=devmem\w* size=(\d+)", main)),
        stream_capturable=all("stream_capturable=1" in text for text in mains),
        attentions=len(re.findall(r"function=\{ name=_gemm_mha", main)),
        fused_gelu=len(re.findall(r"runtime_fusion=\{ name=__myl_\w*Fc\w*(?:Tanh|Erf|Gelu)", main)),
        gemms=dict(gemm for text in sections for gemm in _gemms(text)),
    )


def _version(blob: bytes) -> str | None:
    """None for what is no engine, or not the whole of one."""
    if blob[:4] != MAGIC or len(blob) < HEADER or int.from_bytes(blob[16:24], "little") > len(blob):
        return None
    return ".".join(str(number) for number in blob[24:28])


def _sections(blob: bytes) -> Iterator[str]:
    """Every text that starts with a plan's header, up to the first zero byte."""
    at = blob.find(b"header {\n")
    while at >= 0:
        end = blob.find(b"\0", at)
        end = len(blob) if end < 0 else end
        yield blob[at:end].decode("latin-1")
        at = blob.find(b"header {\n", end)


def _targets(section: str) -> tuple[str, ...]:
    """Empty for the body of a fused kernel, which is for any GPU."""
    found = re.search(r"accelerators=\{((?:sm\d+ ?)+)\}", section)
    return tuple(found[1].split()) if found else ()


def _ports(main: str, side: str) -> dict[str, Port]:
    found = re.search(rf"^  {side}=\{{([^}}]*)\}}", main, re.MULTILINE)
    tensors = {name: Port(shape, dtype) for name, shape, dtype in _tensors(main)}
    names = re.findall(r'"([^"]*)"', found[1]) if found else []
    return {_plain(name): tensors[name] for name in names if name in tensors}


def _plain(name: str) -> str:
    """The graph's own name for a tensor: the plan numbers its versions."""
    return re.sub(r"\.\d+$", "", name)


def _tensors(section: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    pattern = r'^  (?:sub_)?tensor=\{.*?dims=\{ ([\d ]*)\}.*?name="([^"]*)".*?type=(\w+) \}'
    for dims, name, kind in re.findall(pattern, section, re.MULTILINE):
        yield name, tuple(map(int, dims.split())), TYPES.get(kind, kind)


def _gemms(section: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    types = {name: kind for name, _, kind in _tensors(section)}
    pattern = r'fully_connected=\{ name="([^"]*)" output=\{[^}]*\} input=\{"([^"]*)" "([^"]*)"'
    for layer, a, b in re.findall(pattern, section):
        yield layer, (types.get(a, "?"), types.get(b, "?"))
