"""Bundles for the trt engine's tests: real graphs, and engines that are but names (fake_gpu.py runs the graphs)."""

from pathlib import Path

import numpy as np
from bundle_fixture import graphs, source_of
from safetensors.numpy import load_file, save_file
from student_fixture import small_config

from cfrt.bundle import MANIFEST, TENSORS, Bundle, Manifest, Plan, Verification, entries
from cfrt.config import ModelConfig
from cfrt.engines import Spec
from export.build import outside

BUILDER = "tensorrt_rtx 1.7.1.116"
TARGET = "sm89"


def gpu_config(**changes: object) -> ModelConfig:
    """Two layers of two heads of 64, 4 tokens a frame, in a ring that goes round, and past its sinks' trained distance,
    within a few units."""
    sizes = {"width": 128, "ffn": 96, "latent_grid": (4, 4), "window": 3, "sinks": 1, "trained_frames": 4}
    return small_config(**{**sizes, "first_steps": None, **changes})


def make_bundle(folder: Path, config: ModelConfig, precision: str = "bf16", **changes: object) -> Bundle:
    """A bundle of random weights. changes: fields of its manifest; extra tensors as `tensors`."""
    source = source_of(config)
    segments, made = graphs(source, precision)
    for kind in ("segments", "engines"):
        (folder / kind).mkdir(parents=True)
    plans = [Plan(segment=s.name, target=TARGET, builder=BUILDER, file=f"engines/{s.name}.engine") for s in segments]
    for segment, plan in zip(segments, plans, strict=True):
        (folder / segment.onnx).write_bytes(made[segment.name].SerializeToString())
        (folder / plan.file).write_bytes(b"vtrt" + segment.name.encode())
    save_file(outside(source, precision) | changes.pop("tensors", {}), folder / TENSORS)
    fields = {
        "config": config,
        "precision": precision,
        "decoder": "tiny",
        "segments": segments,
        "files": entries(folder, [TENSORS, *(s.onnx for s in segments), *(plan.file for plan in plans)]),
        "tools": {},
        "verification": Verification(level="segments", units=0, errors={}, limits={}, seconds=0),
        "plans": tuple(plans),
    }
    (folder / MANIFEST).write_text(Manifest(**{**fields, **changes}).to_json())
    return Bundle.open(folder)


def spec_of(bundle: Bundle, **changes: object) -> Spec:
    weights = load_file(bundle.folder / TENSORS)
    return Spec(**{"config": bundle.manifest.config, "weights": weights, "seed": 3, "bundle": bundle, **changes})


def rows_of(config: ModelConfig, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(config.text.length, config.text.width)).astype(np.float32)
