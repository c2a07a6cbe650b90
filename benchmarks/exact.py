"""bf16 in numpy, and attention in fp64: what the CUDA kernels are compared with, here and on a GPU."""

import numpy as np

Array = np.ndarray


def to_bf16(x: Array) -> Array:
    """Bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def normal(seed: int, *shape: int) -> Array:
    """fp32 numbers that bf16 can hold."""
    return from_bf16(to_bf16(np.random.default_rng(seed).normal(size=shape)))


def formula(q: Array, k: Array, v: Array, q_sink: Array, sinks: int) -> Array:
    """softmax(q k^T / sqrt(D)) v in fp64, [N, H, D]; the first keys are looked at by q_sink."""
    q, k, v, q_sink = (x.astype(np.float64).transpose(1, 0, 2) for x in (q, k, v, q_sink))  # [H, N, D]
    scores = [a @ b.transpose(0, 2, 1) for a, b in ((q_sink, k[:, :sinks]), (q, k[:, sinks:]))]
    scores = np.concatenate(scores, axis=-1) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(1, 0, 2)
