"""Thirty-two viewers of four streams, some slow, some rude, some gone in the middle. Nobody else notices."""

import asyncio
import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from serve_fixture import OTHER, PROMPT, process
from websockets.asyncio.client import connect

from cfrt.serve.client import Client, RemoteStream

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

STREAMS, VIEWERS = 4, 32
SECONDS = 8.0


async def watch(url: str, seconds: float, ticks: list[int]) -> None:
    """A viewer like the page: which frames came."""
    async with connect(url) as socket, asyncio.timeout(seconds + 20):
        await socket.send(json.dumps({"type": "video", "format": "jpeg"}))
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            message = await socket.recv()
            if isinstance(message, bytes):
                ticks.append(int.from_bytes(message[8:12], "little"))


async def stall(host: str, port: int, name: str, seconds: float, patience: float) -> None:
    """Viewers that ask for the most and read nothing, one after the other."""
    for _ in range(round(seconds / patience)):
        _, writer = await asyncio.open_connection(host, port, limit=1)
        writer.write(f"GET /streams/{name}/frames?scale=16 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        await asyncio.sleep(patience)
        writer.transport.abort()


async def come_and_go(url: str, seconds: float) -> int:
    """A viewer that breaks off without a word, again and again."""
    visits, end = 0, asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        socket = await connect(url)
        await socket.recv()
        socket.transport.abort()
        visits += 1
        await asyncio.sleep(0.3)
    return visits


async def babble(url: str, seconds: float) -> Counter[str]:
    """A viewer that sends nonsense between prompts; what it was answered."""
    answers: Counter[str] = Counter()
    dice = random.Random(1)
    async with connect(url) as socket:
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            wish = {"type": "control", "prompt": dice.choice([PROMPT, OTHER])}
            await socket.send(
                dice.choice([json.dumps(wish), "{", "[]", b"\xff", "x" * 40_000, '{"type": "control", "rewind": -1}'])
            )
            while True:
                message = await socket.recv()
                if isinstance(message, str) and (kind := json.loads(message)["type"]) in ("done", "error"):
                    answers[kind] += 1
                    break
            await asyncio.sleep(0.1)
    return answers


async def everybody(url: str, names: list[str]) -> tuple[list[list[int]], Counter[str], list[int]]:
    host, port = url.rstrip("/").removeprefix("http://").split(":")
    live = [f"ws://{host}:{port}/streams/{name}/live" for name in names]
    seen: list[list[int]] = [[] for _ in range(VIEWERS)]
    rude = [asyncio.create_task(come_and_go(address, SECONDS)) for address in live]
    talk = asyncio.create_task(babble(live[0], SECONDS))
    slow = [
        asyncio.create_task(stall(host, int(port), name, SECONDS, patience))
        for name in names
        for patience in (SECONDS, 0.4)
    ]
    await asyncio.gather(*(watch(live[i % STREAMS], SECONDS, seen[i]) for i in range(VIEWERS)))
    await asyncio.gather(*slow)
    return seen, await talk, list(await asyncio.gather(*rude))


def test_thirty_two_viewers_of_four_streams() -> None:
    with process() as (url, server):
        client = Client(url)
        streams = [client.stream(PROMPT, seed=seed) for seed in range(STREAMS)]
        seen, answers, visits = asyncio.run(everybody(url, [stream.id for stream in streams]))
        assert answers["done"] > 3
        assert answers["error"] > 10
        assert min(visits) > 3
        for ticks in seen:
            assert np.all(np.diff(ticks) == 1), "a viewer that reads as fast as it can has missed a frame"
        frames = [max(ticks) for ticks in seen[:STREAMS]]
        assert min(frames) >= 0.9 * max(frames), f"streams do not share fairly: {frames}"
        for stream in streams:
            gone(stream)
        assert client.call("GET", "/healthz") == {"status": "ok", "streams": STREAMS}
        assert server.poll() is None


def gone(stream: RemoteStream) -> dict[str, Any]:
    """The state of a stream whose viewers have all left."""
    for _ in range(200):
        state = stream.state()
        if state["viewers"] == 0:
            return state
    raise AssertionError(f"{state['viewers']} viewers have not left")
