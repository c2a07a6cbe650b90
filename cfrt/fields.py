"""Fields of the frozen dataclasses that configure things: checked when one is made, and read back from JSON.

The checks are for `__post_init__`: they raise ConfigError with what was expected and what came, and leave tuples and
floats where JSON gives lists and whole numbers."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from .errors import ConfigError

T = TypeVar("T")


def require(condition: bool, expected: str, got: object) -> None:
    """ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"expected {expected}, got {got!r}")


def counts(config: object, *names: str, least: int = 1) -> None:
    """Each named field is a whole number of at least `least`."""
    for name in names:
        value = getattr(config, name)
        require(type(value) is int and value >= least, f"{name} to be a whole number >= {least}", value)


def positives(config: object, *names: str) -> None:
    """Each named field is a positive, finite number; kept as float."""
    for name in names:
        value = getattr(config, name)
        require(_is_number(value) and 0 < value < float("inf"), f"{name} to be a positive number", value)
        object.__setattr__(config, name, float(value))


def sequence(config: object, name: str, kind: type, length: int | None = None) -> tuple[Any, ...]:
    """The named field, kept as a tuple of `kind`."""
    value = getattr(config, name)
    expected = f"{name} to be a list of {'' if length is None else f'{length} '}{kind.__name__}"
    require(isinstance(value, tuple | list) and length in (None, len(value)), expected, value)
    fits = _is_number if kind is float else lambda item: type(item) is kind
    require(all(fits(item) for item in value), expected, value)
    found = tuple(kind(item) for item in value)
    object.__setattr__(config, name, found)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def decode(cls: type[T], data: Any, where: str) -> T:
    """A dataclass from the dict that `dataclasses.asdict` and JSON made of it, those in its fields too. ConfigError
    names every unknown and every missing key; `where` says in what."""
    require(isinstance(data, Mapping), f"{where} to be a JSON object", data)
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    missing = sorted(name for name, required in known.items() if required and name not in data)
    if unknown or missing:
        raise ConfigError(f"{where} does not fit this version of cfrt: unknown keys {unknown}, missing keys {missing}")
    values, kinds = dict(data), get_type_hints(cls)
    for name in data:
        if hasattr(kinds[name], "__dataclass_fields__"):
            values[name] = decode(kinds[name], data[name], f"{name} in {where}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
