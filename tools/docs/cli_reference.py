"""A hook of mkdocs: the page `reference/cli.md`, written from the command line itself."""

from __future__ import annotations

from typing import Any

import typer
from typer.cli import get_docs_for_click

PAGE = "reference/cli.md"


def reference() -> str:
    """Return every command with its arguments and options, as Markdown."""
    from qlip_export.cli import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="qlip-export")
    text: str = get_docs_for_click(obj=command, ctx=context, name="qlip-export", title="Command line")
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add the page to those that are read from the disk."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=reference()))
    return files
