"""README and documentation: commands that exist and work, links that lead somewhere, a site that builds.

A block of shell commands is executed, in the order of its page, unless its first line begins with `# needs:`.
The fast tests hold every command to the options, extras, targets and modules that there are.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer
from typer.main import get_command

from qlip_export import __version__

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its lines, and whether it names what it needs."""

    page: Path
    language: str
    text: str

    @property
    def runs_here(self) -> bool:
        return not self.text.startswith("# needs:")

    @property
    def commands(self) -> list[list[str]]:
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        yield Block(page, language, text)


def every_command() -> list[tuple[str, list[str]]]:
    return [
        (str(block.page.relative_to(ROOT)), words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for words in block.commands
    ]


INLINE = re.compile(r"`((?:qlip-export|make|python -m)\s[^`]+)`")


def inline_commands(page: Path) -> Iterator[list[str]]:
    """Yield commands that are named in running text; a line may end within one."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (shlex.split(" ".join(found.split())) for found in INLINE.findall(text))


def complaint(words: list[str]) -> str | None:
    """Return what is wrong with a command, as far as one can tell without running it."""
    program = Path(words[0]).name
    if program == "qlip-export":
        return _parses(words[1:])
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return None if words[1] in targets else f"no target {words[1]}"
    if program == "pip":
        return _can_be_installed(words)
    if program.startswith("python") and words[1] == "-m":
        return None if importlib.util.find_spec(words[2]) else f"no module {words[2]}"
    return None if program == "polygraphy" else f"unknown program {program}"


def _parses(arguments: list[str]) -> str | None:
    from qlip_export.cli import app

    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    if arguments[0] in {option for parameter in group.params for option in parameter.opts}:
        return None
    command = group.commands.get(arguments[0])
    if command is None:
        return f"no command {arguments[0]}"
    try:
        command.make_context(arguments[0], arguments[1:])
    except click.ClickException as error:
        return error.format_message()
    except Exception as error:  # newer versions of typer carry a click of their own
        if type(error).__module__.startswith("typer"):
            return str(error)
        raise
    return None


def _can_be_installed(words: list[str]) -> str | None:
    """The package is on no index: it is installed from its wheel, with extras that it has."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = set(
        re.findall(r"^([a-z-]+) = \[", text.split("[project.optional-dependencies]")[1], re.MULTILINE)
    )
    wheel = f"qlip_export-{__version__}-py3-none-any.whl"
    for word in words:
        if not re.match(r"qlip[-_]export", file := word.rpartition("/")[2]):
            continue
        name, _, extras = file.partition("[")
        if name != wheel:
            return f"{name} is not {wheel}"
        if unknown := {e for e in extras.rstrip("]").split(",") if e} - known:
            return f"no extra {', '.join(sorted(unknown))}"
    return None


def test_commands_exist() -> None:
    commands = every_command()
    assert len(commands) > 25
    wrong = [f"{page}: {words}: {found}" for page, words in commands if (found := complaint(words))]
    assert wrong == []


def test_commands_in_running_text_exist() -> None:
    """They may leave out what a command cannot do without."""
    found = [(page.name, words) for page in PAGES for words in inline_commands(page)]
    assert len(found) > 25
    wrong = [(page, words, why) for page, words in found if (why := complaint(words))]
    assert [each for each in wrong if not each[2].startswith("Missing ")] == []


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("qlip-export generate engines/x prompt --bit 8", "--bit"),
        ("qlip-export draw engines/x", "no command draw"),
        ("make everything", "no target everything"),
        (f'pip install "dist/qlip_export-{__version__}-py3-none-any.whl[wings]"', "no extra wings"),
        ('pip install "dist/qlip_export-0.0.9-py3-none-any.whl[report]"', "0.0.9"),
        ('pip install "qlip-export[report]"', "qlip-export is not"),
        ("python -m tools.nothing", "no module tools.nothing"),
        ("rm -rf engines", "unknown program rm"),
    ],
)
def test_wrong_commands_are_found(command: str, what: str) -> None:
    assert what in (complaint(shlex.split(command)) or "")


def test_readme_is_short() -> None:
    """At most two screens of forty lines before the links."""
    before, found, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Read on")
    assert found
    assert len(before.splitlines()) <= 80


@pytest.mark.skipif(find_spec("mkdocs") is None, reason='needs pip install "qlip-export[docs]"')
def test_site_builds(tmp_path: Path) -> None:
    """Strict: a link that leads nowhere, a page that is not listed, a name that does not exist all fail."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    cli = (tmp_path / "site" / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "--target-fab" in cli
    api = (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")
    assert "TextToImage" in api


ORDER = ["README.md", "tutorial.md", "cpu.md", "calibration.md", "polygraphy.md", "latency.md"]
"""Pages that build what later ones use come first."""


def _rank(page: Path) -> int:
    return ORDER.index(page.name) if page.name in ORDER else len(ORDER)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_commands_work(tmp_path: Path) -> None:
    """Run all that runs here, in one folder; other targets of `make`, and installing, are left to CI."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done: set[tuple[str, ...]] = set()
    for page in sorted(PAGES, key=_rank):
        for block in blocks(page):
            if not block.runs_here:
                continue
            if block.language == "python":
                _run([sys.executable, "-c", block.text], tmp_path, environment)
            for words in block.commands if block.language == "sh" else []:
                program = Path(words[0]).name
                if tuple(words) in done:  # the same words on another page
                    continue
                done.add(tuple(words))
                if program == "qlip-export":
                    _run([sys.executable, "-m", "qlip_export", *words[1:]], tmp_path, environment)
                elif words[:2] == ["make", "quickstart"]:
                    _run([sys.executable, "-m", "qlip_export", "quickstart"], tmp_path, environment)
                else:
                    assert program in ("make", "pip"), f"{page}: {words} is neither run nor marked"
    assert (tmp_path / "engines" / "quickstart.png").is_file()
    assert (tmp_path / "report.html").is_file()


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    print(f"{time.monotonic() - began:6.1f} s  {shlex.join(command[1:])}", flush=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
