"""README and docs: their commands are those that there are, and the README stays easy to read in a terminal."""

import re
from pathlib import Path

import pytest
import typer

from spin.__main__ import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(path: Path, language: str = "") -> list[str]:
    """Return the fenced blocks of a page, of one language if it is named."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S)
    return [text for name, text in found if language in ("", name)]


def commands(path: Path) -> list[tuple[str, str]]:
    """Return (command, the rest of its line) of what a page shows of the command line."""
    lines = []
    for block in blocks(path):
        place = re.search(r'^place="(.*)"$', block, re.M)
        text = block.replace("\\\n", " ").replace("$place", place[1] if place else "")
        lines += re.findall(r"^(?:python -m spin|spin-diffusion) +([a-z-]+)([^#\n]*)", text, re.M)
    return lines


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_have_the_options_that_they_are_shown_with(path: Path) -> None:
    for command, rest in commands(path):
        params = COMMANDS[command].params
        given = set(re.findall(r"--[a-z-]+", rest))
        assert given <= {name for param in params for name in param.opts}, command
        needed = {param.opts[0] for param in params if param.required and not param.envvar}
        assert "..." in rest or {name for name in needed if name.startswith("--")} <= given, command


def test_the_readme_shows_the_stages() -> None:
    shown = {command for command, _ in commands(README)}
    assert shown == {"prepare", "generate", "train", "score", "register", "report"}


def test_targets_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(), re.M))
    assert {"demo", "test", "install"} <= shown <= targets


def test_prose_fits_a_terminal() -> None:
    text = README.read_text()
    for diagram in blocks(README, "mermaid"):
        text = text.replace(diagram, "")
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
