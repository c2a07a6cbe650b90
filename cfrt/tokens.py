"""A prompt as the numbers that umT5 reads: cleaned as the reference cleans it, then cut into pieces. No torch."""

import html
import re
from pathlib import Path

import ftfy
from tokenizers import Tokenizer

from .errors import WeightsError


def clean(prompt: str) -> str:
    """As the reference cleans: broken encodings and curly quotes mended, HTML entities read twice, every run of white
    space one blank, none at the ends."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


class Tokens:
    """The tokenizer of a tokenizer.json, for prompts of at most `length` tokens. WeightsError when it is none."""

    def __init__(self, path: Path, length: int) -> None:
        try:
            self._words = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            said = str(error).strip().split("\n")[0]
            raise WeightsError(f"{path} is no tokenizer ({said}); fetch it again") from error
        self._words.no_padding()
        self._words.enable_truncation(length)

    def __call__(self, prompt: str) -> tuple[list[int], str]:
        """The tokens, and the end of the prompt for which there was no room."""
        text = clean(prompt)
        encoding = self._words.encode(text)
        end = max((stop for _, stop in encoding.offsets), default=0)
        return encoding.ids, text[end:].strip() if encoding.overflowing else ""
