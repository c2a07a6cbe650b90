from typing import TypedDict
