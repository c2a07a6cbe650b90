"""The planner's formulae against real modules and real allocations."""

from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch
from training_fixture import small
from wan_fixture import wan_config, wan_weights

from cfrt import memory
from cfrt.config import PRESETS
from cfrt.engines import Spec
from cfrt.engines.torch import TorchEngine
from cfrt.nn.autoencoder import Autoencoder
from cfrt.nn.dit import CausalDiT
from cfrt.nn.ring import RingCache

pytestmark = pytest.mark.cpu

FULL = PRESETS["wan-1.3b-framewise-2step"]
SMALL = replace(PRESETS["tiny"], width=24, heads=2, depth=3, ffn=40, sinks=2, latent_grid=(6, 4))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config", [SMALL, PRESETS["tiny"], replace(SMALL, unit=2, window=6, sinks=0)])
def test_what_a_stream_keeps(config):
    """Weights, ring and text of real modules, byte for byte."""
    network, ring = CausalDiT(config), RingCache(config, 1, torch.float32, torch.device("cpu"))
    assert memory.parameters(config) == count(network)
    assert memory.ring(config) == sum(x.numel() for x in (*ring.k, *ring.v))
    text = network.text_kv(torch.zeros(1, 1, config.text.length, config.text.width))
    assert memory.text_kv(config) == sum(x.numel() for pair in text for x in pair)


def test_the_small_decoder():
    weights, state = memory.decoder(SMALL.autoencoder, SMALL.latent_grid, "tiny")
    network = Autoencoder(SMALL.autoencoder)
    assert weights == count(network.decoder)
    _, kept = network.decode(torch.zeros(1, 1, SMALL.latent_channels, *SMALL.latent_grid))
    assert state == kept.numel()


STREAMS = {
    "student": {},
    "chunk-wise": {"unit": 3, "window": 6, "sinks": 2},
    "teacher": {"solver": "euler", "guidance": 3.0, "first_steps": None},
    "rolling": {"unit": 2, "window": 4, "sinks": 2, "first_steps": None, "schedule": "rolling"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("taehv", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_all_that_a_running_engine_holds(kind, taehv, precision):
    """Every tensor that can be reached from an engine that has decoded two units, against the exact parts, byte for
    byte; the phases and the negative prompt's rows, which the account leaves out, are none of them."""
    config = wan_config(**STREAMS[kind])
    decoder = "taehv" if taehv else None
    rows = np.ones((config.text.length, config.text.width), np.float32)
    weights = wan_weights(config, taehv=True)
    engine = TorchEngine()
    engine.prepare(Spec(config=config, weights=weights, precision=precision, decoder=decoder, null=rows))
    engine.set_text(rows)
    engine._null = None if engine._null is None else torch.zeros(0)  # rows, not keys: 8 MB at full size
    for unit in range(2):
        engine.decode(engine.noise(unit, 0))
    setup = memory.Setup(config=config, precision=precision, decoder=decoder or "wan", guided=config.guided)
    exact = [part for part in memory.stream(setup).parts if part.exact]
    assert sum(tensor_bytes(engine)) == sum(part.bytes for part in exact)


def tensor_bytes(engine):
    """Of every storage that the engine reaches."""
    found = {}
    waiting = [engine.__dict__]
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.nn.Module):
            waiting += [*one.parameters(), *one.buffers()]
        elif isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, RingCache):
            waiting.append(one.__dict__)
        elif isinstance(one, MethodType):  # the decoder that was chosen
            waiting.append(one.__self__)
    return found.values()


@pytest.mark.parametrize("base", [8, 96])
def test_wan_decoder_weights(base):
    """Against diffusers' own module."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs = AutoencoderKLWan(base_dim=base)
    config = replace(FULL.autoencoder, widths=(base, 2 * base, 4 * base, 4 * base))
    expected = count(theirs.decoder) + count(theirs.post_quant_conv)
    assert memory.decoder(config, (2, 2), "wan")[0] == expected
    assert memory.autoencoder(config) == count(theirs)


def test_published_sizes():
    """arXiv:2602.02214's geometry: the ring of 21 frames, and the state of the released streaming decoder, which is
    given as 944.3 million numbers."""
    frame = memory.ring(FULL) / FULL.geometry.capacity
    assert 2 * frame == pytest.approx(287.5e6, rel=1e-3)
    assert memory.decoder(FULL.autoencoder, FULL.latent_grid, "wan")[1] == pytest.approx(944.3e6, rel=1e-3)
    assert memory.UMT5_XXL == 5_680_910_336
    assert memory.text_encoder("int8") == pytest.approx(5.69e9, rel=1e-2)


def test_a_small_stream_stays_below_its_estimate():
    """What eager PyTorch has alive at once in a pass, counted from its own profile of allocations."""
    from torch.profiler import ProfilerActivity, profile

    config = replace(SMALL, latent_grid=(24, 24), width=96, ffn=256, depth=2)
    network = CausalDiT(config).eval()
    ring = RingCache(config, 1, torch.float32, torch.device("cpu"))
    x = torch.zeros(1, config.unit, config.latent_channels, *config.latent_grid)
    with torch.no_grad():
        text = network.text_kv(torch.zeros(1, 1, config.text.length, config.text.width))
        network.step(x, torch.zeros(1), text, ring, 0, commit=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            network.step(x, torch.zeros(1), text, ring, 1)
    alive = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    estimate = 4 * memory.workspace(config)
    assert peak <= estimate, f"{peak} bytes at once, the estimate says {estimate}"
    assert peak > estimate / 4


def test_remedies_make_it_fit():
    setup = memory.Setup(config=FULL, precision="fp32", text="gpu")
    account = memory.stream(setup)
    assert account.total > 24e9
    chosen = account.enough(int(24e9))
    assert account.total - sum(part.bytes for part in chosen) <= 24e9
    assert all(part.bytes > 0 for part in chosen)
    assert account.enough(account.total) == ()
    small = memory.stream(memory.Setup(config=replace(FULL, window=9), decoder="taehv"))
    assert small.total < 24e9
    assert "fits into 24.0 GB" in memory.page(small, int(24e9))
    assert "change this, then it fits" in memory.page(account, int(24e9))
    assert "even then it does not fit" in memory.page(account, 10**9)


def test_a_guided_teacher_has_two_rings():
    once, twice = (memory.stream(memory.Setup(config=FULL, guided=guided)) for guided in (False, True))
    rings = [next(part.bytes for part in account.parts if "ring" in part.name) for account in (once, twice)]
    assert rings[1] == 2 * rings[0]


def test_what_a_training_keeps():
    """Asymmetric DMD after one step of the student and its critic: weights, gradients, moments, average, byte for byte;
    the frozen score is kept in bf16 at full size, and in fp32 here."""
    from functools import partial

    from training import data, dmd, loop
    from training.network import Network

    config = small()
    stage = dmd.Stage(
        dmd.Config(steps=2, batch=2, critic_warmup=0, critic_updates=1),
        config,
        partial(data.prompts, config=data.Config(units=config.trained_frames)),
        Network(config),
        Network(config),
    )
    average, optimisers = loop.Average(stage.student, 0.9), stage.optimisers()
    loop.take(stage, optimisers, 0, seed=0)
    trained = [parameter for network in stage.networks.values() for parameter in network.parameters()]
    moments = [
        value
        for group in optimisers.values()
        for optimiser in group.values()
        for state in optimiser.state.values()
        for key, value in state.items()
        if key != "step"
    ]
    gradients = [parameter.grad for parameter in trained]
    assert all(gradient is not None for gradient in gradients)
    kept = bytes_of([*trained, *gradients, *moments, *average.weights.values(), *stage.frozen["real"].parameters()])
    table = 4 * (1 + max(config.text.vocab.values())) * config.text.width  # of words, which is trained as well
    account = memory.training(config, real=config)
    assert kept == account.total + 2 * memory.parameters(config) + table * (4 + 4 + 1 + 1)


def bytes_of(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_training_is_shared_out():
    alone = memory.training(FULL, real=PRESETS["wan-14b"])
    shared = memory.training(FULL, real=PRESETS["wan-14b"], processes=8)
    assert alone.total == pytest.approx(36 * memory.parameters(FULL) + 2 * memory.parameters(PRESETS["wan-14b"]))
    assert shared.total == pytest.approx(alone.total / 8, rel=1e-6)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("16 GiB", 2**34), ("0.5gb", 5 * 10**8)])
def test_sizes(text, size):
    assert memory.read_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "GB", "much"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError):  # noqa: PT011 (float says it in its own words)
        memory.read_size(text)
