"""Streams over HTTP: made, steered, rewound, branched, recorded, ended."""

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from serve_fixture import OTHER, PROMPT, Served, colour, eventually

from cfrt.picture import png
from cfrt.serve.client import Client, ServerError

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::cfrt.text.PromptWarning")]

ROOT = Path(__file__).parents[1]


def test_a_stream_from_its_first_frame_to_its_end(client: Client) -> None:
    with client.stream(PROMPT, seed=7) as stream:
        frames = list(stream.frames(n=9))
        assert frames[0].pixels.shape == (64, 64, 3)
        assert [frame.index for frame in frames] == list(range(9))
        assert {frame.prompt for frame in frames} == {PROMPT}
        assert colour(frames[-1].pixels) == "red"
        change = stream.prompt(OTHER)
        later = list(stream.frames(n=16))
        assert all((frame.prompt == OTHER) == (frame.unit >= change.unit) for frame in later)
        assert colour(later[-1].pixels) == "blue"
        assert stream.state()["timeline"] == [{"unit": 0, "prompt": PROMPT}, {"unit": change.unit, "prompt": OTHER}]
    with pytest.raises(ServerError, match="id of a stream that runs") as caught:
        stream.state()
    assert caught.value.status == 404


def test_it_is_the_stream_that_the_library_gives(client: Client) -> None:
    """Same prompt and seed: the pixels of `cfrt.Stream`, but for JPEG's rounding."""
    from cfrt import Stream

    with client.stream(PROMPT, seed=3) as remote, Stream(PROMPT, seed=3, threads=1) as local:
        for theirs, ours in zip(remote.frames(n=6), local.frames(n=6), strict=True):
            assert np.abs(theirs.pixels.astype(int) - ours.pixels).mean() < 2


def test_pause_step_and_resume(client: Client) -> None:
    with client.stream(PROMPT) as stream:
        frames = stream.frames()
        shown = [next(frames) for _ in range(5)]
        stream.pause()
        assert stream.state()["paused"]
        eventually(lambda: stream.state()["stats"]["frames"] == stream.state()["stats"]["frames"])
        before = stream.state()["unit"]
        stream.step(2)
        eventually(lambda: stream.state()["unit"] >= before + 1)
        stream.resume()
        while shown[-1].unit < before + 3:
            shown.append(next(frames))
        assert [frame.index for frame in shown] == list(range(len(shown)))
        frames.close()


def test_rewind_plays_the_same_pictures_again(client: Client) -> None:
    with client.stream(PROMPT, seed=5) as stream, closing(stream.frames()) as frames:
        seen = {}
        for frame in frames:
            seen[frame.index] = frame.pixels
            if frame.unit == 6:
                break
        assert stream.state()["reach"] >= 3
        stream.rewind(3)
        again = next(frame for frame in frames if frame.unit < 6)
        np.testing.assert_array_equal(again.pixels, seen[again.index])
        with pytest.raises(ServerError, match="units to go back, got 5000"):
            stream.rewind(5000)


def test_a_branch_shares_the_past_and_not_the_future(client: Client) -> None:
    with client.stream(PROMPT) as trunk:
        list(trunk.frames(n=9))
        with trunk.branch() as twin:
            assert twin.id != trunk.id
            twin.prompt(OTHER)
            assert colour(list(twin.frames(n=20))[-1].pixels) == "blue"
            assert trunk.state()["prompt"] == PROMPT
            assert colour(list(trunk.frames(n=4))[-1].pixels) == "red"


def test_restart_begins_again_with_the_same_pictures(client: Client) -> None:
    with client.stream(PROMPT, seed=2) as stream:
        first = [frame.pixels for frame in stream.frames(n=3)]
        stream.restart()
        frames = stream.frames()
        for expected in first:
            frame = next(frames)
            np.testing.assert_array_equal(frame.pixels, expected)
        frames.close()


def test_words_that_the_model_does_not_know_are_told(served: Served) -> None:
    name = served.new("a red sqare")
    assert served.state(name)["notes"] == ["the model does not know 'sqare' (did you mean 'square'?)"]
    assert served.patch(name, prompt=OTHER)["notes"] == []
    served.http.delete(f"/streams/{name}")


def test_a_stream_from_a_picture(client: Client) -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, :, 1] = 180
    with client.stream(PROMPT) as stream:
        stream.start_from(png(picture))
        first = next(stream.frames(n=1))
        assert first.index == 0
        assert colour(first.pixels) == "green"


def test_nobody_watching_means_no_work(served: Served, name: str) -> None:
    eventually(lambda: served.state(name)["stats"]["frames"] >= 1)
    time.sleep(0.4)
    assert served.state(name)["stats"]["frames"] == 1
