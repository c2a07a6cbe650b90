"""Mutants: known bugs, put into a kernel one at a time. The kernel's test cases must find each.

A subject is a kernel's test cases and its mutants. A case is a function that fails, as a test does, where a kernel is
wrong; what the executor found is read off the message, and the rest is a wrong value. A mutant says which check must
find it, so that a dropped barrier counts as caught when the race is seen, not when the result happens to be wrong.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from ..edits import Edit, edited
from ..report import KINDS

VALUE, ANY = "value", "any"


@dataclass(frozen=True)
class Mutant:
    """A bug. `check`: one of report.KINDS, 'value', or 'any'."""

    name: str
    edit: Edit
    check: str = ANY

    def __post_init__(self) -> None:
        if self.check not in (*KINDS, VALUE, ANY):
            raise ValueError(f"expected check to be one of {(*KINDS, VALUE, ANY)}, got {self.check!r}")


def bug(check: str, name: str, file: str, old: str, new: str, nth: int | None = None) -> Mutant:
    """A mutant as a row of a table."""
    return Mutant(name, Edit(file, old, new, nth), check)


@dataclass(frozen=True)
class Subject:
    """`refresh` makes the cases build anew; it is called when the sources have changed."""

    name: str
    cases: dict[str, Callable[[], object]]
    mutants: list[Mutant]
    refresh: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Verdict:
    """What the cases said of a mutant: {check: the first case in which it found something}."""

    subject: str
    mutant: Mutant
    found: dict[str, str]

    @property
    def caught(self) -> bool:
        return bool(self.found) if self.mutant.check == ANY else self.mutant.check in self.found

    def __str__(self) -> str:
        found = ", ".join(f"{check} in {case!r}" for check, case in self.found.items()) or "nothing"
        verdict = "caught" if self.caught else "SURVIVED"
        return f"{verdict}  {self.subject}: {self.mutant.name} ({self.mutant.check}): {found}"


def checks_of(error: BaseException) -> set[str]:
    """The kinds of findings that a failed case's message shows; without any the value is wrong."""
    found = re.findall(rf"^\s*({'|'.join(KINDS)}): ", str(error), re.M)
    return set(found) or {VALUE}


def examine(subject: Subject, mutant: Mutant | None) -> dict[str, str]:
    """Runs the cases until the mutant's check, or for 'any' anything, has found it. None: the kernel as it is."""
    subject.refresh()
    found: dict[str, str] = {}
    for name, case in subject.cases.items():
        try:
            case()
        except (AssertionError, pytest.fail.Exception) as error:
            for check in checks_of(error):
                found.setdefault(check, name)
        if mutant and (mutant.check in found or (mutant.check == ANY and found)):
            break
    return found


def judge(subject: Subject, only: Iterable[Mutant] | None = None) -> Iterator[Verdict]:
    """A verdict for each mutant. The unchanged kernel must pass all cases."""
    if wrong := examine(subject, None):
        raise RuntimeError(f"{subject.name}: expected the unchanged kernel to pass, got {wrong}")
    for mutant in subject.mutants if only is None else only:
        with edited(mutant.edit):
            found = examine(subject, mutant)
        yield Verdict(subject.name, mutant, found)
    subject.refresh()
