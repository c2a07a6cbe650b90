"""The runtimes side by side: each a call that does the timed work once and gives x0 as an array.

Our engines (`native`, `torch`, and `onnx` on an exported bundle) keep a ring: the past is committed once and read in
place. The others have no state, so past keys and values are inputs and the unit's own are outputs (`functional.Step`,
through ONNX). They are given the best that form allows: inputs that are never copied by the host, in the layout
[1, H, P, D] that attention wants, bf16 where the runtime computes in bf16, values from fp64; and for the student a past
that the host overwrites in place, one unit at a time, since attention does not ask for order.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfrt import flow
from cfrt.bundle import Bundle
from cfrt.engines import Engine, Latents, Spec, choose
from cfrt.weights import load_model

from . import functional
from .workload import PAST, STUDENT, Workload, noise

CONTENDERS = (
    ("native", "fp32"),
    ("native", "bf16"),
    ("native", "int8"),
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
)
"""Engine, precision. `int8` is that of weights, and of activations a token (ours) or a tensor (ONNX Runtime)."""

COMPILED = (("torch.compile", "fp32"), ("torch.compile", "bf16"))
"""By flag: compiling takes up to a minute for each."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""One run of a graph: the inputs that are new in every pass, in order; all outputs, in order."""


def build(engine: str, precision: str, work: Workload, threads: int) -> Callable[[], np.ndarray]:
    """The contender, everything loaded, the past in place."""
    torch.set_num_threads(threads)
    if engine in ("native", "torch", "onnx"):
        return Ringed(engine, precision, work, threads)
    past = functional.past(work)
    if engine == "torch.compile":
        return Explicit(work, past, _compiled(work, past, DTYPES[precision]), None)
    open_graph, graphs = GRAPHS[engine], functional.export(work)
    step = open_graph(graphs.step, past, precision, threads, fixed=graphs.decode is None)
    decode = None if graphs.decode is None else open_graph(graphs.decode, [], precision, threads, fixed=True)
    return Explicit(work, past, step, decode)


def prepare(work: Workload, engines: Sequence[str]) -> None:
    """Makes what `work.folder` keeps for these engines."""
    assert work.truth.gop > 0
    if {"onnxruntime", "openvino"} & set(engines):
        graphs = functional.export(work)
        for graph in graphs if "onnxruntime" in engines else ():
            if graph is not None:
                _quantised(graph)


def exported(folder: Path) -> Path:
    """The embedded student as a bundle in fp32, in this folder."""
    from export.onnx import Options, plan

    out = folder / "bundle"
    if not out.exists():
        plan(Options(model="tiny", out=out), "fp32").run()
    return out


class Ringed:
    """An engine of cfrt. For the student a call is the next unit, its predecessor's commit fused where the engine does
    that; for the sizes it is the same pass again, which leaves nothing behind."""

    def __init__(self, name: str, precision: str, work: Workload, threads: int) -> None:
        spec = Spec(config=work.config, weights=work.weights, precision=precision, threads=threads)
        if name == "onnx":
            bundle = exported(work.folder)
            spec = replace(spec, weights=load_model(bundle)[1], bundle=Bundle.open(bundle))
        self._engine: Engine = choose(name, spec)[0]()
        self._engine.prepare(spec)
        self._work, self._unit, engine = work, work.unit, self._engine
        engine.set_text(work.rows)
        for unit in range(work.unit):
            self._owed: Latents | None = engine.noise(unit, PAST)
            if not (work.size == STUDENT and engine.fuses and unit == work.unit - 1):
                engine.commit(self._owed, unit)
                self._owed = None
        if work.size == STUDENT:
            engine.decode(engine.noise(work.unit - 1, PAST))

    def __call__(self) -> np.ndarray:
        engine, unit, solver = self._engine, self._unit, self._work.config.solver
        x = engine.noise(unit, 0)
        for step, (s, s_next) in enumerate(self._work.levels, 1):
            owed, self._owed = self._owed, None
            x0 = engine.denoise(x, flow.TIME_SCALE * s, unit, commit=owed)
            x = flow.onward(solver, x, x0, s, s_next, partial(engine.noise, unit, step))
        if self._work.size == STUDENT:
            engine.decode(x)
            self._unit += 1
            if engine.fuses:
                self._owed = x
            else:
                engine.commit(x, unit)
        return x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)


class Explicit:
    """A graph without state. For the student a call is the next unit, as the ring engines make it, the clean pass that
    makes its keys and values included; the host keeps the last W - F frames of them."""

    def __init__(self, work: Workload, past: list[np.ndarray], step: Run, decode: Run | None) -> None:
        self._work, self._past, self._step, self._decode = work, past, step, decode
        self._unit, self._slot = work.unit, 0
        self._before = noise(work.config, work.unit - 1, PAST)

    def __call__(self) -> np.ndarray:
        config, unit = self._work.config, self._unit
        x = noise(config, unit, 0)
        for step, (s, s_next) in enumerate(self._work.levels, 1):
            x0 = flow.x0_from_v(x, self._pass(x, s)[0], np.float32(s))
            x = flow.onward(config.solver, x, x0, s, s_next, partial(noise, config, unit, step))
        if self._decode is not None:
            self._decode([x, self._before[:, -1]])[0].astype(np.uint8)
            self._remember(self._pass(x, 0.0)[1:])
            self._before, self._unit = x, unit + 1
        return x.astype(np.float64)

    def _pass(self, x: np.ndarray, s: float) -> Sequence[np.ndarray]:
        config = self._work.config
        fresh = functional.time_features(config, s), functional.turns(config, self._unit)
        return self._step([x, *(array.astype(np.float32) for array in fresh)])

    def _remember(self, own: Sequence[np.ndarray]) -> None:
        """The unit's keys and values in the place of the oldest."""
        tokens = self._work.config.unit * self._work.config.frame_tokens
        place = slice(self._slot * tokens, (self._slot + 1) * tokens)
        for layer in range(self._work.config.depth):
            for part in range(2):
                self._past[4 * layer + part][:, :, place] = own[2 * layer + part]
        self._slot = (self._slot + 1) % (self._past[0].shape[2] // tokens)


# ------------------------------------------------------------------------------------------------------------ runtimes


def _compiled(work: Workload, past: Sequence[np.ndarray], dtype: torch.dtype) -> Run:
    step = torch.compile(functional.Step(work.dit().to(dtype)))
    kept = [torch.from_numpy(array).to(dtype) for array in past]

    @torch.no_grad()
    def run(fresh: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [x.float().numpy() for x in step(*(torch.from_numpy(array).to(dtype) for array in fresh), *kept)]

    return run


def _onnxruntime(graph: Path, past: Sequence[np.ndarray], precision: str, threads: int, *, fixed: bool) -> Run:
    """fp32, or int8 by its dynamic quantisation: weights per channel, activations per tensor when they are there;
    convolutions stay in fp32, as its int8 ones take longer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_quantised(graph) if precision == "int8" else graph, options)
    names = [each.name for each in session.get_inputs()]
    return lambda fresh: session.run(None, dict(zip(names, [*fresh, *past], strict=True)))


def _quantised(graph: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    small = graph.with_suffix(".int8.onnx")
    if not small.exists():
        logging.getLogger().setLevel(logging.ERROR)  # it recommends, for every graph, to have it preprocessed
        quantize_dynamic(graph, small, per_channel=True, op_types_to_quantize=["MatMul"])
    return small


def _openvino(graph: Path, past: Sequence[np.ndarray], precision: str, threads: int, *, fixed: bool) -> Run:
    """fp32 or bf16 by its hint, tuned for latency. A past that does not change is kept in the runtime's precision."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    model = core.read_model(graph)
    first, narrow = len(model.inputs) - len(past), precision == "bf16" and fixed
    if narrow and past:
        steps = PrePostProcessor(model)
        for i in range(len(past)):
            steps.input(first + i).tensor().set_element_type(openvino.Type.bf16)
        model = steps.build()
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    kept = [_bf16(array) if narrow else openvino.Tensor(array, shared_memory=True) for array in past]
    for i, tensor in enumerate(kept):
        request.set_input_tensor(first + i, tensor)

    def run(fresh: Sequence[np.ndarray]) -> list[np.ndarray]:
        for i, array in enumerate(fresh):
            request.set_input_tensor(i, openvino.Tensor(np.ascontiguousarray(array), shared_memory=True))
        request.infer()
        return [tensor.data for tensor in request.output_tensors]

    return run


def _bf16(array: np.ndarray) -> Any:
    import openvino

    tensor = openvino.Tensor(openvino.Type.bf16, list(array.shape))
    bits = torch.from_numpy(array).bfloat16().view(torch.int16).numpy()
    tensor.data.view(np.int16)[...] = bits
    return tensor


GRAPHS: dict[str, Callable[..., Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
