"""A stream of the official models' kind, at a size of seconds: theorem 3 from prompt to pixels, for students and
teachers, from nothing, from a picture and from a film; theorem 5; and what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_fixture import save_student
from torch import Tensor
from wan_fixture import BAD, FOX, SNOW, save_wan, wan_config, wan_weights

import cfrt
from cfrt import flow, noise
from cfrt.cli import main
from cfrt.config import PRESETS, ModelConfig
from cfrt.convert import plan
from cfrt.errors import EngineError, PromptError, VideoError, WeightsError
from cfrt.nn.codec import codec, tiny_decoder
from cfrt.nn.dit import CausalDiT
from cfrt.nn.tiles import Tiling
from cfrt.text import encoder
from cfrt.video import read_film, write
from cfrt.weights import load_model, part, save_model
from training.encoding import ModelTools, encode

pytestmark = pytest.mark.cpu

TEACHER = {"solver": "euler", "guidance": 3.0, "steps": (1.0, 0.75, 0.5, 0.25), "first_steps": None}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a model, made once."""
    made: dict[str, Path] = {}

    def make(taehv: bool = False, **changes: Any) -> Path:
        key = repr((taehv, sorted(changes.items())))
        if key not in made:
            made[key] = save_wan(tmp_path_factory.mktemp("wan"), wan_config(**changes), taehv=taehv)
        return made[key]

    return make


@pytest.fixture
def stream() -> Iterator[Callable[..., cfrt.Stream]]:
    streams = []

    def make(model: Path, prompt: str = FOX, **changes: Any) -> cfrt.Stream:
        streams.append(cfrt.Stream(prompt, **{"model": model, "fps": "max", "seed": 7, "precision": "fp64", **changes}))
        return streams[-1]

    yield make
    for one in streams:
        one.close()


def film(frames: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (frames, 16, 32, 3), dtype=np.uint8)


def pixels(frames: Iterator[cfrt.Frame]) -> np.ndarray:
    return np.stack([frame.pixels for frame in frames])


# ---------------------------------------------------------------------- the same, offline


@dataclass
class Offline:
    """No ring, no commit, no thread, no state: every pass looks at the whole clean past under a mask, guidance is two
    networks' worth of passes, and the whole latent is decoded at once."""

    folder: Path
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.config, self.weights = load_model(self.folder)
        self.dit = CausalDiT.from_arrays(self.config, part(self.weights, "dit")).to(self.dtype)
        self.vae: Any = codec(self.config.autoencoder, part(self.weights, "autoencoder")).to(self.dtype)
        self.text = encoder(self.config, self.weights, self.folder)

    @torch.no_grad()
    def latents(self, prompts: list[str], given: Tensor | None = None) -> Tensor:
        """[1, units F, C, h, w] of a prompt for each unit, the first of which may be given."""
        config, wide = self.config, torch.promote_types(self.dtype, torch.float32)
        known = sorted(set(prompts))
        texts = [self._text_kv(known)]
        captions = torch.tensor([[known.index(p) for p in prompts for _ in range(config.unit)]])
        if config.guided:
            texts.append(self._text_kv([config.text.negative] * len(known)))
        shape = (1, config.unit, config.latent_channels, *config.latent_grid)
        clean = torch.zeros(1, 0, *shape[2:], dtype=wide) if given is None else given
        start = clean.shape[1] // config.unit
        for unit in range(start, len(prompts)):
            levels = flow.sigmas(config.unit_steps(unit - start), config.shift)
            x = noise_of(unit, 0, shape, wide)
            for step, s in enumerate(levels):
                if step and config.solver == "renoise":
                    x = flow.renoise(x, noise_of(unit, step, shape, wide), s)
                v = [self._velocity(clean, x, s, unit, text, captions) for text in texts]
                v_mixed = v[0] if len(v) == 1 else v[1] + config.guidance * (v[0] - v[1])
                after = levels[step + 1] if step + 1 < len(levels) else 0.0
                x = x - s * v_mixed if config.solver == "renoise" else x + (after - s) * v_mixed
            clean = torch.cat([clean, x], 1)
        return clean

    def _velocity(self, clean: Tensor, x: Tensor, s: float, unit: int, text: Any, captions: Tensor) -> Tensor:
        end, f = clean.shape[1] + x.shape[1], self.config.unit
        mask = torch.from_numpy(self.config.geometry.causal_mask(end))
        t = torch.cat([torch.zeros(1, unit * f), torch.full((1, f), 1000 * s)], 1).double()
        return self.dit(torch.cat([clean, x], 1), t, text, captions[:, :end], mask=mask)[:, -f:].to(x.dtype)

    def _text_kv(self, prompts: list[str]) -> Any:
        rows = np.stack([self.text.encode(prompt).rows for prompt in prompts])
        return self.dit.text_kv(torch.tensor(rows, dtype=self.dtype)[None])

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        return self.vae.encode(torch.from_numpy(frames).to(self.dtype).permute(0, 3, 1, 2)[None] / 255)

    @torch.no_grad()
    def decode(self, latents: Tensor, decoder: Any = None) -> np.ndarray:
        video, _ = (decoder or self.vae.decode)(latents.to(self.dtype))
        levels = (video[0].to(torch.promote_types(self.dtype, torch.float32)).clamp(0, 1) * 255).round()
        return levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def noise_of(unit: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(noise.normal(7, unit, step, noise.Purpose.SAMPLE, shape)).to(dtype)


# ---------------------------------------------------------------------- theorem 3: streaming == offline

GEOMETRIES = [{"unit": 1, "window": 4}, {"unit": 3, "window": 7, "sinks": 2}, {"unit": 1, "window": 3, "sinks": 1}]
KINDS = {
    "student": {},
    "one list": {"first_steps": None},
    "teacher": TEACHER,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("fps", ["max", 10_000.0])
def test_streaming_equals_offline(
    geometry: dict[str, int],
    kind: str,
    fps: str | float,
    folder: Callable[..., Path],
    stream: Callable[..., cfrt.Stream],
) -> None:
    """The prompt changes at unit 3; by then the window has moved."""
    model = folder(**geometry, **KINDS[kind])
    offline, units, change = Offline(model), 6, 3
    expected = offline.decode(offline.latents([FOX] * change + [SNOW] * (units - change)))
    live = stream(model, fps=fps)
    config = live.config
    frames = list(live.frames(config.first_frame(change)))
    assert live.prompt(SNOW).unit == change
    frames += live.frames(config.first_frame(units) - len(frames))
    np.testing.assert_array_equal(pixels(iter(frames)), expected)
    assert np.std(expected[-1]) > 5
    assert [frame.index for frame in frames] == list(range(1 + 4 * (units * config.unit - 1)))


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_picture_is_unit_0(kind: str, folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    """Image-to-video: frame 0 is the picture through the autoencoder, and unit 1 has the steps of a first unit."""
    model, picture = folder(**GEOMETRIES[0], **KINDS[kind]), film(1)
    offline = Offline(model)
    latents = offline.latents([FOX] * 5, offline.encode(picture))
    np.testing.assert_array_equal(pixels(stream(model, image=picture[0]).frames(17)), offline.decode(latents))


@pytest.mark.parametrize(("geometry", "frames"), [(GEOMETRIES[0], 9), (GEOMETRIES[0], 21), (GEOMETRIES[1], 9)], ids=str)
@pytest.mark.parametrize("fps", ["max", 10_000.0])
def test_a_film_is_gone_on_from(
    geometry: dict[str, int],
    frames: int,
    fps: str | float,
    folder: Callable[..., Path],
    stream: Callable[..., cfrt.Stream],
) -> None:
    """Video extension, of fewer and of more frames than the window holds; chunk-wise, whole chunks."""
    model, prefix = folder(**geometry), film(frames)
    offline = Offline(model)
    given = offline.encode(prefix)
    units = given.shape[1] // geometry["unit"] + 2
    expected = offline.decode(offline.latents([FOX] * units, given))
    np.testing.assert_array_equal(pixels(stream(model, prefix=prefix, fps=fps).frames(len(expected))), expected)


def test_the_small_decoder_takes_the_place_of_the_large_one(
    folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]
) -> None:
    model = folder(taehv=True, **GEOMETRIES[1])
    offline = Offline(model)
    small: Any = tiny_decoder(offline.config.autoencoder, part(offline.weights, "taehv")).double()
    expected = offline.decode(offline.latents([FOX] * 3), small.decode)
    np.testing.assert_array_equal(pixels(stream(model, decoder="taehv").frames(33)), expected)
    assert (pixels(stream(model).frames(33)) != expected).any()


def test_a_model_may_have_no_other_decoder(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Kind "taehv": the folder holds taew2_1.pth as its autoencoder, which cannot read pictures."""

    config = wan_config()
    weights = wan_weights(config, taehv=True)
    own = {f"autoencoder.{name}": x for name, x in part(weights, "taehv").items()}
    own |= {f"dit.{name}": x for name, x in part(weights, "dit").items()}
    own["autoencoder.encoder.0.weight"] = np.ones(1, dtype=np.float32)  # as the released file
    save_model(tmp_path, replace(config, autoencoder=replace(config.autoencoder, kind="taehv", widths=())), own)
    with cfrt.Stream(FOX, model=tmp_path, text=folder(), fps="max") as live:
        assert pixels(live.frames(5)).shape == (5, 16, 32, 3)
    with pytest.raises(EngineError, match="TAEHV does not read pictures"):
        cfrt.Stream(FOX, model=tmp_path, text=folder(), image=film(1)[0])


def test_tiles_stream_too(folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    model = folder()
    offline = Offline(model)
    tiles = Tiling(side=2, overlap=0)
    expected = offline.decode(offline.latents([FOX] * 3), lambda x: tiles.decode(offline.vae.decode, x))
    np.testing.assert_array_equal(pixels(stream(model, tile=2).frames(9)), expected)


def test_half_precision_errs_no_more_than_pytorch_does(
    folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]
) -> None:
    """The 2x rule, from prompt to pixels."""
    model = folder()
    exact, half = Offline(model), Offline(model, torch.bfloat16)
    expected = exact.decode(exact.latents([FOX] * 4)).astype(float)
    allowed = np.abs(half.decode(half.latents([FOX] * 4)) - expected).mean()
    error = np.abs(pixels(stream(model, precision="bf16").frames(13)) - expected).mean()
    assert 0 < error <= 2 * allowed


# ---------------------------------------------------------------------- guidance


def test_guidance_and_negative_prompt_are_the_models_own_unless_given(
    folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]
) -> None:
    student, teacher = folder(), folder(**TEACHER)
    own = pixels(stream(teacher).frames(5))
    np.testing.assert_array_equal(own, pixels(stream(teacher, guidance=3.0, negative=BAD).frames(5)))
    assert (own != pixels(stream(teacher, negative=SNOW).frames(5))).any()
    assert (own != pixels(stream(teacher, guidance=1.0).frames(5))).any()
    plain, led = pixels(stream(student).frames(5)), pixels(stream(student, guidance=2.0).frames(5))
    assert (plain != led).any()
    with pytest.raises(EngineError, match="reads no negative prompt"):
        stream(student, negative=BAD)
    with pytest.raises(PromptError, match="expected a prompt"):
        stream(teacher, negative="")


def test_a_table_is_led_away_from_no_words(tmp_path: Path) -> None:
    """The small student was trained with caption dropout to zeros."""
    model = save_student(tmp_path)
    with cfrt.Stream("a red circle", model=model, guidance=2.0, fps="max") as led:
        frames = pixels(led.frames(5))
    with cfrt.Stream("a red circle", model=model, fps="max", engine="torch") as plain:
        assert (frames != pixels(plain.frames(5))).any()


# ---------------------------------------------------------------------- theorem 5: snapshots


@pytest.mark.parametrize("at", [1, 6, 18])
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_snapshot_goes_on_exactly(
    at: int, kind: str, folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]
) -> None:
    """Before, within and after the film that the stream goes on from; also in a stream that has no film."""
    model = folder(**GEOMETRIES[2], **KINDS[kind])
    live = stream(model, prefix=film(9), precision="fp32")
    list(live.frames(at))
    saved = live.snapshot()
    expected = pixels(live.frames(20))
    live.restore(saved)
    np.testing.assert_array_equal(pixels(live.frames(20)), expected)
    other = stream(model, precision="fp32")
    other.restore(saved)
    np.testing.assert_array_equal(pixels(other.frames(20)), expected)


def test_a_snapshot_of_another_decoder_is_refused(
    folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]
) -> None:
    saved = stream(folder(), tile=2).snapshot()
    with pytest.raises(EngineError, match=r"with tile None, got one with tile 2$"):
        stream(folder()).restore(saved)


@pytest.mark.parametrize(
    ("kind", "changes"), [("student", {}), ("teacher", {"tile": 2}), ("student", {"decoder": "taehv"})], ids=str
)
def test_rewinds_branches_and_files_carry_the_decoder_along(
    kind: str, changes: dict[str, Any], folder: Callable[..., Path], stream: Callable[..., cfrt.Stream], tmp_path: Path
) -> None:
    """Its state is many tensors, those of a guided ring come twice, and tiles have one each; fp32 loses nothing."""
    model = folder(taehv=True, **GEOMETRIES[2], **KINDS[kind])
    live, other = stream(model, precision="fp32", **changes), stream(model, precision="fp32", seed=1, **changes)
    first = pixels(live.frames(33))
    cut = live.config.first_frame(live.rewind(3))
    np.testing.assert_array_equal(pixels(live.frames(33 - cut)), first[cut:])
    live.snapshot(portable=True).save(tmp_path / "snapshot")
    other.restore(cfrt.Snapshot.load(tmp_path / "snapshot"))
    with live.branch() as twin:
        assert (twin.rewind(twin.reach), next(twin.frames()).index) == (0, 0)
        np.testing.assert_array_equal(pixels(twin.frames(32)), first[1:])
    expected = pixels(live.frames(20))
    np.testing.assert_array_equal(pixels(other.frames(20)), expected)


# ---------------------------------------------------------------------- from released files


def test_released_files_stream_after_conversion(
    folder: Callable[..., Path], stream: Callable[..., cfrt.Stream], tmp_path: Path
) -> None:
    """An official checkpoint with its wrappers' names, Wan2.1_VAE.pth and taew2_1.pth become one folder, whose frames
    are those of the same weights under our names."""
    model = folder(taehv=True, **GEOMETRIES[1])
    config, weights = load_model(model)
    generator = {f"model._fsdp_wrapped_module.{name}": torch.tensor(x) for name, x in part(weights, "dit").items()}
    torch.save({"generator_ema": generator}, tmp_path / "released.pt")
    for prefix, name in (("autoencoder", "Wan2.1_VAE.pth"), ("taehv", "taew2_1.pth")):
        torch.save({key: torch.tensor(x) for key, x in part(weights, prefix).items()}, tmp_path / name)
    released = torch.load(tmp_path / "taew2_1.pth", weights_only=True) | {"encoder.0.bias": torch.ones(3)}
    torch.save(released, tmp_path / "taew2_1.pth")
    plan(
        tmp_path / "released.pt",
        model=config,
        autoencoder=tmp_path / "Wan2.1_VAE.pth",
        taehv=tmp_path / "taew2_1.pth",
    ).run(tmp_path / "model")
    for decoder in (None, "taehv"):
        expected = pixels(stream(model, decoder=decoder, precision="fp32").frames(12))
        got = pixels(stream(tmp_path / "model", text=model, decoder=decoder, precision="fp32").frames(12))
        np.testing.assert_array_equal(got, expected)


def test_videos_are_encoded_for_training(folder: Callable[..., Path]) -> None:
    """`training.prepare` has the same autoencoder and the same text encoder."""
    model, clip = folder(), film(9)
    offline = Offline(model, torch.float32)
    tools = ModelTools(model, offline.config.text)
    expected = offline.encode(clip)[0].half().numpy()
    np.testing.assert_allclose(encode(tools.codec, clip), expected, rtol=0, atol=2e-3)
    np.testing.assert_array_equal(tools.wording.encode(FOX), offline.text.encode(FOX).rows)


# ---------------------------------------------------------------------- manners


def test_the_command_goes_on_from_the_end_of_a_film(
    folder: Callable[..., Path], stream: Callable[..., cfrt.Stream], tmp_path: Path
) -> None:
    """30 frames in a file; the model was trained on 6 latent frames, which are 21."""
    model, film_file = folder(**GEOMETRIES[1]), tmp_path / "film.y4m"
    write(film(30), film_file, fps=16.0)
    read = read_film(film_file, (16, 32), 16.0, 21)
    expected = pixels(stream(model, prefix=read, precision="fp32").frames(40))
    out = tmp_path / "out.y4m"
    asked = ["generate", FOX, "--model", str(model), "--prefix", str(film_file), "--seconds", "2.5", "--seed", "7"]
    assert main([*asked, "-q", "-o", str(out)]) == 0
    write(expected, tmp_path / "expected.y4m", fps=16.0)
    assert out.read_bytes() == (tmp_path / "expected.y4m").read_bytes()


def test_the_command_passes_on_what_it_is_asked(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def watch(prompt: str, **asked: Any) -> None:
        seen.update(asked)
        raise EngineError("enough")

    monkeypatch.setattr("cfrt.stream.Stream", watch)
    asked = ["--guidance", "2.5", "--negative", BAD, "--decoder", "taehv", "--tile", "8", "--schedule", "sequential"]
    assert main(["generate", FOX, "--model", str(folder()), *asked, "-o", str(tmp_path / "x.mp4")]) == 1
    assert (seen["guidance"], seen["negative"], seen["decoder"], seen["tile"]) == (2.5, BAD, "taehv", 8)
    assert (seen["image"], seen["prefix"], seen["text"], seen["schedule"]) == (None, None, None, "sequential")
    assert (
        main(["generate", FOX, "--model", str(folder()), "--text-precision", "int8", "-o", str(tmp_path / "x.mp4")])
        == 1
    )
    assert (seen["text"].encode(FOX).rows != load_text(folder()).encode(FOX).rows).any()


def load_text(folder: Path) -> Any:
    config, weights = load_model(folder)
    return encoder(config, weights, folder)


def test_a_chunk_of_pictures_is_no_picture(folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    with pytest.raises(EngineError, match="give it a film of 9 pictures or more as prefix"):
        stream(folder(**GEOMETRIES[1]), image=film(1)[0])


def test_a_film_too_short_for_a_unit(folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    film_file = tmp_path / "film.y4m"
    write(film(8), film_file, fps=16.0)
    asked = ["generate", FOX, "--model", str(folder(**GEOMETRIES[1])), "--prefix", str(film_file)]
    assert main([*asked, "-o", str(tmp_path / "x.y4m")]) == 1
    assert "expected at least 9 frames" in capsys.readouterr().err


@pytest.mark.parametrize("frames", [0, 2, 8, 10])
def test_films_fill_whole_units(frames: int, folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    with pytest.raises(VideoError, match=r"whole units have \(9, 21, 33, 45, ...\)"):
        stream(folder(**GEOMETRIES[1]), prefix=film(frames))


def test_films_of_another_kind_are_refused(folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    with pytest.raises(VideoError, match=r"expected pictures \(T, 16, 32, 3\) uint8, got \(9, 16, 16, 3\)"):
        stream(folder(), prefix=film(9)[:, :, :16])
    with pytest.raises(ValueError, match="image or prefix, got both"):
        stream(folder(), prefix=film(9), image=film(1)[0])


def test_a_decoder_that_is_not_there(folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    with pytest.raises(WeightsError, match=r"missing: decoder\.1\.bias"):
        stream(folder(), decoder="taehv")
    with pytest.raises(EngineError, match='expected decoder "taehv" or None'):
        stream(folder(), decoder="vae")


def test_text_through_another_reader(folder: Callable[..., Path], stream: Callable[..., cfrt.Stream]) -> None:
    """A folder of umT5's files, or any object that encodes."""
    model = folder()
    expected = pixels(stream(model).frames(5))
    config, weights = load_model(model)
    np.testing.assert_array_equal(pixels(stream(model, text=model).frames(5)), expected)
    np.testing.assert_array_equal(pixels(stream(model, text=encoder(config, weights, model)).frames(5)), expected)


def test_a_table_has_no_precision(tmp_path: Path, capsys: Any) -> None:
    asked = ["generate", "a red circle", "--text-precision", "int8", "--model", str(save_student(tmp_path))]
    assert main([*asked, "-o", str(tmp_path / "x.mp4")]) == 2
    assert "reads through its own table" in capsys.readouterr().err


def test_a_table_has_no_other_reader(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="reads through its own table"):
        cfrt.Stream("a red circle", model=save_student(tmp_path), text=tmp_path)


def test_the_presets_that_are_teachers() -> None:
    """48 Euler steps on the shift-5 grid, guidance 3 against Wan's own negative prompt."""
    for name in ("wan-1.3b-chunkwise-ar", "wan-1.3b-framewise-ar"):
        config: ModelConfig = PRESETS[name]
        assert (config.solver, config.guidance) == ("euler", 3.0)
        levels = (*flow.sigmas(config.steps, config.shift), 0.0)
        assert levels == pytest.approx(flow.euler_grid(48, 5.0))
        assert [round(1000 * levels[i], 2) for i in (1, 4, 12, 47)] == [995.76, 982.14, 937.5, 96.15]
    assert [name for name, config in PRESETS.items() if config.guided] == [
        "wan-1.3b-chunkwise-ar",
        "wan-1.3b-framewise-ar",
    ]
