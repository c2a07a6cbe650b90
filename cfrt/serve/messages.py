"""What goes over the wire as JSON: the bodies of HTTP and the messages of the WebSocket, checked by pydantic."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

LARGEST_SEED = 2**53 - 1
"""The largest integer that a page can hold."""


class Wire(BaseModel):
    """Unknown fields are errors, so that a misspelt one is not silently without effect."""

    model_config = ConfigDict(extra="forbid", strict=True)


def readable(text: str | None) -> str | None:
    """Text that can be sent on: no half of a surrogate pair, no NUL, something in it."""
    if text is None:
        return None
    if not text.strip():
        raise ValueError("a prompt in words")
    if any("\ud800" <= letter <= "\udfff" or (letter < " " and letter not in "\t\n\r") for letter in text):
        raise ValueError("text without control characters and unpaired surrogates")
    return text


class Prompt(Wire):
    prompt: str = Field(description="What the video shows.", examples=["a large red circle moving left"])

    _readable = field_validator("prompt")(readable)


class NewStream(Prompt):
    """`POST /streams`"""

    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Same seed, same video.")
    paused: bool = Field(False, description="Show the first frame and wait.")


class Control(Wire):
    """`PATCH /streams/{id}`. What is left out stays as it is; what is given is done from top to bottom."""

    restart: bool = Field(
        False, description="From the first frame, with the seed and prompt given here or the present ones."
    )
    rewind: int | None = Field(
        None, ge=1, le=10**6, description="Go back over so many units; `reach` says how far one can."
    )
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Other noise from the next unit on.")
    prompt: str | None = Field(None, description="What the video shows from the next unit on.")
    blend_units: int = Field(
        0, ge=0, le=64, description="Cross-fade from the old prompt to the new over so many units."
    )
    recache: bool = Field(
        False, description="Read the past anew under the new prompt, so that it lets go of the old one."
    )
    paused: bool | None = Field(None, description="Wait, or go on.")
    step: int | None = Field(None, ge=1, le=64, description="Wait, after so many units more.")

    _readable = field_validator("prompt")(readable)


class ControlMessage(Control):
    """As `PATCH`; the answer is {"type": "done", "id": id, "change": ...} or {"type": "error", "id": id, ...}."""

    type: Literal["control"]
    id: int = Field(0, ge=0, le=LARGEST_SEED)


class VideoMessage(Wire):
    """How this viewer wants its frames: here as JPEG, or not at all because it sees them by WebRTC."""

    type: Literal["video"]
    format: Literal["jpeg", "none"]


Message = Annotated[ControlMessage | VideoMessage, Field(discriminator="type")]
MESSAGE: TypeAdapter[ControlMessage | VideoMessage] = TypeAdapter(Message)
"""What a page may send over its WebSocket."""


class Offer(Wire):
    """WebRTC's session description, from a browser to the server or back."""

    sdp: str = Field(max_length=20_000)
    type: Literal["offer", "answer"]
    stamped: bool = Field(
        False, description="Draw each frame's tick below it (cfrt/serve/film.py), as the page wants it."
    )


class Percentiles(Wire):
    """Milliseconds; null before there is anything."""

    p50: float | None
    p95: float | None
    p99: float | None
    count: int


class StreamStats(Wire):
    """A stream's own account of itself; docs/serve.md defines each number."""

    time_to_first_frame: float | None = Field(description="ms, loading included")
    unit: Percentiles = Field(description="All the work that a unit costs.")
    latency: Percentiles = Field(description="Start of a unit's first pass to its first pixels, decoding included.")
    change_to_pixel: Percentiles = Field(description="From a change of prompt to the first frame that follows it.")
    overhead: Percentiles = Field(
        description="What the server adds to a frame: from the stream's hands to the last viewer's buffer."
    )
    unit_duration: float = Field(description="ms of video in one unit")
    frames: int
    dropped: int = Field(description="Frames that slow viewers have missed, all viewers together.")
    ring: tuple[int, int] = Field(
        description="Latent frames that the next unit looks back at, and the most it ever will."
    )


class PromptMark(Wire):
    unit: int
    prompt: str


class RecordingState(Wire):
    running: bool
    seconds: float
    bytes: int = Field(description="0 until it is stopped")


class StreamState(Wire):
    """`GET /streams/{id}`"""

    id: str
    prompt: str
    seed: int
    paused: bool
    unit: int = Field(description="The unit on show, -1 before the first frame.")
    reach: int = Field(description="Units that one can rewind.")
    timeline: list[PromptMark] = Field(description="Which prompt holds from which unit.")
    viewers: int
    recording: RecordingState | None
    notes: list[str] = Field(description="What the model did not understand of the prompt.")
    error: str | None = Field(description="Why it has stopped, if it has.")
    stats: StreamStats


class Change(Wire):
    """When a change of prompt takes effect."""

    unit: int
    recache_ms: float | None


class Changed(StreamState):
    change: Change | None = None


class ModelCard(Wire):
    """What this server streams."""

    model: str
    engine: str
    precision: str
    height: int
    width: int
    fps: float
    frames_per_unit: int
    unit_seconds: float
    starts_from_picture: bool
    presets: list[str]
    limits: dict[str, float]


class Problem(Wire):
    message: str
    expected: str
    got: str
    do: str


class ErrorBody(Wire):
    """Every error, whatever its status."""

    error: Problem
