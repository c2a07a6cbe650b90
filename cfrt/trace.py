"""Where the time of a stream goes: one hook, called with the name of every stage, gives what is entered around it.

    trace = Trace()
    with Stream(prompt, trace=trace) as stream:
        ...
    trace.save("out.json")                                    # opens in https://ui.perfetto.dev or chrome://tracing

The stages are `noise`, `denoise 0`, `denoise 1`, ..., `decode`, `commit`, `recache` and `wait`, within `unit`. A commit
that is fused has no stage of its own: it is a part of the next unit's `denoise 0`. On a GPU a stage ends when its work
is queued, so that time is found in `decode`, which waits for pixels; what the GPU does is Nsight's to show, by the NVTX
ranges of the same names that the torch engine makes there.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType

from .errors import CfrtError

Hook = Callable[[str], AbstractContextManager[object]]
"""Gives what is entered around the stage of that name, in the thread that does it."""

LONGEST = 1_000_000
"""Stages that a trace keeps, the last ones: 200 MB in memory, hours of a paced stream."""

_NOTHING: AbstractContextManager[object] = nullcontext()


def off(stage: str) -> AbstractContextManager[object]:
    """The hook that does nothing: 0.1 us a stage."""
    return _NOTHING


def both(first: Hook, second: Hook) -> Hook:
    """Two hooks at once."""

    def hook(stage: str) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(first(stage))
        stack.enter_context(second(stage))
        return stack

    return hook


class Trace:
    """A hook that keeps begin and end of every stage, at most `longest` of them."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._spans: deque[tuple[str, str, int, int, int]] = deque(maxlen=longest)
        self._born = perf_counter_ns()

    def __call__(self, stage: str) -> AbstractContextManager[object]:
        return _Span(self, stage)

    def add(self, stage: str, begin: int, end: int) -> None:
        """A stage of this thread, in nanoseconds of `perf_counter_ns`."""
        thread = threading.current_thread()
        self._spans.append((stage, thread.name, thread.ident or 0, begin - self._born, end - begin))

    def __len__(self) -> int:
        return len(self._spans)

    def totals(self) -> dict[str, tuple[int, float]]:
        """How often each stage came, and its seconds in all."""
        found: dict[str, tuple[int, float]] = {}
        for stage, _, _, _, length in self._spans.copy():
            count, seconds = found.get(stage, (0, 0.0))
            found[stage] = (count + 1, seconds + length / 1e9)
        return found

    def events(self) -> list[dict[str, object]]:
        """In Chrome's trace event format: complete events with times in microseconds, and the names of the threads."""
        spans = self._spans.copy()
        process = os.getpid()
        names = {thread: name for _, name, thread, _, _ in spans}
        return [
            *(
                {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}}
                for thread, name in names.items()
            ),
            *(
                {"ph": "X", "name": stage, "pid": process, "tid": thread, "ts": begin / 1000, "dur": length / 1000}
                for stage, _, thread, begin, length in spans
            ),
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the events as JSON. CfrtError where that cannot be."""
        try:
            Path(path).write_text(json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}), encoding="utf-8")
        except OSError as error:
            raise CfrtError(f"cannot write the trace to {os.fspath(path)}: {error.strerror or error}") from error


class _Span:
    __slots__ = ("_begin", "_stage", "_trace")

    def __init__(self, trace: Trace, stage: str) -> None:
        self._trace, self._stage = trace, stage

    def __enter__(self) -> None:
        self._begin = perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._trace.add(self._stage, self._begin, perf_counter_ns())
