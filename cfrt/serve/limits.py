"""What one server gives away at most. Every number that keeps one visitor from the others' share is here."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from starlette.requests import HTTPConnection

from .refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps of a server; see docs/serve.md for what happens at each."""

    streams: int = 8
    """Streams at the same time."""
    viewers: int = 32
    """Viewers of one stream, of whatever kind."""
    prompt: int = 1000
    """Characters of a prompt."""
    image_bytes: int = 4 << 20
    """Size of a picture that a stream may start from."""
    image_pixels: int = 1 << 24
    """Width times height of it, once decoded."""
    message_bytes: int = 32 << 10
    """Size of a JSON body and of a WebSocket message."""
    recording_seconds: float = 600.0
    """Length of a recording; it stops there."""
    idle_seconds: float = 600.0
    """A stream that nobody watched or asked about for so long is closed."""
    creations_per_minute: float = 30.0
    """New streams (branches and restarts included) from one address."""
    messages_per_second: float = 40.0
    """Requests and WebSocket messages that steer a stream, from one address."""

    def check_prompt(self, prompt: str) -> None:
        """Refusal for one that is too long."""
        if len(prompt) > self.prompt:
            expected = f"a prompt of at most {self.prompt} characters"
            raise Refusal(422, expected=expected, got=f"{len(prompt)} characters", do="shorten it")


class Bucket:
    """A token bucket: `rate` a second on average, `burst` at once."""

    def __init__(self, rate: float, burst: float, now: Callable[[], float] = monotonic) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._level, self._then = burst, now()

    def take(self) -> float:
        """0 when there was a token; else the seconds until there will be one."""
        now = self._now()
        self._level = min(self._burst, self._level + (now - self._then) * self._rate)
        self._then = now
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0

    @property
    def full(self) -> bool:
        """Has it rested long enough that forgetting it changes nothing?"""
        return self._level + (self._now() - self._then) * self._rate >= self._burst


class Meter:
    """One bucket per address."""

    SWEEP = 1024
    """Addresses after which those with a full bucket are forgotten."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._buckets: dict[str, Bucket] = {}

    def pay(self, visitor: HTTPConnection) -> None:
        """One token of whoever asks. Refusal 429 when there is none left."""
        if len(self._buckets) >= self.SWEEP:
            self._buckets = {who: bucket for who, bucket in self._buckets.items() if not bucket.full}
        address = visitor.client.host if visitor.client else ""
        wait = self._buckets.setdefault(address, Bucket(self._rate, self._burst)).take()
        if wait:
            do = f"wait {wait:.1f} s"
            raise Refusal(429, expected="fewer requests", got="too many at once", do=do, wait=wait)
