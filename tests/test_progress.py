"""What is shown while something takes long: bars on a terminal, lines elsewhere, no colours unasked."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlip_export import progress
from qlip_export.progress import Live, Plain

ROOT = Path(__file__).parents[1]
COLOUR = re.compile(r"\x1b\[[\d;]*[34]\dm")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stderr


BARS = """
from qlip_export.progress import Live
with Live() as bars:
    bars.stage("draw", 2)
    bars.item("one")
    bars.item("two")
"""


WAITING = """
import sys, time
sys.stderr.isatty = sys.stdout.isatty = lambda: True
from qlip_export.progress import waiting
with waiting("loading"):
    time.sleep(0.3)
"""


def test_lines_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    plain = Plain()
    plain.stage("draw", 10)
    for step in range(5):
        now = 6.0 * step
        plain.item(f"image {step}")
    assert capsys.readouterr().err.splitlines() == [
        "draw (10)",
        "draw: 3/10, about 48 s left image 2",
        "draw: 5/10, about 36 s left image 4",
    ]


def test_no_terminal_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for errors, output in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(sys.stderr, "isatty", lambda errors=errors: errors)
        monkeypatch.setattr(sys.stdout, "isatty", lambda output=output: output)
        assert isinstance(progress.progress_for_terminal(), Live if errors and output else Plain)


def test_batches_are_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    begin = progress.batches(Plain(), "texts")
    for before in range(3):
        begin(before, 3)
    assert capsys.readouterr().err == "texts (3)\n"


def test_waiting_says_nothing_to_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.waiting("loading"):
        pass
    assert capfd.readouterr().err == ""
    assert "loading" in run(WAITING, FORCE_COLOR="1", TERM="xterm-256color")


def test_colours_only_where_they_are_wanted() -> None:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert COLOUR.search(run(BARS, **terminal))
    plain = run(BARS, NO_COLOR="1", **terminal)
    assert "draw" in plain and "2/2" in plain
    assert not COLOUR.search(plain)


SCRIPT = """#!/bin/sh
exec {python} -c 'import sys; sys.argv[0] = "qlip-export"; from qlip_export.cli import main; main()' "$@"
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment with `qlip-export` on its path and a home folder of its own."""
    script = tmp_path / "bin" / "qlip-export"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    path = f"{script.parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "HOME": str(tmp_path)}


def test_completion_is_installed_and_completes(installed: dict[str, str], tmp_path: Path) -> None:
    # Not `bash -c COMMAND` alone: that replaces the shell, which the command looks for among its parents.
    subprocess.run(
        ["bash", "-c", "qlip-export --install-completion; exit $?"], env=installed, check=True, timeout=60
    )
    assert "qlip-export" in (tmp_path / ".bashrc").read_text()
    wanted = {"COMP_WORDS": "qlip-export generate --ex", "COMP_CWORD": "2"}
    done = subprocess.run(
        ["qlip-export"],
        env={**installed, **wanted, "_QLIP_EXPORT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["--explain"]
