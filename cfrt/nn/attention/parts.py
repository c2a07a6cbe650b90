"""Attention under a block mask without the mask: a call for each part of the queries."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import Span
from . import attention


class Part(NamedTuple):
    """Queries that see the same keys, and which: a row of a block mask as ranges."""

    queries: Span
    keys: tuple[Span, ...]
    """In the order in which they are read, sinks first."""
    sink_tokens: int = 0
    """How many of the keys read are looked at from the second position."""


def attention_by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[Part],
    *,
    q_sink: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """`attention` under a block mask without the mask: one call for each part, over the keys that it sees. The parts
    cover the queries in order. What a mask would hide is not computed; the keys of a part are copied together.

    Everything is split once and put together again: the gradient of a slice is as long as what it was cut from."""
    cuts = sorted({0, k.shape[1], *(bound for part in parts for span in part.keys for bound in span)})
    piece = {bound: index for index, bound in enumerate(cuts)}
    pieces = [x.split([stop - start for start, stop in pairwise(cuts)], dim=1) for x in (k, v)]
    lengths = [stop - start for (start, stop), *_ in parts]
    near = q.split(lengths, dim=1)
    far = [None] * len(parts) if q_sink is None else q_sink.split(lengths, dim=1)
    answers = []
    for own, own_far, (_, spans, sinks) in zip(near, far, parts, strict=True):
        seen = [index for start, stop in spans for index in range(piece[start], piece[stop])]
        keys, values = (torch.cat([x[index] for index in seen], dim=1) for x in pieces)
        own_far = own_far if sinks else None
        answers.append(attention(own, keys, values, q_sink=own_far, sink_tokens=sinks, backend=backend))
    return torch.cat(answers, dim=1)
