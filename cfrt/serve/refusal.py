"""How the server says no: one JSON shape for every error, with what was expected, what came and what to do next."""

import re
from typing import Any

from ..errors import CfrtError

SENTENCE = re.compile(r"expected (.+?), got (.+?)(?:; (.+))?")

LONGEST_ECHO = 120
"""Characters of what came that an answer repeats."""


class Refusal(CfrtError):
    """A request that is not done, and why. `status` is that of HTTP."""

    def __init__(self, status: int, *, expected: str, got: Any, do: str, wait: float = 0.0) -> None:
        self.status, self.expected, self.got, self.do, self.wait = status, expected, clipped(got), do, wait
        super().__init__(f"expected {expected}, got {self.got}; {do}")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "expected": self.expected, "got": self.got, "do": self.do}}


def clipped(value: Any) -> str:
    """What came, as plain ASCII of bounded length: it goes into headers, logs and pages. Blank text is in quotes."""
    plain = isinstance(value, str) and value.isascii() and value.isprintable() and value.strip()
    text = value if plain else ascii(value)
    return text if len(text) <= LONGEST_ECHO else f"{text[:LONGEST_ECHO]}... ({len(text)} characters)"


def of_library(error: CfrtError) -> Refusal:
    """An error of the library, whose message says all three: "expected ..., got ...; ...". Of a message that does not,
    what came before its first semicolon is what came."""
    message = " ".join(str(error).split())
    said = SENTENCE.fullmatch(message)
    expected, got, do = said.groups() if said else ("a wish that this stream can follow", *message.partition("; ")[::2])
    refusal = Refusal(422, expected=expected, got=got, do=do or "see /docs for what there is")
    refusal.args = (message,)
    return refusal


def no_such(what: str, name: str) -> Refusal:
    return Refusal(404, expected=f"the id of {what} that runs", got=name, do="make a new one: POST /streams")
