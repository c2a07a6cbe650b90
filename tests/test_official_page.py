"""The page about the released checkpoints says what the code does."""

import re
import sys
from pathlib import Path

import pytest

from cfrt.official import OFFICIAL

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


def test_its_tables_are_up_to_date(monkeypatch):
    """tools/official.py would change nothing."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import official

    page = official.PAGE.read_text(encoding="utf-8")
    assert official.files() in page
    assert official.needs() in page


def test_its_commands_exist():
    """Every `cfrt` command of the page, with its flags, is one that the program knows."""
    from cfrt import cli

    page = (ROOT / "docs" / "official-checkpoints.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^cfrt (\w+)", page, re.MULTILINE))
    assert commands == {"pull", "generate", "convert", "plan"}
    for command in commands:
        assert cli.main([command, "--help"]) == 0


def test_every_released_file_is_on_it():
    page = (ROOT / "docs" / "official-checkpoints.md").read_text(encoding="utf-8")
    assert all(file.path in page for file in OFFICIAL.values())
