"""The engine for RTX GPUs: a bundle's TensorRT engines, our CUDA kernels between them, no PyTorch.

The schedule is `segmented.py`'s, the one that the `onnx` engine runs on a CPU; the GPU's side of it is `trt_device.py`.
What is refused is refused before the GPU is touched.
"""

from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from typing import ClassVar

from _cfrt import cuda

from .. import hub
from ..bundle import Bundle, Plan
from ..errors import EngineError
from . import Spec, gpu
from .gpu import Gpu
from .rtx import Runtime
from .segmented import SegmentedEngine
from .trt_device import TrtDevice

EXPORT = "python -m export.trt"
NO_ENGINES = ("sm90", "sm100")
"""Data centre GPUs, which TensorRT-RTX leaves out."""


class TrtEngine(SegmentedEngine):
    """One stream. Latents are sums on the GPU (`gpu_latents.GpuLatents`)."""

    name: ClassVar[str] = "trt"
    warm: bool
    """Was all that TensorRT compiles at a first run on this machine there already?"""

    @classmethod
    def supported(cls, spec: Spec) -> str | None:
        if spec.bundle is None:
            return cls.refusal(spec)
        return _unfit(spec, spec.bundle) or _no_gpu(spec, spec.bundle)

    def _device(self, spec: Spec, bundle: Bundle) -> TrtDevice:
        reason = self.supported(spec)
        if reason is not None:
            raise EngineError(reason)
        self.precision = bundle.manifest.precision
        index = device_index(spec.device) or 0
        on = Gpu(index)
        plans = {plan.segment: plan for plan in bundle.manifest.plans if plan.target == on.capability}
        module, version = builder(next(iter(plans.values())))
        made_of = sorted(bundle.manifest.files[plan.file].sha256 for plan in plans.values())
        runtime = Runtime(module, hub.cache() / "engines" / runtime_cache(made_of, version, on.capability))
        device = TrtDevice(spec.config, spec.weights, on, runtime, cuda, seed=spec.seed)
        try:
            for segment in bundle.manifest.segments:
                device.load(segment, bundle.file(plans[segment.name].file))
            device.allocate()
            self.warm = runtime.warm
        except BaseException:
            device.close()
            raise
        return device


def _unfit(spec: Spec, bundle: Bundle) -> str | None:
    """What is wrong with the bundle or the wish, wherever it runs."""
    manifest, config = bundle.manifest, spec.config
    if not manifest.plans:
        return f"the bundle holds graphs and no engines: {EXPORT} builds them, also without a GPU"
    if not manifest.has("decoder"):
        return f"the bundle has no decoder, so that there would be no pixels: {EXPORT} --decoder adds one"
    if spec.prefix and not manifest.has("encoder"):
        return f"the bundle has no encoder, so no stream can start from a picture: {EXPORT} with a frame-wise model"
    if spec.precision not in ("auto", manifest.precision):
        return f"the bundle was exported in {manifest.precision}, not in {spec.precision!r}: export it once more"
    formats = {port.dtype for segment in manifest.segments for port in segment.outputs if port.name == "qkv"}
    if formats != {"bf16"}:
        return (
            f"the kernels between the engines take bf16, and these give {', '.join(formats)}: export the bundle again"
        )
    if device_index(spec.device) is None:
        return f"it runs on cuda, not on {spec.device!r}"
    if config.head_dim not in (64, 128):
        return f"its kernels are for heads of 64 or 128 numbers, not {config.head_dim}"
    return None


def _no_gpu(spec: Spec, bundle: Bundle) -> str | None:
    """What is missing on this machine: asked in the order in which it can be asked safely."""
    index, plans = device_index(spec.device) or 0, bundle.manifest.plans
    reason = gpu.refusal(index)
    if reason is not None:
        return reason
    here = gpu.capability(index)
    targets = sorted({plan.target for plan in plans})
    fitting = [plan for plan in plans if plan.target == here]
    if not fitting and here in NO_ENGINES:
        return f"this GPU is {here}, for which TensorRT-RTX builds none: engine 'torch' runs the model's weights on it"
    if not fitting:
        return f"the bundle's engines are for {', '.join(targets)} and this GPU is {here}: {EXPORT} --target {here}"
    absent = [s.name for s in bundle.manifest.segments if s.name not in {plan.segment for plan in fitting}]
    if absent:
        return f"the bundle has no engine of {', '.join(absent)} for {here}: {EXPORT} --target {here}"
    return _wrong_tool(fitting[0]) or cuda.refusal(index)


def _wrong_tool(plan: Plan) -> str | None:
    module, version = builder(plan)
    distribution = module.replace("_", "-")
    if find_spec(module) is None:
        return f"{module} is not installed: pip install {distribution}=={version}"
    installed = metadata.version(distribution)
    if installed != version:
        return (
            f"the bundle's engines are of {distribution} {version} and {installed} is installed; an engine runs with "
            f"the version that built it: pip install {distribution}=={version}, or export the bundle again"
        )
    return None


def builder(plan: Plan) -> tuple[str, str]:
    """Module and version of what built an engine: "tensorrt_rtx 1.7.1.116"."""
    module, _, version = plan.builder.partition(" ")
    return module, version


def device_index(device: str) -> int | None:
    """Number of a GPU: 0 for "auto" and "cuda", N for "cuda:N"; None for what is no GPU."""
    name, _, number = device.partition(":")
    if name not in ("auto", "cuda") or (number and not number.isdigit()):
        return None
    return int(number or 0)


def runtime_cache(made_of: list[str], version: str, capability: str) -> str:
    """Name of the file for what TensorRT compiles at the first run, by what it was compiled from."""
    return sha256("\n".join([version, capability, *made_of]).encode()).hexdigest() + ".cache"
